"""Where the steps of a solve were: recorded, or to be recomputed on the walk back."""

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
from .clock import Clock, Ends


# Its annotations are narrower than what it accepts.
_write = cast(Callable[..., Array], eqxi.buffer_at_set)

# For so many steps there is always room, and memory for more if Diffrax's default adjoint
# takes as much, see `room_for_steps`.
_least_rows = 256
_most_rows = 1 << 14
# Without a bound on the number of steps as if there were this one.
_without_bound = 1 << 16

_restarted, _crossed = 1, 2


def _is_buffer(x: Any) -> bool:
    return hasattr(x, "shape")


def room_for_steps(y: Y, t: RealScalarLike, max_steps: int | None, known: int) -> int:
    """How many bytes a record of steps can take beside so many bytes of `known` states, for
    both to take no more than `diffrax.RecursiveCheckpointAdjoint`.

    By default that has `n` checkpoints with `n (n + 3) / 2 >= max_steps`, of the state and
    its derivative, and of about eight numbers more: times, counters, and the state of the
    controller.
    """
    steps = _without_bound if max_steps is None else max_steps
    count = math.floor(math.sqrt(2 * steps + 0.25) - 1.5) + 1
    state = sum(jnp.asarray(x).nbytes for x in jtu.tree_leaves(y))
    # Who asks for many known states has as much memory again.
    return max(count * (2 * state + 8 * jnp.asarray(t).itemsize) - known, known)


class Record(eqx.Module):
    """Where the steps from `first` to before `count` were, and what was between them.

    As many as there are rows, in a ring: of a longer solve those are forgotten that were
    made long ago. If steps are recomputed, there are no times; of a solve without restarts
    and jumps, then, there is nothing to record, and nothing is forgotten.

    - `starts`: of steps, of which each ends where the next one starts, unless there are
        jumps.
    - `previous_ends`: if there may be jumps, where the step before each ended.
    - `flags`: whether there was a restart or a jump just before a step, if there may be.
    - `scalars`: what the solver asks for, see `HasRecord`.
    - `restarted`, `crossed`: of the next step.
    - `last_end`: of the last step.
    - `torn`: whether a step has not started where the last one ended, without a jump.
    - `outermost`: the first and the last step, which need not be what the controller asked
        for, if steps are recomputed.
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

    @staticmethod
    def allocate(
        t0: RealScalarLike,
        scalars: PyTree[jax.ShapeDtypeStruct],
        with_flags: bool,
        with_jumps: bool,
        recomputed: bool,
        max_steps: int | None,
        room: int,
    ) -> "Record":
        """**Arguments:**

        - `with_flags`: whether there may be restarts or jumps.
        - `room`: how many bytes the record may take, if that is enough for a few hundred
            steps.
        """
        t = jnp.asarray(t0)
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
        )

    @property
    def rows(self) -> int | None:
        """How many steps are held at the most; `None` if nothing is forgotten."""
        buffers = self.buffers()
        return buffers[0].shape[0] if len(buffers) > 0 else None

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        rows = self.starts, self.previous_ends, self.flags, self.scalars
        return jtu.tree_leaves(rows, is_leaf=_is_buffer)

    def rewind(
        self, step: IntScalarLike, last_end: RealScalarLike, last: IntScalarLike
    ) -> "Record":
        """To record what comes after a `step` once more, up to the `last` of the solve at
        the most."""
        no = jnp.array(False)
        reaches = self.reaches(step, last)
        first = jnp.where(reaches, jnp.minimum(self.first, step), step)
        return eqx.tree_at(
            lambda r: (r.first, r.count, r.restarted, r.crossed, r.last_end),
            self,
            (first, step, no, no, last_end),
        )

    def where(self, pred: BoolScalarLike, other: "Record") -> "Record":
        """All but the buffers of another record, unless `pred`. It has the same buffers, or
        those are not written to where it is chosen."""

        def numbers(record):
            return (
                *(record.first, record.count, record.restarted, record.crossed),
                *(record.last_end, record.torn),
            )

        chosen = jtu.tree_map(
            lambda s, o: jnp.where(pred, s, o), numbers(self), numbers(other)
        )
        return eqx.tree_at(numbers, self, chosen)

    def interrupt(self, restarted: BoolScalarLike, crossed: BoolScalarLike) -> "Record":
        """Record that there was a restart before the next step, or a jump was crossed."""
        flags = self.restarted | restarted, self.crossed | crossed
        return eqx.tree_at(lambda r: (r.restarted, r.crossed), self, flags)

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
                ends.where(accepted & (self.count == 0), outermost[0]),
                ends.where(accepted, outermost[1]),
            )
        return Record(
            write(self.starts, before.tprev),
            write(self.previous_ends, self.last_end),
            write(self.flags, flags.astype(jnp.uint8)),
            scalars,
            first,
            count,
            jnp.where(accepted, False, self.restarted),
            jnp.where(accepted, False, self.crossed),
            jnp.where(accepted, before.tnext, self.last_end),
            torn,
            outermost,
        )

    def reaches(self, step: IntScalarLike, last: IntScalarLike) -> BoolScalarLike:
        """Whether what was recorded just before a `step` is still there.

        A replay to an earlier one may have been written over it, unless there are rows for
        all steps up to the `last` of the solve.
        """
        if self.rows is None:
            return jnp.array(True)
        return (step <= self.count) | (last < self.rows)

    def covers(
        self, step: IntScalarLike, target: IntScalarLike, last: IntScalarLike
    ) -> BoolScalarLike:
        """Whether all that was recorded from a `step` on to the `target` is still there."""
        if self.starts is None:
            return jnp.array(False)
        return (self.first <= step) & self.reaches(target, last)

    def ends(
        self, step: IntScalarLike, last: IntScalarLike, last_end: RealScalarLike
    ) -> Ends:
        """Of a step that is recorded. Where the `last` one ended is told; what comes after
        starts there."""
        starts = self.starts if self.previous_ends is None else self.previous_ends
        assert self.starts is not None and starts is not None and self.rows is not None
        end = starts[(step + 1) % self.rows]
        end = jnp.where(step < last, end, last_end)
        start = jnp.where(step <= last, self.starts[step % self.rows], last_end)
        return Ends(start, end)

    def before(self, step: IntScalarLike) -> tuple[BoolScalarLike, BoolScalarLike]:
        """Whether there was a restart, and whether a jump was crossed, before a step.

        Python `False` if there were none at all.
        """
        if self.flags is None:
            return False, False
        flags = self.flags[step % self.flags.shape[0]]
        return (flags & _restarted) != 0, (flags & _crossed) != 0

    def recorded_before(self, step: IntScalarLike) -> PyTree[Array]:
        """What the solver had asked for before a step."""
        return jtu.tree_map(lambda rows: rows[step % rows.shape[0]], self.scalars)

    def clock(self, end: State) -> Clock:
        """At the end of the last step."""
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
        """Go on with the `step`-th step, of which `y1` is the end.

        **Arguments:**

        - `last`, `outermost`: which step was the last one of the solve, and where it and
            the first one were, if steps are recomputed.
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
