"""What is recorded of the steps of a solve, to walk them back."""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, SolverState, Y
from .._diffrax import State


# Its annotations are narrower than what it accepts.
_write = cast(Callable[..., Array], eqxi.buffer_at_set)


class StepRecord(eqx.Module):
    """Both ends of every accepted step: two times a step, whatever the state.

    They are the very floats that the solver was called with. The end of one step and the
    start of the next may differ, so both are kept.
    """

    starts: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    ends: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    count: Int[Array, ""]

    @staticmethod
    def allocate(max_steps: int, dtype) -> "StepRecord":
        times = jnp.zeros(max_steps, dtype)
        return StepRecord(times, times, jnp.array(0))

    def append(self, before: State, accepted: BoolScalarLike) -> "StepRecord":
        return StepRecord(
            _write(self.starts, self.count, before.tprev, pred=accepted),
            _write(self.ends, self.count, before.tnext, pred=accepted),
            self.count + jnp.where(accepted, 1, 0),
        )


class RestartRecord(eqx.Module):
    """What every step that began with a restart began with.

    A restart cannot be undone. Those beyond the capacity are counted, but not stored.
    """

    y: PyTree[eqxi.MaybeBuffer[Array]]
    solver_state: PyTree[eqxi.MaybeBuffer[Array]]
    # Which step it was, counting accepted steps from zero.
    step: eqxi.MaybeBuffer[Int[Array, " capacity"]]
    count: Int[Array, ""]
    capacity: int = eqx.field(static=True)

    @staticmethod
    def allocate(capacity: int, y: Y, solver_state: SolverState) -> "RestartRecord":
        def rows(x):
            x = jnp.asarray(x)
            return jnp.zeros((capacity, *x.shape), x.dtype)

        y, solver_state = jtu.tree_map(rows, (y, solver_state))
        step = jnp.zeros(capacity, jnp.int32)
        return RestartRecord(y, solver_state, step, jnp.array(0), capacity)

    def append(
        self, before: State, step: Int[Array, ""], restarted: BoolScalarLike
    ) -> "RestartRecord":
        count = self.count + jnp.where(restarted, 1, 0)
        if self.capacity == 0:
            return eqx.tree_at(lambda r: r.count, self, count)

        stored = restarted & (self.count < self.capacity)

        def write(value, buffer):
            return _write(buffer, self.count, value, pred=stored)

        def store():
            # Values first: a buffer is a PyTree of its own.
            return (
                jtu.tree_map(write, before.y, self.y),
                jtu.tree_map(write, before.solver_state, self.solver_state),
                write(step.astype(jnp.int32), self.step),
            )

        y, solver_state, steps = lax.cond(
            eqxi.unvmap_any(stored),
            store,
            lambda: (self.y, self.solver_state, self.step),
        )
        return RestartRecord(y, solver_state, steps, count, self.capacity)

    def read(self, i: IntScalarLike) -> tuple[Y, SolverState]:
        return jtu.tree_map(lambda rows: rows[i], (self.y, self.solver_state))


class Record(eqx.Module):
    """`steps` is `None` where nothing is differentiated, and restarts are just counted."""

    steps: StepRecord | None
    restarts: RestartRecord

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        restarts = [self.restarts.y, self.restarts.solver_state, self.restarts.step]
        if self.restarts.capacity == 0:
            restarts = []
        if self.steps is None:
            return restarts
        return [self.steps.starts, self.steps.ends, *restarts]

    def append(self, before: State, after: State, restarts: BoolScalarLike) -> "Record":
        """Record the step from `before` to `after`, if it was accepted."""
        accepted = after.num_accepted_steps > before.num_accepted_steps
        steps = None if self.steps is None else self.steps.append(before, accepted)
        if restarts is False:
            return Record(steps, self.restarts)
        step = jnp.asarray(before.num_accepted_steps)
        return Record(steps, self.restarts.append(before, step, accepted & restarts))
