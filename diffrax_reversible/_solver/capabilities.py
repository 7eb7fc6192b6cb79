"""Optional capabilities of reversible solvers.

A solver declares a capability by inheriting its class. The functions below use it on any
reversible solver, with a default for solvers without it.
"""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, RealScalarLike, SolverState, Terms, Y
from .base import AbstractReversibleSolver


_SolverState = TypeVar("_SolverState")


class CanCrossJumps(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can carry its solver state across a jump of the vector field."""

    @abc.abstractmethod
    def cross_jump(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[_SolverState, BoolScalarLike]:
        """The solver state at `t1`, from the one at `t0`, across a discontinuity of the
        vector field.

        `t0` and `t1` are a few floats apart, and `y` is the same at both. The call with
        `t0` and `t1` exchanged has to undo this one.

        **Returns:**

        The solver state, and whether it had to change.
        """


class KeepsStateAtJumps(CanCrossJumps[_SolverState], Generic[_SolverState]):
    """A solver whose solver state is independent of the vector field up to rounding."""

    def cross_jump(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[_SolverState, BoolScalarLike]:
        del terms, t0, t1, y, args
        return solver_state, False


class HasRecord(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that needs scalars to undo a step that the step itself discards, for example
    the start of the step before."""

    @abc.abstractmethod
    def to_record(self, solver_state: _SolverState) -> PyTree[Array]:
        """The scalars of the solver state that a step discards and its inverse needs.

        For gradients they are recorded before every step, which takes memory per step.
        """

    @abc.abstractmethod
    def recall(self, solver_state: _SolverState, recorded: PyTree[Array]) -> _SolverState:
        """The solver state after a step in the form that `backward_step` takes, with the
        scalars that `to_record` returned before the step."""


class HasStatistics(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that contributes statistics of a solve."""

    @abc.abstractmethod
    def statistics(self, solver_state: _SolverState) -> dict[str, PyTree[Array]]:
        """Entries for the `stats` of a solution under `ReversibleAdjoint`, from the solver
        state after the last step."""


def statistics(
    solver: AbstractReversibleSolver, solver_state: SolverState
) -> dict[str, PyTree[Array]]:
    """See `HasStatistics`."""
    if isinstance(solver, HasStatistics):
        return solver.statistics(solver_state)
    return {}


def cross_jump(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y: Y,
    args: Args,
    solver_state: SolverState,
) -> tuple[SolverState, BoolScalarLike]:
    """See `CanCrossJumps`. Without arrays in the solver state there is nothing to do."""
    if isinstance(solver, CanCrossJumps):
        return solver.cross_jump(terms, t0, t1, y, args, solver_state)
    if any(map(eqx.is_array, jtu.tree_leaves(solver_state))):
        name = type(getattr(solver, "solver", solver)).__name__
        raise NotImplementedError(
            f"`diffeqsolve(..., solver={name}(), adjoint=ReversibleAdjoint())` cannot "
            "undo the change of the solver state at a jump of the vector field. End the "
            "solve at the jump and begin another there, or use a solver that can undo "
            "jumps, such as `diffrax_reversible.ALF4`, or "
            "`adjoint=RecursiveCheckpointAdjoint()`."
        )
    return solver_state, False


def to_record(solver: AbstractReversibleSolver, solver_state: SolverState) -> PyTree[Array]:
    """See `HasRecord`."""
    return solver.to_record(solver_state) if isinstance(solver, HasRecord) else None


def recall(
    solver: AbstractReversibleSolver, solver_state: SolverState, recorded: PyTree[Array]
) -> SolverState:
    """See `HasRecord`."""
    if isinstance(solver, HasRecord):
        return solver.recall(solver_state, recorded)
    return solver_state
