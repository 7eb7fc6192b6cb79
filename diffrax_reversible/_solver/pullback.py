"""The pull-back of a step that the backward pass undoes."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import (
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    SolverState,
    Y,
)
from .._members import value_and_pullback
from .._tree import tree_add, tree_zeros_like
from .base import AbstractReversibleSolver
from .chain import Parts
from .chain_again import Start
from .cotangent import Cotangent
from .interrupted_solver import advance_densely


_SolverState = TypeVar("_SolverState")


class HasPullback(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can undo and differentiate a step with the same evaluations of the
    vector field.

    - `differentiates_control`: whether the gradient includes that through the controls of
        terms. Otherwise steps whose control is differentiated are made again.
    """

    differentiates_control: ClassVar[bool] = True

    @abc.abstractmethod
    def backward_step_and_pullback(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, _SolverState, Cotangent]:
        """Undo a step and pull a cotangent back through it.

        **Arguments:**

        - `combine`, `params`: `terms, args = combine(params)`. The gradient is with
            respect to `params`.
        - `t0`, `t1`, `y1`, `solver_state`: as for `backward_step`.
        - `cotangent`: the cotangent at `t1`, with the sum of `params` so far.
        - `dense_cotangent`: the cotangent of the `dense_info`, including the entries of
            `extra_dense_info`, or `None` if nothing was interpolated.

        **Returns:**

        The state, the solver state, and the cotangent, all at `t0`.
        """


class StepStart(NamedTuple):
    """The start of a step, if some element of a batch `needs` it, as undoing the step is
    not accurate enough.

    - `needs`: whether this element does.
    - `states`: a function that returns the state and the solver state there. Those of
        elements that do not need them are not used.
    - `end`: the state and the solver state at the end of the step, without what the solver
        recalls, which is of the start. `None` if the errors of the step are not wanted.
    """

    needs: BoolScalarLike
    states: Callable[[], tuple[Y, Any]]
    end: tuple[Y, Any] | None

    def of_chain(self, split: Callable[[Y, Any], Parts]) -> Start:
        """The start of a chain, whose parts are `split(y0, state0)`."""
        return Start(self.needs, lambda: split(*self.states()), self.end is not None)


class HasPullbackFromStart(HasPullback[_SolverState], Generic[_SolverState]):
    """A solver that can also differentiate a step from its start. For steps in which the
    flow contracts too much to be undone, or that begin at a kink of the vector field."""

    def backward_step_and_pullback(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, _SolverState, Cotangent]:
        step = combine, params, t0, t1, y1, solver_state, cotangent, dense_cotangent
        return self.pullback_from_start(*step, None)[:3]

    @abc.abstractmethod
    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, _SolverState, Cotangent, tuple[Y, _SolverState]]:
        """See `HasPullback`; from the `start`, if that is needed.

        Also returns the errors of the state and the solver state at `t1`, if the step was
        made again from its start and these are wanted, and zeros otherwise.
        """


def backward_step_and_pullback(
    solver: AbstractReversibleSolver,
    combine: Combine,
    params: Params,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y1: Y,
    solver_state: SolverState,
    cotangent: Cotangent,
    dense_cotangent: DenseInfo | None,
    start: StepStart | None = None,
) -> tuple[Y, SolverState, Cotangent, tuple[Y, SolverState]]:
    """See `HasPullbackFromStart`, for every solver. By default the step is made again from
    its start and differentiated."""
    step = combine, params, t0, t1
    bars = cotangent, dense_cotangent
    here = *step, y1, solver_state, *bars
    if isinstance(solver, HasPullbackFromStart):
        return solver.pullback_from_start(*here, start)

    def make():
        if start is None:
            terms, args = combine(params)
            begin = solver.backward_step(terms, t0, t1, y1, args, solver_state)
            end = y1, solver_state
        else:
            begin, end = start.states(), start.end
            assert end is not None
        pulled, made = pull_through_step(solver, *step, begin, *bars)
        return *begin, pulled, errors_at_end(end, made)

    if not isinstance(solver, HasPullback):
        return make()

    def undo():
        pulled = solver.backward_step_and_pullback(*here)
        return *pulled, tree_zeros_like((y1, solver_state))

    if start is None:
        return undo()
    return lax.cond(eqxi.unvmap_any(start.needs), make, undo)


def errors_at_end(
    end: tuple[Y, SolverState], made: tuple[Y, SolverState]
) -> tuple[Y, SolverState]:
    """The errors of the `end` of a step, from that of the step as `pull_through_step` has
    made it again."""
    return jtu.tree_map(jnp.subtract, eqx.filter(end, eqx.is_inexact_array), made)


def pull_through_step(
    solver: AbstractReversibleSolver,
    combine: Combine,
    params: Params,
    t0: RealScalarLike,
    t1: RealScalarLike,
    start: tuple[Y, SolverState],
    cotangent: Cotangent,
    dense_cotangent: DenseInfo | None,
    step_times: Callable[[Params], tuple[RealScalarLike, RealScalarLike]] | None = None,
) -> tuple[Cotangent, tuple[Y, SolverState]]:
    """Make a step from its start, and pull a cotangent back through it. Takes the memory of
    all its stages.

    - `start`: the state and the solver state at `t0`.
    - `cotangent`, `dense_cotangent`: as for `backward_step_and_pullback`.
    - `step_times`: `t0` and `t1` as a function of `params`, if they depend on them.

    Also returns the state and the floating-point arrays of the solver state at the end.
    """
    y0, state0 = start
    diff_state, nondiff_state = eqx.partition(state0, eqx.is_inexact_array)
    reads = dense_cotangent is not None

    def step(y: Y, diff_state: PyTree, params: Params):
        terms, args = combine(params)
        state = eqx.combine(diff_state, nondiff_state)
        times = (t0, t1) if step_times is None else step_times(params)
        made = advance_densely(solver, terms, *times, y, args, state, reads)
        y, _, dense_info, state, _ = made
        state = eqx.filter(state, eqx.is_inexact_array)
        return y, state, dense_info if reads else None

    bars = cotangent.y, cotangent.solver_state, dense_cotangent
    made, pulled = value_and_pullback(step, (y0, diff_state, params), bars)
    y_bar, state_bar, params_bar = pulled
    params_bar = tree_add(cotangent.params, params_bar)
    return Cotangent(y_bar, state_bar, params_bar), made[:2]
