"""The stages of explicit Runge–Kutta methods of Diffrax."""

from typing import Any

import numpy as np
from diffrax import AbstractTerm, ButcherTableau

from .._custom_types import Args, RealScalarLike, Y
from .._isolated import unfused
from .._tree import tree_axpy, tree_zeros_like


def evaluate(
    term: AbstractTerm,
    t: RealScalarLike,
    y: Y,
    args: Args,
    control: RealScalarLike,
) -> Y:
    """The derivative of one stage, times the control.

    If XLA fused the evaluations of a step, it would repeat the earlier ones for each
    entry of a later one. Where a field takes the mean of sines, gradients would take
    hundreds of times as long.
    """
    return unfused(t, term.vf_prod(t, y, args, control))


def stages_of(
    tableau: ButcherTableau,
    term: AbstractTerm,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y: Y,
    args: Args,
    first: Y,
) -> list[Y]:
    """The stage derivatives times `t1 - t0`, from `y` at `t0`; the `first` is given.

    The loop is unrolled, over a dozen stages at most: Diffrax's own either cannot be
    differentiated in reverse mode, or evaluates the stages again.
    """
    control = term.contr(t0, t1)
    stages = [first]
    for c, row in zip(tableau.c, tableau.a_lower, strict=True):
        stage = y
        for a, k in zip(row, stages, strict=True):
            stage = stage if a == 0 else tree_axpy(float(a), k, stage)
        t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
        stages.append(evaluate(term, t, stage, args, control))
    return stages


def combine(weights: Any, stages: list[Y]) -> Y:
    """The sum of stages with these weights."""
    total = tree_zeros_like(stages[0])
    for weight, stage in zip(weights, stages, strict=True):
        total = total if weight == 0 else tree_axpy(float(weight), stage, total)
    return total


def stability_function(tableau: ButcherTableau, z: float) -> float:
    """The factor of a step of `y' = λ y` with `z = h λ`."""
    rows = [[], *tableau.a_lower]
    a = np.array([[*row, *[0] * (len(rows) - len(row))] for row in rows])
    stages = np.linalg.solve(np.eye(len(rows)) - z * a, np.ones(len(rows)))
    return float(1 + z * np.dot(tableau.b_sol, stages))


def embedded_weights(tableau: ButcherTableau) -> np.ndarray | None:
    """The weights of the embedded method, without the last stages if the solution does not
    use them, so that they need not be evaluated, and scaled to a sum of one.

    `None` if that is not possible, or if they hardly differ from those of the solution.
    """
    weights = np.array(tableau.b_sol - tableau.b_error)
    weights[np.max(np.flatnonzero(tableau.b_sol)) + 1 :] = 0
    if abs(total := np.sum(weights)) < 0.1:
        return None
    weights = weights / total
    return weights if np.max(np.abs(weights - tableau.b_sol)) > 0.01 else None
