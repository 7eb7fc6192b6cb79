"""The pull-back of a step that the backward pass undoes."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._custom_types import (
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    SolverState,
    VF,
    Y,
)
from .._members import value_and_pullback
from .._tree import tree_add, tree_zeros_like
from .base import AbstractReversibleSolver
from .capabilities import advance_densely
from .chain import Parts
from .chain_again import Start


_SolverState = TypeVar("_SolverState")


class Probe(eqx.Module):
    """A pull-back through the vector field near the start of a step, from which the adjoint
    estimates growth. All fields except `control` have the structure of the state.

    - `vf_bar`: a cotangent of the vector field.
    - `pulled`: its pull-back to the state.
    - `control`: the length of the step.
    - `y_bar`: the cotangent of the state there, for a solve that begins there.
    - `outputs`: the sum of the magnitudes of the cotangents of the interpolation data of
        the step.
    - `first`, `second`: the cotangents, exactly at the start of the step, of the state, as
        in `y_bar`, which may be estimated, and of the second approximation that the solver
        carries, in the units of `y_bar`.
    """

    vf_bar: VF
    pulled: Y
    control: RealScalarLike
    y_bar: Y
    outputs: Y
    first: Y
    second: Y


class Cotangent(eqx.Module):
    """The cotangent of all inputs of a step.

    - `y`, `solver_state`: cotangents of the state and the solver state, with `None` for
        leaves that are not floating-point arrays.
    - `params`: the cotangent of the differentiated leaves of `(terms, args)`, summed over
        all steps undone so far.
    - `probe`: the probe of the step, if the solver obtains one without extra evaluations.
    """

    y: Y
    solver_state: SolverState
    params: Params
    probe: Probe | None = None

    def where(self, pred: BoolScalarLike) -> "Cotangent":
        """This one where `pred`, and zero otherwise, except that of `params`."""
        states = self.y, self.solver_state
        y, state = jtu.tree_map(lambda x: jnp.where(pred, x, 0), states)
        return dataclasses.replace(self, y=y, solver_state=state)


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


class Departure(NamedTuple):
    """The distance of the second approximation from the first after a step of `y' = λ y`
    that began with both equal: about `coefficient * |h λ|**power` times `y`. The first one
    does not grow if `-stable < h λ < 0`."""

    coefficient: float
    power: int
    stable: float

    @staticmethod
    def of(
        distance: float, power: int, amplify: Callable[[np.ndarray], np.ndarray]
    ) -> "Departure":
        """From the distance after a step with `h λ = -2`, as smaller steps add little, and
        larger ones are hardly stable; and from the first approximation after a step."""
        z = np.linspace(0, 20, 2001)
        grows = np.abs(amplify(-z)) > 1 + 1e-9
        stable = z[np.argmax(grows)] if np.any(grows) else z[-1]
        return Departure(float(abs(distance)) / 2**power, power, float(stable))


class HasProbe(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can pull a cotangent back through the vector field at the start of a
    step."""

    @property
    def departure(self) -> Departure | None:
        """How far the second approximation departs from the first in a step. `None` if the
        backward pass cannot restart in place of the solve."""
        return None

    def with_other_derivatives(
        self, where: BoolScalarLike
    ) -> "AbstractReversibleSolver | None":
        """A solver with the same steps, whose derivatives `where` this is wanted are those
        of a less accurate method: two gradients that are both accurate agree. `None` if
        there is no such method."""
        del where
        return None

    @abc.abstractmethod
    def probe(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> Probe | None:
        """A probe to detect gradients that grow where the solution contracts.

        `None` if the solver has no `departure`; no error is then raised for them.

        **Arguments:**

        - `combine`, `params`: `terms, args = combine(params)`.
        - `t0`, `t1`, `y0`: the step, and the state at its start.
        - `cotangent`: the cotangent at `t0`.
        - `dense_cotangent`: the cotangent of the interpolation data of the step.
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
