"""The pull-back of the outputs of a solve, along the walk."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import (
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    Params,
    RealScalarLike,
    Y,
)
from .._diffrax import State
from .._members import value_and_pullback
from .._solver.pullback import Cotangent
from .._tree import tree_add, tree_select, tree_zeros_like, tree_zeros_of
from .outputs import Cursor, Output, Row
from .position import Position
from .shared import params_where
from .times import Times
from .walk import Walk


_Time = Callable[[Times], RealScalarLike]

# The number of outputs that are pulled back at once, and of their entries.
_at_once, _most_entries = 8, 4096


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
    shared = walk.shared
    if written is not True and shared is not None:
        # The members of a batch add to one sum.
        of_others = lambda y: jnp.where(written, y, shared.mean(y, written))
        y = jtu.tree_map(of_others, y)

    def save(y, params):
        context = walk.context(params)
        t, fn = time(context.times), context.save_fns[output.index]
        saved = y if fn is None else fn(t, y, context.args)
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
                row = output.sum_of_rows(first, count, no_steps)
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


def pull_dense(
    walk: Walk,
    position: Position,
    interpolated: list[int],
    dense_info: DenseInfo,
) -> tuple[DenseInfo, Cotangent, list[Cursor]]:
    """Pull back outputs of `SaveAt(ts=..., dense=...)`, interpolated within the step."""
    step, ends = position.step - 1, (position.clock.start, position.clock.end)
    if walk.dense_rows is None:
        dense_bar = tree_zeros_of(dense_info)
    else:
        dense_bar = jtu.tree_map(lambda rows: rows[step], walk.dense_rows)
    if walk.end_dense is not None:
        last = position.step == walk.residuals.count
        end_dense = jtu.tree_map(lambda e: jnp.where(last, e, 0), walk.end_dense)
        dense_bar = tree_add(dense_bar, end_dense)
    if (moves := position.moves) is not None:
        dense_bar = jtu.tree_map(lambda d: jnp.where(moves, d, 0), dense_bar)
    cursors = list(position.cursors)
    params_bar, in_step = position.cotangent.params, _in_step(position)
    for i in interpolated:
        output, cursor = walk.outputs[i], cursors[i]
        if is_linear(walk, output):
            dense_bar, cursors[i] = _pull_states(
                walk, output, in_step, ends, (dense_bar, cursor)
            )
        else:
            carry = dense_bar, params_bar, cursor
            dense_bar, params_bar, cursors[i] = _pull_ts(
                walk, output, in_step, (*ends, dense_info), carry
            )
    ct = dataclasses.replace(position.cotangent, params=params_bar)
    return dense_bar, ct, cursors


def is_linear(walk: Walk, output: Output) -> bool:
    """Whether an interpolated output is linear in the interpolation data, and depends on
    nothing else that is differentiated."""
    return output.saves_state and not walk.differentiates_times


def any_in_step(walk: Walk, position: Position, i: int) -> BoolScalarLike:
    """Whether an output of `SaveAt(ts=...)`, the `i`-th, was interpolated in a step."""
    ts = walk.outputs[i].sub.ts
    assert ts is not None
    return _any_left(ts, position.cursors[i], _in_step(position))


def _in_step(position: Position) -> Callable[[RealScalarLike], BoolScalarLike]:
    """Whether one of `ts` was written in the step that ends at a `position`: the first that
    ends at or after it."""
    moves = True if position.moves is None else position.moves
    is_first, last_end = position.step == 1, position.clock.previous_end
    return lambda t: moves & (is_first | (t > last_end))


def _pull_ts(
    walk: Walk,
    output: Output,
    in_step: Callable[[RealScalarLike], BoolScalarLike],
    interpolation: tuple[RealScalarLike, RealScalarLike, DenseInfo],
    carry: tuple[DenseInfo, Params, Cursor],
) -> tuple[DenseInfo, Params, Cursor]:
    """Pull back every remaining output of `SaveAt(ts=...)` in the step."""
    t0, t1, dense_info = interpolation
    ts = output.sub.ts
    assert ts is not None

    def more(carry):
        some = _any_left(ts, carry[-1], in_step)
        # What the members of a batch share has a single sum, to which those that wait add
        # nothing.
        return some if walk.shared is None else eqxi.unvmap_any(some)

    def pull(carry):
        dense_bar, params_bar, cursor = carry
        here = walk.shared is None or _any_left(ts, cursor, in_step)
        back = jnp.where(here, 1, 0)
        cursor = Cursor(cursor.save_index - back, cursor.ts_index - back)

        def time(times):
            ts = times.ts[output.index]
            assert ts is not None
            return jnp.where(here, ts[cursor.ts_index], t1)

        def evaluate(dense_info, params):
            times = walk.context(params).times
            ends = dict(t0=times.of(t0), t1=times.of(t1))
            interpolation = walk.problem.solver.interpolation_cls(**ends, **dense_info)
            return interpolation.evaluate(time(times))

        y = evaluate(dense_info, walk.params)
        row = output.row(cursor.save_index, here)
        y_bar, params_bar = pull_output(walk, output, row, time, y, params_bar, here)
        if walk.differentiates_times:
            _, pull = jax.vjp(evaluate, dense_info, walk.params)
            new_bar, more_bar = pull(y_bar)
            params_bar = tree_add(params_bar, more_bar)
        else:
            new_bar = _transpose(lambda info: evaluate(info, walk.params), dense_bar, y_bar)
        return tree_add(dense_bar, new_bar), params_bar, cursor

    return lax.while_loop(more, pull, carry)


def _pull_states(
    walk: Walk,
    output: Output,
    in_step: Callable[[RealScalarLike], BoolScalarLike],
    ends: tuple[RealScalarLike, RealScalarLike],
    carry: tuple[DenseInfo, Cursor],
) -> tuple[DenseInfo, Cursor]:
    """As `_pull_ts`, if the interpolated states are saved as they are. Small ones are
    pulled back several at a time, as each turn of the loop has a fixed cost."""
    t0, t1 = ends
    ts = output.sub.ts
    assert ts is not None
    entries = sum(rows[:1].size for rows in jtu.tree_leaves(output.rows))
    count = min(len(ts), max(1, min(_at_once, _most_entries // max(entries, 1))))

    def more(carry):
        return _any_left(ts, carry[-1], in_step)

    def pull(carry):
        dense_bar, cursor = carry
        first = jnp.maximum(cursor.ts_index - count, 0)
        times = lax.dynamic_slice_in_dim(ts, first, count)
        # As `ts` are in order, those of the step are the last ones.
        here = (first + jnp.arange(count) < cursor.ts_index) & in_step(times)
        _, rows = output.rows_from(first + cursor.save_index - cursor.ts_index, here)

        def evaluate(dense_info):
            interpolation = walk.problem.solver.interpolation_cls(
                t0=t0, t1=t1, **dense_info
            )
            # Others may lie so far away that polynomials overflow.
            return jax.vmap(interpolation.evaluate)(jnp.where(here, times, t1))

        new_bar = _transpose(evaluate, dense_bar, rows)
        pulled = jnp.sum(here)
        cursor = Cursor(cursor.save_index - pulled, cursor.ts_index - pulled)
        return tree_add(dense_bar, new_bar), cursor

    return lax.while_loop(more, pull, carry)


def _any_left(
    ts: Array, cursor: Cursor, in_step: Callable[[RealScalarLike], BoolScalarLike]
) -> BoolScalarLike:
    """Whether the last of `ts` that is still to be pulled back is in the step."""
    i = cursor.ts_index - 1
    return (i >= 0) & in_step(ts[jnp.maximum(i, 0)])


def _transpose(fn: Callable[[DenseInfo], Y], like: DenseInfo, y_bar: Y) -> DenseInfo:
    """The transpose of a function that is linear where its data are finite."""
    # Any point will do. `jax.linear_transpose` does not support loops over linear
    # functions, as in `jnp.polyval`, before JAX 0.7.
    anywhere = jtu.tree_map(jnp.zeros_like, like)
    _, pull = jax.vjp(fn, anywhere)
    (bar,) = pull(y_bar)
    return bar


def _take(
    position: Position, i: int, count: IntScalarLike
) -> tuple[Position, IntScalarLike]:
    """Move the cursor of the `i`-th output back by `count` outputs."""
    save_index = position.cursors[i].save_index - count
    return eqx.tree_at(lambda p: p.cursors[i].save_index, position, save_index), save_index
