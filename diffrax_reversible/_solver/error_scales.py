"""The scales of reconstruction errors."""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, RealScalarLike, SolverState, Terms, Y
from .._tree import larger
from .base import AbstractReversibleSolver
from .interrupted_solver import advance


_SolverState = TypeVar("_SolverState")


class HasErrorScales(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that defines the scales of reconstruction errors."""

    @abc.abstractmethod
    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        y_end: Y,
        solver_state_end: _SolverState,
    ) -> PyTree[Array]:
        """The scales of reconstruction errors at a known state, which the backward pass
        compares with its own.

        **Arguments:**

        - `terms`, `args`: as in `diffrax.AbstractSolver.step`.
        - `t0`, `t1`: the step that begins at the known state.
        - `length`: the time over which the backward pass has reached it, at least that of a
            step. Errors of the solver state act for so long.
        - `y0`, `solver_state`: the known state and solver state.
        - `y_end`, `solver_state_end`: the known state and solver state from which the
            backward pass started. Of the solver state only floating-point arrays need to be
            present.

        **Returns:**

        For every floating-point array of `(y0, solver_state)`, in that order, an array of
        its shape. By default it holds, for each entry, its largest magnitude among the
        known state, the state one step later (the step is computed again), and the state
        from which the backward pass started.
        """


def error_scales(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    length: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
    y_end: Y,
    solver_state_end: SolverState,
) -> PyTree[Array]:
    """See `HasErrorScales`, also for the default."""
    if isinstance(solver, HasErrorScales):
        step = terms, t0, t1, length, y0, args, solver_state
        return solver.error_scales(*step, y_end, solver_state_end)
    y1, _, _, state1, _ = advance(solver, terms, t0, t1, y0, args, solver_state)
    known = (y0, solver_state), (y1, state1), (y_end, solver_state_end)
    known = (eqx.filter(k, eqx.is_inexact_array) for k in known)
    return jtu.tree_map(larger, *known)
