"""The pull-back of the outputs of a solve, along the walk."""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import BoolScalarLike, IntScalarLike, Params, RealScalarLike, Y
from .._diffrax import State
from .._members import value_and_pullback
from .._solver.cotangent import Cotangent
from .._tree import tree_add, tree_select, tree_zeros_like
from .close import as_arrays
from .outputs import Output, Row
from .position import Position
from .shared import params_where
from .times import Times
from .walk import Walk


_Time = Callable[[Times], RealScalarLike]


def pull_output(
    walk: Walk,
    output: Output,
    row: Row,
    time: _Time,
    y: Y,
    params_cotangent: Params,
    written: BoolScalarLike,
) -> tuple[Y, Params]:
    """Pull the cotangent of one output, zero unless it was `written`, back to the state it
    was computed from. At states that were not saved, functions may not be finite."""
    t_bar, saved_bar = row
    if output.saves_state and t_bar is None:
        return saved_bar, params_cotangent
    shared, lent = walk.shared, None
    if written is not True and shared is not None:
        # The members of a batch add to one sum. So `fn` has to be finite for all of them,
        # as it is where one of them has evaluated it.
        t = time(walk.context(walk.params).times)
        y, lent = shared.lend((y, t), written)
        walk = walk.for_outputs(written)

    def save(y, params):
        context = walk.context(params)
        t, fn = time(context.times), context.save_fns[output.index]
        at = t if lent is None else jnp.where(written, t, lent)
        # A constant need not be an array.
        saved = y if fn is None else as_arrays(fn(at, y, context.args))
        return None if t_bar is None else t, eqx.filter(saved, eqx.is_inexact_array)

    _, (y_bar, params_bar) = value_and_pullback(save, (y, walk.params), row)
    params_bar = tree_add(params_cotangent, params_bar)
    if written is not True:
        y_bar = tree_select(written, y_bar, tree_zeros_like(y_bar))
        params_bar = params_where(shared, written, params_bar, params_cotangent)
    return y_bar, params_bar


def pull_into_state(
    walk: Walk,
    position: Position,
    output: Output,
    row: Row,
    time: _Time,
    written: BoolScalarLike = True,
) -> Position:
    """As `pull_output`, for an output of the state at the `position`."""
    y, ct = position.y, position.cotangent
    y_bar, params_bar = pull_output(walk, output, row, time, y, ct.params, written)
    ct = Cotangent(tree_add(ct.y, y_bar), ct.solver_state, params_bar)
    growth = position.growth
    if growth is not None:
        growth = growth.expect(y_bar)
    return dataclasses.replace(position, cotangent=ct, growth=growth)


def pull_last(walk: Walk, position: Position) -> Position:
    """Pull back outputs written after the last step, unless an event is located: those of
    `SaveAt(t1=True)`, and of `SaveAt(ts=...)` if `t0 == t1`."""
    problem, end = walk.problem, walk.residuals.end
    if problem.finds_roots:
        return position
    no_steps = problem.t0 == problem.t1
    for output, cursor in zip(walk.outputs, position.cursors, strict=True):
        sub, save_index = output.sub, cursor.save_index
        if sub.ts is not None and len(sub.ts) > 0:
            first, count = save_index, len(sub.ts)

            def pull_ts(position, output=output, first=first, count=count):
                rows = output.rows_from(first, jnp.full(count, no_steps))
                row = jtu.tree_map(ft.partial(jnp.sum, axis=0), rows)
                time = lambda times: times.t0
                return pull_into_state(walk, position, output, row, time, no_steps)

            position = lax.cond(
                eqxi.unvmap_any(no_steps), pull_ts, lambda position: position, position
            )
            save_index = save_index + jnp.where(no_steps, count, 0)
        if sub.t1 and sub.steps != 1:
            written = True
            if sub.steps > 1:
                written = end.num_accepted_steps % sub.steps != 0
            row = output.row(save_index, written)
            time = lambda times: times.of(end.tprev)
            position = pull_into_state(walk, position, output, row, time, written)
    return position


def pull_start(walk: Walk, position: Position) -> Position:
    """Pull back outputs written before the first step."""
    for output in walk.outputs:
        if output.sub.t0:
            position = pull_into_state(
                walk, position, output, output.row(0), lambda times: times.t0
            )
    return position


def pull_step_outputs(walk: Walk, position: Position, t1: RealScalarLike) -> Position:
    """Pull back outputs of `SaveAt(steps=n)`, written at the end of a step."""
    for i, output in enumerate(walk.outputs):
        steps = output.sub.steps
        if steps == 0:
            continue
        written = True if steps == 1 else position.step % steps == 0
        if position.moves is not None:
            written &= position.moves
        position, save_index = _take(position, i, jnp.where(written, 1, 0))
        row, time = output.row(save_index, written), lambda times: times.of(t1)
        position = pull_into_state(walk, position, output, row, time, written)
    return position


def pull_dense_times(walk: Walk, position: Position, cotangent: State) -> Position:
    """Pull back the times between which dense output interpolates."""
    leaves = jtu.tree_leaves(cotangent.dense_ts)
    if not walk.differentiates_times or len(leaves) == 0:
        return position
    (ts_bar,) = leaves
    ts = walk.residuals.end.dense_ts
    assert ts is not None
    written = jnp.arange(len(ts)) <= walk.residuals.count

    def dense_ts(params):
        return walk.context(params).times.of(ts)

    _, pull = jax.vjp(dense_ts, walk.params)
    (params_bar,) = pull(jnp.where(written, ts_bar, 0))
    params_bar = tree_add(position.cotangent.params, params_bar)
    return eqx.tree_at(lambda p: p.cotangent.params, position, params_bar)


def _take(
    position: Position, i: int, count: IntScalarLike
) -> tuple[Position, IntScalarLike]:
    """Move the cursor of the `i`-th output back by `count` outputs."""
    save_index = position.cursors[i].save_index - count
    return eqx.tree_at(lambda p: p.cursors[i].save_index, position, save_index), save_index
