"""The pull-back of a step that is undone."""

import abc
from collections.abc import Callable
from typing import Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

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
from .._tree import tree_add, tree_zeros_like
from .base import AbstractReversibleSolver
from .capabilities import advance_densely


_SolverState = TypeVar("_SolverState")


class Probe(eqx.Module):
    """What a pull-back through the vector field tells about the flow, near the start of a
    step. All but `control` has the structure of the state.

    - `vf_bar`: a cotangent of the vector field.
    - `pulled`: what it is pulled back to.
    - `control`: the length of the step.
    - `y_bar`: the cotangent of the state there, of a solve that begins there.
    - `outputs`: the cotangents of what was interpolated in the step, summed in magnitude.
    """

    vf_bar: VF
    pulled: Y
    control: RealScalarLike
    y_bar: Y
    outputs: Y


class Cotangent(eqx.Module):
    """The cotangent of everything that a step is a function of.

    - `y`, `solver_state`: as the state and the solver state, with `None` for leaves that
        are not floating-point arrays.
    - `params`: as the differentiated leaves of `(terms, args)`; the sum over all the
        steps walked back so far.
    - `probe`: of the step that was pulled back, if the solver has one without evaluations
        of its own.
    """

    y: Y
    solver_state: SolverState
    params: Params
    probe: Probe | None = None


class Start(eqx.Module):
    """The very state and solver state that a step began with, if that `is_known`, as it is
    where the solve began. If not, then others of the same shapes.

    Reconstructed states are off by rounding, which is as good as any other side of a kink
    of the vector field, or of a quotient that is guarded where it is zero over zero; but
    solves often begin at one.
    """

    is_known: BoolScalarLike
    y: Y
    solver_state: SolverState

    def choose(
        self,
        known: PyTree[Array],
        reconstructed: PyTree[Array],
        where: BoolScalarLike = True,
    ) -> PyTree[Array]:
        """What was made of the known start, if it is one, and else, or not `where`, what
        was reconstructed."""
        pred = jnp.logical_and(self.is_known, where)
        return jtu.tree_map(lambda k, r: jnp.where(pred, k, r), known, reconstructed)


class HasPullback(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can undo and differentiate a step with the same evaluations of the
    vector field."""

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
        start: Start | None = None,
    ) -> tuple[Y, _SolverState, Cotangent]:
        """Undo a step and pull a cotangent back through it.

        **Arguments:**

        - `combine`, `params`: `terms, args = combine(params)`. The gradient is with
            respect to `params`.
        - `t0`, `t1`, `y1`, `solver_state`: as for `backward_step`.
        - `cotangent`: at `t1`, with the sum of `params` so far.
        - `dense_cotangent`: the cotangent of the `dense_info`, with what is extra of it, or
            `None` where nothing was interpolated.
        - `start`: the start of the step, which may be known. It serves to evaluate the
            vector field there, and not to reconstruct it, as that is a check of the walk.

        **Returns:**

        The state, the solver state, and the cotangent, all at `t0`.
        """


class HasProbe(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can tell how cotangents are pulled back where a step begins."""

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
        """By which gradients are told that grow where the solution contracts.

        `None` if there is nothing to tell, and nothing is refused for that.

        **Arguments:**

        - `combine`, `params`: `terms, args = combine(params)`.
        - `t0`, `t1`, `y0`: the step, and the state that it begins with.
        - `cotangent`: at `t0`.
        - `dense_cotangent`: that of what was interpolated in the step.
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
    start: Start | None = None,
) -> tuple[Y, SolverState, Cotangent]:
    """See `HasPullback`. By default the step is made again, and differentiated."""
    step = combine, params, t0, t1, y1, solver_state
    if isinstance(solver, HasPullback):
        return solver.backward_step_and_pullback(*step, cotangent, dense_cotangent, start)
    y0, solver_state0, _, pull = linearise_step(solver, *step, start)
    return y0, solver_state0, pull(cotangent, dense_cotangent)


def linearise_step(
    solver: AbstractReversibleSolver,
    combine: Combine,
    params: Params,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y1: Y,
    solver_state: SolverState,
    start: Start | None = None,
    step_times: Callable[[Params], tuple[RealScalarLike, RealScalarLike]] | None = None,
) -> tuple[Y, SolverState, DenseInfo, Callable[[Cotangent, DenseInfo | None], Cotangent]]:
    """Undo a step, make it again, and return what it interpolated with and its pull-back.

    It is made again from its `start`, if that is known. If `t0` and `t1` depend on
    `params`, then `step_times` says how. Costs a backward step, a step, and the memory of
    all the stages of a step.
    """
    terms, args = combine(params)
    y0, solver_state0 = solver.backward_step(terms, t0, t1, y1, args, solver_state)
    origin = y0, solver_state0
    if start is not None:
        origin = start.choose((start.y, start.solver_state), origin)
    diff_state, nondiff_state = eqx.partition(origin[1], eqx.is_inexact_array)

    def step(y: Y, diff_state: PyTree, params: Params):
        terms, args = combine(params)
        state = eqx.combine(diff_state, nondiff_state)
        times = (t0, t1) if step_times is None else step_times(params)
        y, _, dense_info, state, _ = advance_densely(solver, terms, *times, y, args, state)
        return y, eqx.filter(state, eqx.is_inexact_array), dense_info

    outputs, pull_step = eqx.filter_vjp(step, origin[0], diff_state, params)
    _, _, dense_info = outputs

    def pull(cotangent: Cotangent, dense_cotangent: DenseInfo | None) -> Cotangent:
        if dense_cotangent is None:
            dense_cotangent = tree_zeros_like(dense_info)
        y, state, params = pull_step((cotangent.y, cotangent.solver_state, dense_cotangent))
        return Cotangent(y, state, tree_add(cotangent.params, params))

    return y0, solver_state0, dense_info, pull
