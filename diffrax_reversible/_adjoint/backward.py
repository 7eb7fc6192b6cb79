"""The backward pass: undo the steps of a solve and pull cotangents back through them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import BoolScalarLike, IntScalarLike, Params
from .._diffrax import State
from .._solver.pullback import Cotangent
from .._tree import tree_add, tree_zeros_like
from .batch import Sharing
from .between_steps import go_on, params_of, with_params
from .drift import replay_tolerance, tolerance
from .finish import pull_finish, PulledFinish
from .forward import Residuals
from .kept import Kept
from .outputs import Cursor, materialise
from .problem import Inputs, Problem, save_states, sub_saveats
from .pull_outputs import (
    pull_dense_times,
    pull_last,
    pull_start,
)
from .replay import Replayer
from .shared import Shared
from .spread import many
from .undo_steps import undo_steps
from .walk import Position, Walk


def _pull_init(walk: Walk, position: Position) -> Position:
    """Pull the cotangent of the first solver state back, unless that was passed.

    `init` is called again here, so that its activations need not be stored.
    """
    problem, ct = walk.problem, position.cotangent
    if problem.passed_solver_state:
        return position

    def init(y, params):
        context = walk.context(params)
        step = context.times.t0, context.times.of(problem.init_state.tnext)
        state = problem.solver.init(context.terms, *step, y, context.args)
        return eqx.filter(state, eqx.is_inexact_array)

    _, pull = jax.vjp(init, position.y, walk.params)
    y_bar, params_bar = pull(ct.solver_state)
    state_bar = tree_zeros_like(ct.solver_state)
    ct = Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
    return eqx.tree_at(lambda p: p.cotangent, position, ct)


def _walk(walk: Walk, end: Position) -> Position:
    """The whole walk, from the `end` to the start.

    Restarts and known states are handled outside the loop over steps. If the gradient grows
    where the solution contracts, the walk begins once more, see `Growth.spoils`.
    """
    position = walk.start(end, jnp.array(False))
    meter = walk.problem.progress_meter.init()
    position = dataclasses.replace(position, meter=meter)
    kept = dataclasses.replace(walk.residuals.kept, rest=None)

    def segment(position, kept):
        return go_on(walk, undo_steps(walk, position, kept), kept)

    def finish(position):
        return _pull_init(walk, pull_start(walk, position))

    if not walk.stops:
        # Without an outer loop, fewer states are in memory.
        return finish(segment(position, kept)[0])

    def on_the_way(carry):
        return carry[2] < 2

    def go(carry):
        position, kept, walks = carry
        position, kept = segment(position, kept)
        some_wait = eqxi.unvmap_any(jnp.logical_not(position.done))
        # With the branches in the other order, XLA holds two more copies of the parameters.
        position, walks = lax.cond(
            jnp.logical_not(some_wait),
            lambda: _once_more(walk, end, finish(position), kept, walks == 0),
            lambda: (position, walks),
        )
        return position, kept, walks

    return lax.while_loop(on_the_way, go, (position, kept, jnp.array(0)))[0]


def _once_more(
    walk: Walk, end: Position, position: Position, kept: Kept, first: BoolScalarLike
) -> tuple[Position, IntScalarLike]:
    """The position at the start of the solve, or the `end` if some element of the batch has
    to begin once more after its `first` walk; and the number of walks that are done."""
    if walk.departure is None:
        return position, jnp.array(2)
    record = kept.record
    assert record is not None
    grown = walk.has_grown(position)
    again = first & eqxi.unvmap_any(grown)
    # Some of what was held and recorded is lost.
    there = record.reaches(end.step, walk.residuals.count - 1)
    begin = lambda: dataclasses.replace(
        walk.start(end, grown),
        stop=jnp.where(there, end.stop, end.step),
        undone=position.undone,
        replayed=position.replayed,
        meter=position.meter,
    )
    without = lambda position: with_params(position, (None, None))
    params = jtu.tree_map(
        lambda b, p: jnp.where(again, b, p), params_of(begin()), params_of(position)
    )
    # Selected apart: in the conditional, XLA holds another copy of the parameters.
    position = lax.cond(again, lambda: without(begin()), lambda: without(position))
    return with_params(position, params), jnp.where(again, 1, 2)


class Walked(NamedTuple):
    """The results of a backward pass.

    - `gradient`: the cotangent of the inputs.
    - `drifts`: the largest errors of the reconstruction at known states.
    - `shares`: the fractions of the gradient that grew where the solution contracts.
    - `undone`, `replayed`: the numbers of steps undone and replayed.
    - `restarted`: the number of restarts of the backward pass.
    - `shared`: what of `gradient.context` is summed over a batch.
    """

    gradient: Inputs
    drifts: list[Float[Array, ""]]
    shares: list[Float[Array, ""]]
    undone: IntScalarLike
    replayed: IntScalarLike
    restarted: IntScalarLike
    shared: Shared | None


def walk_back(
    inputs: Inputs,
    perturbed: Inputs,
    problem: Problem,
    residuals: Residuals,
    cotangent: State,
    sharing: Sharing,
    drift_tol: float | None,
    watch: Callable[[dict[str, Any]], None] | None,
) -> Walked:
    """Undo every step of a solve, and pull the cotangent of its outputs back.

    **Arguments:**

    - `inputs`, `problem`: the solve.
    - `perturbed`: which leaves of `inputs` are differentiated.
    - `residuals`: the residuals from `solve_and_record`.
    - `cotangent`: the cotangent of the final state, with `None` for zero.
    - `sharing`: the arrays of `inputs` that the members of a batch share.
    - `drift_tol`: the accepted error at known states. Where states can be held in between,
        the steps are undone again before a larger error is reported.
    - `watch`: a function called at every known state.
    """
    params, nondiff = eqx.partition(inputs.context, perturbed.context)
    with_times = any(jtu.tree_leaves(perturbed.context.times))
    sums = not with_times and _sums(inputs, problem, params)
    shared = Shared.of(sharing, inputs, perturbed) if sums else None
    pulled = pull_finish(
        inputs, params, nondiff, shared, problem, residuals, cotangent, with_times
    )
    dense_rows = None
    if len(jtu.tree_leaves(cotangent.dense_infos)) > 0:
        dense_rows = materialise(cotangent.dense_infos, residuals.dense_structs)
    walk = Walk(
        inputs,
        problem,
        residuals,
        Replayer(inputs, problem),
        pulled.outputs,
        dense_rows,
        pulled.end_dense,
        params,
        nondiff,
        with_times,
        any(jtu.tree_leaves((perturbed.y0, perturbed.solver_state))),
        tolerance(drift_tol, (inputs.y0, inputs.solver_state)),
        replay_tolerance(drift_tol, (inputs.y0, inputs.solver_state)),
        watch,
        shared,
    )
    position = _at_the_end(residuals, cotangent, pulled)
    position = pull_last(walk, position)
    position = pull_dense_times(walk, position, cotangent)
    position = _walk(walk, position)
    problem.progress_meter.close(position.meter)
    return _walked(walk, position)


def _sums(inputs: Inputs, problem: Problem, params: Params) -> bool:
    """Whether to sum the cotangents of what the members of a batch share.

    Not those of a few parameters, which take little memory, and of which `Spread` has to
    know what each element has added. Nor with functions of interpolated outputs, which
    every element evaluates in a loop of its own.
    """
    pairs = zip(sub_saveats(problem.saveat), inputs.context.save_fns, strict=True)
    evaluates = any(sub.ts is not None and fn is not None for sub, fn in pairs)
    return many(params) and not evaluates


def _at_the_end(residuals: Residuals, cotangent: State, pulled: PulledFinish) -> Position:
    """The position at which the walk begins."""
    record, checkpoints, end = residuals.record, residuals.kept.checkpoints, residuals.end
    assert checkpoints is not None
    saved = [save_states(end)[output.index] for output in pulled.outputs]
    return Position(
        residuals.count,
        record.clock(end),
        end.y,
        end.solver_state,
        Cotangent(
            tree_add(materialise(cotangent.y, end.y), pulled.y),
            materialise(cotangent.solver_state, end.solver_state),
            pulled.params,
        ),
        [Cursor(s.save_index, s.saveat_ts_index) for s in saved],
        jnp.logical_not(record.restarted),
        record.restarted,
        jnp.array(False),
        jnp.maximum(checkpoints.step_before(residuals.count), record.first),
        None,
    )


def _walked(walk: Walk, position: Position) -> Walked:
    """The results, from the position at which the walk ended."""
    ct, drifts = position.cotangent, position.drifts
    assert drifts is not None
    if position.params_cotangent is not None:
        params_bar = tree_add(position.params_cotangent, ct.params)
        ct = dataclasses.replace(ct, params=params_bar)
    if len(drifts) > 0:
        # The tolerance of the state bounds errors in time too; NaN refuses an unfinished
        # walk.
        last = jnp.where(position.done, position.clock.drift, jnp.nan)
        drifts = [*drifts, last.astype(drifts[0].dtype)]
    shares, restarted = walk.shares(position), jnp.array(0)
    if (growth := position.growth) is not None:
        matters = growth.matters(ct.params)
        shares = [jnp.where(matters, share, 0) for share in shares]
        restarted = growth.restarts
    params_bar, shared = ct.params, walk.shared
    if shared is not None:
        params_bar = shared.check(params_bar)
    gradient = Inputs(ct.y, ct.solver_state, params_bar)
    counts = position.undone, position.replayed, restarted
    return Walked(gradient, drifts, shares, *counts, shared)
