"""The deviation `v - f(t, z)` of asynchronous leapfrog: its estimate, growth and effect."""

from collections.abc import Callable

import numpy as np

from .linear_response import LinearResponse
from .order_conditions import exact_derivative, null_space_of, tolerance
from .rooted_trees import rooted_trees, RootedTree, trees_up_to


# The longest step, on `y' = λ y`.
_radius = 15.0


def slope_at_end(phi: dict[RootedTree, np.ndarray], order: int) -> np.ndarray | None:
    """Weights of `u_0, ..., u_s` in the vector field at the end of a step, that of `u_0`
    being zero: it is extrapolated from the stages, whose elementary weights are `phi`,
    exactly to `order - 1` and as well as possible to `order`. `None` if the conditions have
    no solution."""

    def system(trees):
        matrix = np.stack([phi[tree][1:] for tree in trees])
        return matrix, np.array([exact_derivative(tree) for tree in trees])

    matrix, rhs = system(trees_up_to(order - 1))
    weights = np.linalg.lstsq(matrix, rhs, rcond=1e-11)[0]
    if np.max(np.abs(matrix @ weights - rhs)) > tolerance:
        return None
    null_space = null_space_of(matrix)
    matrix, rhs = system(rooted_trees(order))
    free = matrix @ null_space
    rest = np.linalg.lstsq(free, rhs - matrix @ weights, rcond=1e-7)[0]
    return np.concatenate([[0.0], weights + null_space @ rest])


def growth_of_deviation(
    response_of: Callable[[np.ndarray], LinearResponse], deviation_weights: np.ndarray
) -> float:
    """The largest apparent growth of a deviation in one step of `y' = λ y`, up to three
    quarters of the longest stable step."""
    response = _stable(response_of)
    growth = np.abs(deviation_weights @ response.parasitic)
    return float(np.max(growth[: round(0.75 * len(growth))]))


def effect_of_deviation(
    response_of: Callable[[np.ndarray], LinearResponse],
    deviation_weights: np.ndarray,
    step_weights: np.ndarray,
    error_weights: np.ndarray,
) -> float:
    """A bound on the effect of a deviation: the smallest `q` such that, in all stable steps
    of `y' = λ y`, a deviation of `v` of size one that apparently grows by a factor of `g`
    per step adds at most `(g - 1)^2 q h` to the solution.

    The unit of `q` is the error of a step over its fine estimate, both at `λ h = -1`.
    """
    response = _stable(response_of)
    growth = np.maximum.accumulate(np.abs(deviation_weights @ response.parasitic))
    effect = np.abs(step_weights @ response.parasitic)
    grows = growth > 1.05
    unit = response_of(np.array([-1.0]))
    error = unit.error / (error_weights @ unit.stages)
    ratios = effect[grows] / (growth[grows] - 1) ** 2
    return float(np.max(ratios, initial=0) / np.abs(error[0]))


def _stable(response_of: Callable[[np.ndarray], LinearResponse]) -> LinearResponse:
    """The response of all stable steps of `y' = λ y` with `λ < 0`, by increasing length."""
    response = response_of(-np.linspace(0, _radius, 1501)[1:])
    limit = np.argmax(np.append(np.abs(response.solution) > 1, True))
    return response.at(np.arange(limit))
