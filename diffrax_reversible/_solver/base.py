"""The contract of a reversible solver."""

import abc
from typing import Any, ClassVar, Generic, TypeVar

from diffrax import AbstractSolver

from .._custom_types import Args, RealScalarLike, Terms, Y


_SolverState = TypeVar("_SolverState")


class AbstractReversibleSolver(AbstractSolver[_SolverState], Generic[_SolverState]):
    """A solver whose steps can be undone, for use with `ReversibleAdjoint`.

    To add a solver, implement the methods of `diffrax.AbstractSolver`, and `backward_step`,
    which undoes `step`. Gradients are then exact. Each step of the backward pass costs a
    backward step, a step and the pull-back of a step. A subclass of
    `AbstractCouplingSolver` needs neither `step` nor `backward_step`, and its backward pass
    saves the evaluations of a step.

    Subclasses that override `step` have to override `backward_step` as well.

    The adjoint calls `step` with `made_jump=False`. If the solver state contains an array,
    jumps raise an error, as the array might depend on the vector field.

    Interpolations have to be linear in their `dense_info`, as polynomial ones are.
    Gradients also pass through `init`, which is called again at the end of the backward
    pass.
    """

    # The default number of states that `ReversibleAdjoint` holds as checkpoints. In single
    # precision it holds as many of 8 as fit into a megabyte, if these are more. Of small
    # states it holds up to eight times as many.
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

        - `terms`, `args`: as in `diffrax.AbstractSolver.step`.
        - `t0`, `t1`: the same floats that `step` was given.
        - `y1`, `solver_state`: the state and the solver state at `t1`, which `step`
            returned.

        **Returns:**

        The state and the solver state at `t0`, equal to those that `step` was given up to
        rounding.
        """


def check_flags(solver: Any, *names: str) -> None:
    """Raise an error unless these attributes are Booleans known at compile time."""
    for name in names:
        value = getattr(solver, name)
        if not isinstance(value, bool):
            raise ValueError(
                f"`{type(solver).__name__}({name}={value})` must be `True` or `False`, "
                "known when the solve is compiled."
            )
