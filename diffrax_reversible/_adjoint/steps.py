"""Where the steps of a solve were: recorded, or to be recomputed on the walk back."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .._diffrax import State


# Its annotations are narrower than what it accepts.
_write = cast(Callable[..., Array], eqxi.buffer_at_set)


def _is_buffer(x: Any) -> bool:
    return hasattr(x, "shape")


class Clock(eqx.Module):
    """Where the walk is in time: at the start of the step that was undone last.

    - `start`, `end`: of that step. They are the very floats that the solver was called
        with, if recorded.
    - `previous_end`: of the step before it.
    - `controller_state`: at `start`, if that step was recomputed.
    - `drift`: by how much recomputed times were off so far, as a fraction of the step.
    """

    start: RealScalarLike
    end: RealScalarLike
    previous_end: RealScalarLike
    controller_state: PyTree
    drift: Float[Array, ""]

    def set(self, t: RealScalarLike, known: BoolScalarLike = True) -> "Clock":
        """Go on from `t` in place of `start`, if it is `known`."""
        step = jnp.abs(self.end - self.start)
        off = jnp.abs(t - self.start)
        off = jnp.where(known & (off != 0), off / jnp.where(step == 0, 1, step), 0)
        start = jnp.where(known, t, self.start)
        drift = jnp.maximum(self.drift, off)
        return Clock(start, self.end, self.previous_end, self.controller_state, drift)


class RecordedSteps(eqx.Module):
    """Both ends of every accepted step: two times a step, whatever the state.

    The end of one step and the start of the next may differ, so both are kept. If there can
    be jumps, also whether one was crossed before the step.
    """

    starts: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    ends: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    # What the solver asks for, see `AbstractReversibleSolver.to_record`.
    scalars: PyTree[eqxi.MaybeBuffer[Shaped[Array, " max_steps"]]]
    crossed: Bool[Array, " max_steps"] | None
    count: Int[Array, ""]

    @staticmethod
    def allocate(
        max_steps: int, dtype, scalars: PyTree[jax.ShapeDtypeStruct], with_jumps: bool
    ) -> "RecordedSteps":
        times = jnp.zeros(max_steps, dtype)
        rows = jtu.tree_map(lambda s: jnp.zeros(max_steps, s.dtype), scalars)
        crossed = jnp.zeros(max_steps, bool) if with_jumps else None
        return RecordedSteps(times, times, rows, crossed, jnp.array(0))

    @property
    def last_end(self) -> RealScalarLike:
        return self.ends[jnp.maximum(self.count - 1, 0)]

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        return [self.starts, self.ends, *jtu.tree_leaves(self.scalars, is_leaf=_is_buffer)]

    def cross(self, crossed: BoolScalarLike) -> "RecordedSteps":
        """Record whether a jump was crossed before the next step."""
        if self.crossed is None:
            return self
        i = self.count
        flags = self.crossed.at[i].set(self.crossed[i] | crossed)
        return eqx.tree_at(lambda r: r.crossed, self, flags)

    def append(
        self, before: State, scalars: PyTree[Array], accepted: BoolScalarLike
    ) -> "RecordedSteps":
        def write(rows, value):
            return _write(rows, self.count, value, pred=accepted)

        return RecordedSteps(
            write(self.starts, before.tprev),
            write(self.ends, before.tnext),
            jtu.tree_map(write, self.scalars, scalars, is_leaf=_is_buffer),
            self.crossed,
            self.count + jnp.where(accepted, 1, 0),
        )

    def clock(self, end: State) -> Clock:
        """At the end of the last step."""
        t = jnp.asarray(end.tprev)
        return Clock(t, t, t, None, jnp.zeros_like(t))

    def crossed_before(self, step: IntScalarLike) -> BoolScalarLike | None:
        """Whether a jump was crossed before a step, `None` if there were no jumps."""
        return None if self.crossed is None else self.crossed[step]

    def recorded_before(self, step: IntScalarLike) -> PyTree[Array]:
        """What the solver had asked for before a step."""
        return jtu.tree_map(lambda rows: rows[step], self.scalars)

    def undo(
        self, controller, step: IntScalarLike, y1: Y, args: Args, clock: Clock
    ) -> Clock:
        """Go on with the `step`-th step, of which `y1` is the end."""
        del controller, y1, args
        previous_end = self.ends[jnp.maximum(step - 1, 0)]
        return Clock(self.starts[step], self.ends[step], previous_end, None, clock.drift)


class RecomputedSteps(eqx.Module):
    """The two ends of the solve: what is between, its controller recomputes.

    The first step and the last need not be what the controller asked for.
    """

    first: tuple[RealScalarLike, RealScalarLike]
    last: tuple[RealScalarLike, RealScalarLike]
    # Only the first step can begin at a jump, one that another solve ended at.
    crossed: BoolScalarLike | None
    count: Int[Array, ""]

    @staticmethod
    def allocate(dtype, with_jumps: bool) -> "RecomputedSteps":
        step = (jnp.zeros((), dtype), jnp.zeros((), dtype))
        crossed = jnp.array(False) if with_jumps else None
        return RecomputedSteps(step, step, crossed, jnp.array(0))

    @property
    def last_end(self) -> RealScalarLike:
        return self.last[1]

    def buffers(self) -> list:
        return []

    def cross(self, crossed: BoolScalarLike) -> "RecomputedSteps":
        if self.crossed is None:
            return self
        crossed = self.crossed | crossed
        return eqx.tree_at(lambda r: r.crossed, self, crossed)

    def append(
        self, before: State, scalars: PyTree[Array], accepted: BoolScalarLike
    ) -> "RecomputedSteps":
        del scalars
        new = (jnp.asarray(before.tprev), jnp.asarray(before.tnext))

        def choose(pred, old):
            return jtu.tree_map(lambda n, o: jnp.where(pred, n, o), new, old)

        first = choose(accepted & (self.count == 0), self.first)
        last = choose(accepted, self.last)
        count = self.count + jnp.where(accepted, 1, 0)
        return RecomputedSteps(first, last, self.crossed, count)

    def clock(self, end: State) -> Clock:
        t = jnp.asarray(self.last_end)
        return Clock(t, t, t, end.controller_state, jnp.zeros_like(t))

    def crossed_before(self, step: IntScalarLike) -> BoolScalarLike | None:
        return None if self.crossed is None else self.crossed & (step == 0)

    def recorded_before(self, step: IntScalarLike) -> None:
        del step

    def undo(
        self,
        controller: AbstractStepSizeController,
        step: IntScalarLike,
        y1: Y,
        args: Args,
        clock: Clock,
    ) -> Clock:
        assert isinstance(controller, AbstractReversibleStepSizeController)
        clock = clock.set(self.first[1], step == 0)
        end = clock.start
        start, controller_state = lax.stop_gradient(
            controller.inverse(end, y1, args, clock.controller_state)
        )
        start = jnp.where(step == self.count - 1, self.last[0], start)
        start = jnp.where(step == 0, self.first[0], start)
        return Clock(start, end, start, controller_state, clock.drift)
