"""The ends of the steps of a solve, recorded, or recomputed in the backward pass."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController
from jaxtyping import Array, Float, PyTree, Shaped, UInt8

from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .._diffrax import State
from .._tree import tree_cond, tree_select
from .clock import Clock, Ends


# Its annotations are narrower than what it accepts.
_write = cast(Callable[..., Array], eqxi.buffer_at_set)

# The record always has room for so many steps, and for more if Diffrax's default adjoint
# takes as much memory, see `room_for_residuals`.
_least_rows = 256
_most_rows = 1 << 14
# Stands in for `max_steps=None`.
_without_bound = 1 << 16

_restarted, _crossed = 1, 2


def _is_buffer(x: Any) -> bool:
    return hasattr(x, "shape")


def room_for_residuals(y: Y, t: RealScalarLike, max_steps: int | None) -> int:
    """The bytes that `diffrax.RecursiveCheckpointAdjoint` takes for its checkpoints.

    By default that has `n` of them with `n (n + 3) / 2 >= max_steps`. Each stores the
    state, its derivative, and about eight numbers: times, counters, and the state of the
    controller.
    """
    steps = _without_bound if max_steps is None else max_steps
    count = math.floor(math.sqrt(2 * steps + 0.25) - 1.5) + 1
    state = sum(jnp.asarray(x).nbytes for x in jtu.tree_leaves(y))
    return count * (2 * state + 8 * jnp.asarray(t).itemsize)


class Record(eqx.Module):
    """The steps from `first` to before `count`, and the restarts and jumps between them.

    The rows are a ring buffer: a longer solve overwrites the oldest steps. If steps are
    recomputed, no times are recorded, and without restarts and jumps nothing is recorded or
    overwritten.

    - `starts`: the starts of steps. Each step ends at the start of the next, unless there
        are jumps.
    - `previous_ends`: the end of the step before each, if there may be jumps.
    - `flags`: whether a restart or a jump precedes each step, if there may be any.
    - `scalars`: the values that the solver records, see `HasRecord`.
    - `restarted`, `crossed`: the flags of the next step.
    - `last_end`: the end of the last step.
    - `torn`: whether a step did not start at the end of the last one, without a jump.
    - `outermost`: the first and the last step, if steps are recomputed. They may differ
        from those that the controller chose.
    - `restartable`, `with_jumps`: whether there may be restarts, and jumps.
    """

    starts: eqxi.MaybeBuffer[Float[Array, " rows"]] | None
    previous_ends: eqxi.MaybeBuffer[Float[Array, " rows"]] | None
    flags: eqxi.MaybeBuffer[UInt8[Array, " rows"]] | None
    scalars: PyTree[eqxi.MaybeBuffer[Shaped[Array, " rows"]]]
    first: IntScalarLike
    count: IntScalarLike
    restarted: BoolScalarLike
    crossed: BoolScalarLike
    last_end: RealScalarLike
    torn: BoolScalarLike
    outermost: tuple[Ends, Ends] | None
    restartable: bool = eqx.field(static=True)
    with_jumps: bool = eqx.field(static=True)

    @staticmethod
    def allocate(
        t0: RealScalarLike,
        scalars: PyTree[jax.ShapeDtypeStruct],
        restartable: bool,
        with_jumps: bool,
        recomputed: bool,
        max_steps: int | None,
        room: int,
    ) -> "Record":
        """An empty record at the start of a solve.

        **Arguments:**

        - `restartable`, `with_jumps`: whether there may be restarts, and jumps.
        - `room`: the bytes that the record may take, if these suffice for a few hundred
            steps.
        """
        t, with_flags = jnp.asarray(t0), restartable or with_jumps
        time = jax.ShapeDtypeStruct((), t.dtype)
        rows = dict(
            starts=None if recomputed else time,
            previous_ends=time if with_jumps and not recomputed else None,
            flags=jax.ShapeDtypeStruct((), jnp.uint8) if with_flags else None,
            scalars=scalars,
        )
        row_bytes = sum(x.dtype.itemsize for x in jtu.tree_leaves(rows))
        count = max(_least_rows, min(_most_rows, room // max(row_bytes, 1)))
        if max_steps is not None:
            count = max(1, min(count, max_steps))
        rows = jtu.tree_map(lambda x: jnp.zeros(count, x.dtype), rows)
        no, zero = jnp.array(False), jnp.array(0)
        ends = Ends(t, t)
        return Record(
            **rows,
            first=zero,
            count=zero,
            restarted=no,
            crossed=no,
            last_end=t,
            torn=no,
            outermost=(ends, ends) if recomputed else None,
            restartable=restartable,
            with_jumps=with_jumps,
        )

    @property
    def rows(self) -> int | None:
        """The largest number of steps on record; `None` if nothing is overwritten."""
        buffers = self.buffers()
        return buffers[0].shape[0] if len(buffers) > 0 else None

    def buffers(self) -> list:
        """The buffers that `equinox.internal.while_loop` may update in place."""
        rows = self.starts, self.previous_ends, self.flags, self.scalars
        return jtu.tree_leaves(rows, is_leaf=_is_buffer)

    def rewind(
        self, step: IntScalarLike, last_end: RealScalarLike, last: IntScalarLike
    ) -> "Record":
        """The record for a replay that starts after a `step`, and ends at or before the
        `last` one of the solve."""
        no = jnp.array(False)
        reaches = self.reaches(step, last)
        first = jnp.where(reaches, jnp.minimum(self.first, step), step)
        return dataclasses.replace(
            self, first=first, count=step, restarted=no, crossed=no, last_end=last_end
        )

    def where(self, pred: BoolScalarLike, other: "Record") -> "Record":
        """This record, with the numbers of the `other` unless `pred`. Without `pred`, both
        must have the same buffers."""

        def numbers(record):
            return (
                *(record.first, record.count, record.restarted, record.crossed),
                *(record.last_end, record.torn),
            )

        return eqx.tree_at(numbers, self, tree_cond(pred, numbers(self), numbers(other)))

    def interrupt(self, restarted: BoolScalarLike, crossed: BoolScalarLike) -> "Record":
        """Record whether the solve restarted or crossed a jump before the next step."""
        flags = self.restarted | restarted, self.crossed | crossed
        return dataclasses.replace(self, restarted=flags[0], crossed=flags[1])

    def append(
        self, before: State, scalars: PyTree[Array], accepted: BoolScalarLike
    ) -> "Record":
        i = self.count if self.rows is None else self.count % self.rows

        def write(rows, value):
            return None if rows is None else _write(rows, i, value, pred=accepted)

        flags = jnp.where(self.restarted, _restarted, 0) + jnp.where(
            self.crossed, _crossed, 0
        )
        scalars = jtu.tree_map(write, self.scalars, scalars, is_leaf=_is_buffer)
        count = self.count + jnp.where(accepted, 1, 0)
        first = self.first
        if self.rows is not None:
            first = jnp.maximum(first, count - self.rows)
        torn = self.torn
        if self.previous_ends is None and self.starts is not None:
            torn = torn | (accepted & (self.count > 0) & (before.tprev != self.last_end))
        outermost = self.outermost
        if outermost is not None:
            ends = Ends(jnp.asarray(before.tprev), jnp.asarray(before.tnext))
            outermost = (
                tree_select(accepted & (self.count == 0), ends, outermost[0]),
                tree_select(accepted, ends, outermost[1]),
            )
        return dataclasses.replace(
            self,
            starts=write(self.starts, before.tprev),
            previous_ends=write(self.previous_ends, self.last_end),
            flags=write(self.flags, flags.astype(jnp.uint8)),
            scalars=scalars,
            first=first,
            count=count,
            restarted=jnp.where(accepted, False, self.restarted),
            crossed=jnp.where(accepted, False, self.crossed),
            last_end=jnp.where(accepted, before.tnext, self.last_end),
            torn=torn,
            outermost=outermost,
        )

    def reaches(self, step: IntScalarLike, last: IntScalarLike) -> BoolScalarLike:
        """Whether the record of the steps just before `step` is still there.

        A replay to an earlier step may have overwritten it, unless there are rows for all
        steps up to the `last` of the solve.
        """
        if self.rows is None:
            return jnp.array(True)
        return (step <= self.count) | (last < self.rows)

    def covers(
        self, step: IntScalarLike, target: IntScalarLike, last: IntScalarLike
    ) -> BoolScalarLike:
        """Whether the whole record from a `step` to the `target` is still there."""
        if self.starts is None:
            return jnp.array(False)
        return (self.first <= step) & self.reaches(target, last)

    def ends(
        self, step: IntScalarLike, last: IntScalarLike, last_end: RealScalarLike
    ) -> Ends:
        """The ends of a recorded step. The `last` one ends at `last_end`, where the next
        one starts."""
        starts = self.starts if self.previous_ends is None else self.previous_ends
        assert self.starts is not None and starts is not None and self.rows is not None
        end = starts[(step + 1) % self.rows]
        end = jnp.where(step < last, end, last_end)
        start = jnp.where(step <= last, self.starts[step % self.rows], last_end)
        return Ends(start, end)

    def before(self, step: IntScalarLike) -> tuple[BoolScalarLike, BoolScalarLike]:
        """Whether there was a restart, and whether a jump was crossed, before a step.

        Python `False` if there can be none.
        """
        if self.flags is None:
            return False, False
        flags = self.flags[step % self.flags.shape[0]]
        restarted = self.restartable and (flags & _restarted) != 0
        return restarted, self.with_jumps and (flags & _crossed) != 0

    def recorded_before(self, step: IntScalarLike) -> PyTree[Array]:
        """The values that the solver recorded before a step."""
        return jtu.tree_map(lambda rows: rows[step % rows.shape[0]], self.scalars)

    def clock(self, end: State) -> Clock:
        """The clock at the end of the last step."""
        t = jnp.asarray(end.tprev if self.outermost is None else self.last_end)
        state = None if self.outermost is None else end.controller_state
        return Clock(t, t, self.last_end, state, jnp.zeros_like(t))

    def undo(
        self,
        step: IntScalarLike,
        clock: Clock,
        controller: AbstractStepSizeController,
        last: IntScalarLike,
        outermost: tuple[Ends, Ends] | None,
        y1: Y,
        args: Args,
    ) -> Clock:
        """Move the clock to the `step`-th step, whose final state is `y1`.

        **Arguments:**

        - `last`, `outermost`: the number of the last step of the solve and, if steps are
            recomputed, the first and the last step.
        """
        if outermost is None:
            assert self.starts is not None
            i = step % self.starts.shape[0]
            start = self.starts[i]
            previous_end = start if self.previous_ends is None else self.previous_ends[i]
            return Clock(start, clock.previous_end, previous_end, None, clock.drift)
        assert isinstance(controller, AbstractReversibleStepSizeController)
        first = outermost[0]
        clock = clock.set(first.end, first.end, clock.controller_state, step == 0)
        start, controller_state = lax.stop_gradient(
            controller.inverse(clock.start, y1, args, clock.controller_state)
        )
        start = jnp.where(step == last, outermost[1].start, start)
        start = jnp.where(step == 0, first.start, start)
        return Clock(start, clock.start, start, controller_state, clock.drift)
