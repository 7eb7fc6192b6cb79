"""The pull-back of outputs that are interpolated within a step."""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._custom_types import BoolScalarLike, DenseInfo, Params, RealScalarLike, Y
from .._solver.cotangent import Cotangent
from .._tree import tree_add, tree_zeros_of
from .outputs import Cursor, Output
from .position import Position
from .pull_outputs import pull_output
from .walk import Walk


# The number of outputs that are pulled back at once, and of their entries.
_at_once, _most_entries = 8, 4096


def dense_cotangent(walk: Walk, position: Position, dense_info: DenseInfo) -> DenseInfo:
    """The cotangent of the interpolation data of the step that ends at a `position`, as
    `SaveAt(dense=True)` or an event have it, of which `dense_info` are the shapes."""
    if not walk.with_dense:
        return tree_zeros_of(dense_info)
    step = position.step - 1
    if walk.dense_rows is None:
        dense_bar = tree_zeros_of(dense_info)
    else:
        dense_bar = jtu.tree_map(lambda rows: rows[step], walk.dense_rows)
    if walk.end_dense is not None:
        last = position.step == walk.residuals.count
        end_dense = jtu.tree_map(lambda e: jnp.where(last, e, 0), walk.end_dense)
        dense_bar = tree_add(dense_bar, end_dense)
    # A member of a batch without any step may have NaN, as it has no interpolation.
    moves = position.step > 0
    if position.moves is not None:
        moves &= position.moves
    return jtu.tree_map(lambda d: jnp.where(moves, d, 0), dense_bar)


def pull_dense(
    walk: Walk,
    position: Position,
    interpolated: list[int],
    dense_info: DenseInfo,
    dense_bar: DenseInfo,
    whole: Position | None = None,
) -> tuple[DenseInfo, Cotangent, list[Cursor]]:
    """Pull back outputs of `SaveAt(ts=...)`, interpolated within the step.

    - `dense_info`: the interpolation data of the `whole` step, if the step that ends at the
        `position` is a part of one. The cotangent is of those of the part.
    - `dense_bar`: the cotangent so far.
    """
    ends = position.clock.start, position.clock.end
    clock = position.clock if whole is None else whole.clock
    longer = clock.start, clock.end, dense_info
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
                walk, output, in_step, ends, longer, carry
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
    ends: tuple[RealScalarLike, RealScalarLike],
    longer: tuple[RealScalarLike, RealScalarLike, DenseInfo],
    carry: tuple[DenseInfo, Params, Cursor],
) -> tuple[DenseInfo, Params, Cursor]:
    """Pull back every remaining output of `SaveAt(ts=...)` in the step with these `ends`.
    Their states are those of the same or a `longer` step, with its interpolation data."""
    *longer_ends, dense_info = longer
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
            return jnp.where(here, ts[cursor.ts_index], ends[1])

        def evaluate(ends, dense_info, params):
            times = walk.context(params).times
            ends = dict(zip(("t0", "t1"), map(times.of, ends), strict=True))
            interpolation = walk.problem.solver.interpolation_cls(**ends, **dense_info)
            return interpolation.evaluate(time(times))

        row = output.row(cursor.save_index, here)
        if walk.differentiates_times:
            evaluate_here = ft.partial(evaluate, ends)
            y, pull_back = jax.vjp(evaluate_here, dense_info, walk.params)
            y_bar, params_bar = pull_output(walk, output, row, time, y, params_bar, here)
            new_bar, more_bar = pull_back(y_bar)
            params_bar = tree_add(params_bar, more_bar)
        else:
            y = evaluate(longer_ends, dense_info, walk.params)
            y_bar, params_bar = pull_output(walk, output, row, time, y, params_bar, here)
            linear = lambda info: evaluate(ends, info, walk.params)
            new_bar = _transpose(linear, dense_bar, y_bar)
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
