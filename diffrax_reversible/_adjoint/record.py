"""What is recorded of the steps of a solve, to walk them back."""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    RealScalarLike,
    SolverState,
    Y,
)
from .._diffrax import State


# Its annotations are narrower than what it accepts.
_write = cast(Callable[..., Array], eqxi.buffer_at_set)


class StepRecord(eqx.Module):
    """Both ends of every accepted step: two times a step, whatever the state.

    They are the very floats that the solver was called with. The end of one step and the
    start of the next may differ, so both are kept. If there can be jumps, also whether one
    was crossed before the step.
    """

    starts: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    ends: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    crossed: Bool[Array, " max_steps"] | None
    count: Int[Array, ""]

    @staticmethod
    def allocate(max_steps: int, dtype, with_jumps: bool) -> "StepRecord":
        times = jnp.zeros(max_steps, dtype)
        crossed = jnp.zeros(max_steps, bool) if with_jumps else None
        return StepRecord(times, times, crossed, jnp.array(0))

    def cross(self, crossed: BoolScalarLike) -> "StepRecord":
        """Record whether a jump was crossed before the next step."""
        if self.crossed is None:
            return self
        i = self.count
        flags = self.crossed.at[i].set(self.crossed[i] | crossed)
        return eqx.tree_at(lambda r: r.crossed, self, flags)

    def append(self, before: State, accepted: BoolScalarLike) -> "StepRecord":
        return StepRecord(
            _write(self.starts, self.count, before.tprev, pred=accepted),
            _write(self.ends, self.count, before.tnext, pred=accepted),
            self.crossed,
            self.count + jnp.where(accepted, 1, 0),
        )


class RestartRecord(eqx.Module):
    """Where, and with what, a solve was restarted.

    A restart cannot be undone. Those beyond the capacity are counted, but not stored.
    """

    t: Float[Array, " capacity"]
    y: PyTree[Array]
    solver_state: PyTree[Array]
    # How many steps had been accepted before.
    step: Int[Array, " capacity"]
    count: Int[Array, ""]

    @property
    def capacity(self) -> int:
        return self.step.shape[0]

    @staticmethod
    def allocate(
        capacity: int, t: RealScalarLike, y: Y, solver_state: SolverState
    ) -> "RestartRecord":
        def zeros(x):
            x = jnp.asarray(x)
            return jnp.zeros((capacity, *x.shape), x.dtype)

        step = jnp.zeros(capacity, jnp.int32)
        rows = (jtu.tree_map(zeros, x) for x in (t, y, solver_state))
        return RestartRecord(*rows, step=step, count=jnp.array(0))

    def append(self, state: State, restarted: BoolScalarLike) -> "RestartRecord":
        """Store the state before a restart, if it is `restarted`."""
        count = self.count + jnp.where(restarted, 1, 0)
        if self.capacity == 0:
            return eqx.tree_at(lambda r: r.count, self, count)
        stored = restarted & (self.count < self.capacity)

        def write(rows, value):
            return rows.at[self.count].set(jnp.where(stored, value, rows[self.count]))

        step = jnp.asarray(state.num_accepted_steps, jnp.int32)
        values = (state.tprev, state.y, state.solver_state, step)
        rows = (self.t, self.y, self.solver_state, self.step)
        return RestartRecord(*jtu.tree_map(write, rows, values), count=count)

    def read(self, i: IntScalarLike) -> tuple[RealScalarLike, Y, SolverState]:
        return jtu.tree_map(lambda rows: rows[i], (self.t, self.y, self.solver_state))


class Record(eqx.Module):
    """`steps` is `None` where nothing is differentiated, and restarts are just counted."""

    steps: StepRecord | None
    restarts: RestartRecord

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        return [] if self.steps is None else [self.steps.starts, self.steps.ends]

    def append(self, before: State, after: State) -> "Record":
        """Record the step from `before` to `after`, if it was accepted."""
        if self.steps is None:
            return self
        accepted = after.num_accepted_steps > before.num_accepted_steps
        return Record(self.steps.append(before, accepted), self.restarts)

    def interrupt(
        self, state: State, restarted: BoolScalarLike, crossed: BoolScalarLike
    ) -> "Record":
        """Record that at `state` there was a restart, or a jump was crossed."""
        steps = None if self.steps is None else self.steps.cross(crossed)
        return Record(steps, self.restarts.append(state, restarted))
