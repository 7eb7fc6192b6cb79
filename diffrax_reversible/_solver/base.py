"""The contract of a reversible solver."""

import abc
from typing import Any, ClassVar, Generic, TypeVar

from diffrax import AbstractSolver

from .._custom_types import Args, RealScalarLike, Terms, Y


_SolverState = TypeVar("_SolverState")


class AbstractReversibleSolver(AbstractSolver[_SolverState], Generic[_SolverState]):
    """A solver whose steps can be undone, for use with
    [`diffrax_reversible.ReversibleAdjoint`][].

    A subclass implements what [`diffrax.AbstractSolver`][] asks for, and `backward_step`,
    which undoes its `step`. Nothing else is needed for exact gradients. Each step of the
    walk back costs a backward step, a step and the pull-back of a step. A solver that
    subclasses [`diffrax_reversible.AbstractCouplingSolver`][] needs neither `step` nor
    `backward_step`, and saves the evaluations of a step.

    The adjoint calls `step` with `made_jump=False`. If there is an array in the solver
    state, controllers that make jumps are refused, as it might depend on the vector field.

    Interpolations have to be linear in the `dense_info` that they take, as polynomial ones
    are. A gradient also goes through `init`, which is called again at the end of the walk
    back.
    """

    # How many states `ReversibleAdjoint` holds by default, for the walk back to go on from.
    default_checkpoints: ClassVar[int] = 8

    @abc.abstractmethod
    def backward_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, _SolverState]:
        """Undo `step`.

        **Arguments:**

        - `terms`, `args`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the very floats that the step was made from and to.
        - `y1`, `solver_state`: what `step` returned, that is at `t1`.

        **Returns:**

        The state and the solver state at `t0`, equal to what `step` was given up to
        rounding.
        """


def check_flags(solver: Any, *names: str) -> None:
    """Raise an error unless these are known when a solve is compiled."""
    for name in names:
        value = getattr(solver, name)
        if not isinstance(value, bool):
            raise ValueError(
                f"`{type(solver).__name__}({name}={value})` must be `True` or `False`, "
                "known when the solve is compiled."
            )
