"""What is recorded of a solve, to walk it back."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    RealScalarLike,
    SolverState,
    Y,
)
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .steps import RecomputedSteps, RecordedSteps


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
        """**Arguments:** what is stored of a restart, as an example."""

        def zeros(x):
            x = jnp.asarray(x)
            return jnp.zeros((capacity, *x.shape), x.dtype)

        step = jnp.zeros(capacity, jnp.int32)
        rows = (jtu.tree_map(zeros, x) for x in (t, y, solver_state))
        return RestartRecord(*rows, step=step, count=jnp.array(0))

    def append(
        self, state: State, solver_state: SolverState, restarted: BoolScalarLike
    ) -> "RestartRecord":
        """Store the state before a restart, if it is `restarted`.

        - `solver_state`: what of it is stored.
        """
        count = self.count + jnp.where(restarted, 1, 0)
        if self.capacity == 0:
            return eqx.tree_at(lambda r: r.count, self, count)
        stored = restarted & (self.count < self.capacity)

        def write(rows, value):
            return rows.at[self.count].set(jnp.where(stored, value, rows[self.count]))

        step = jnp.asarray(state.num_accepted_steps, jnp.int32)
        values = (state.tprev, state.y, solver_state, step)
        rows = (self.t, self.y, self.solver_state, self.step)
        return RestartRecord(*jtu.tree_map(write, rows, values), count=count)

    def read(self, i: IntScalarLike) -> tuple[RealScalarLike, Y, SolverState]:
        return jtu.tree_map(lambda rows: rows[i], (self.t, self.y, self.solver_state))


class Record(eqx.Module):
    """`steps` is `None` where nothing is differentiated, and restarts are just counted."""

    steps: RecordedSteps | RecomputedSteps | None
    restarts: RestartRecord

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        return [] if self.steps is None else self.steps.buffers()

    def append(
        self, before: State, after: State, solver: AbstractReversibleSolver
    ) -> "Record":
        """Record the step from `before` to `after`, if it was accepted."""
        if self.steps is None:
            return self
        accepted = after.num_accepted_steps > before.num_accepted_steps
        scalars = solver.to_record(before.solver_state)
        return Record(self.steps.append(before, scalars, accepted), self.restarts)

    def interrupt(
        self,
        state: State,
        solver: AbstractReversibleSolver,
        restarted: BoolScalarLike,
        crossed: BoolScalarLike,
    ) -> "Record":
        """Record that at `state` there was a restart, or a jump was crossed."""
        steps = None if self.steps is None else self.steps.cross(crossed)
        stored = solver.to_store(state.solver_state)
        return Record(steps, self.restarts.append(state, stored, restarted))
