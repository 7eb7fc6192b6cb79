"""The residuals that a solve collects while it runs."""

import dataclasses
from typing import Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, Params, SolverState
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .._solver.capabilities import to_record
from .drift import coarsest_eps
from .known import Checkpoints, Known
from .rest import Rest
from .spread import many
from .steps import Record


def first_spacing(state: PyTree, params: Params) -> int:
    """The number of steps between known states at first. A solve of fewer steps holds only
    those before restarts.

    Rounding errors grow too large in 64 steps of Lorenz' equations, and in single precision
    in 16 steps of milder ones. If one member of a batch has to undo steps again, so do all;
    and if they share `params`, all wait at known states for those that arrive last. So with
    many parameters every state is held at first: a step then mostly costs more than that.
    """
    if many(params):
        return 1
    return 8 if coarsest_eps(state) > np.finfo(np.float64).eps else 16


class Counted(eqx.Module):
    """What a solve collects step by step if nothing is differentiated.

    - `restarts`: the number of restarts.
    """

    restarts: Int[Array, ""]

    def buffers(self) -> list:
        """The buffers that `equinox.internal.while_loop` may update in place."""
        return []

    @property
    def holds(self) -> bool:
        """Whether states are held."""
        return False

    def append(
        self, before: State, after: State, solver: AbstractReversibleSolver
    ) -> tuple[Self, BoolScalarLike]:
        """Record the step from `before` to `after`, if it was accepted.

        Also returns whether to hold the state after it.
        """
        del before, after, solver
        return self, False

    def interrupt(
        self,
        state: State,
        solver_state: SolverState,
        restarts: BoolScalarLike,
        crossed: BoolScalarLike,
        goes_on: BoolScalarLike,
    ) -> Self:
        """Record that the solve `restarts` at `state`, or has `crossed` a jump there, and
        continues with `solver_state`, and hold the state if it is due. In a batch,
        `goes_on` is false for elements that have ended."""
        del state, solver_state, crossed, goes_on
        count = self.restarts + jnp.where(restarts, 1, 0)
        return dataclasses.replace(self, restarts=count)

    def interruptions(
        self, state: State, restarts: BoolScalarLike, made_jump: BoolScalarLike
    ) -> tuple[BoolScalarLike, BoolScalarLike]:
        """Whether there is a restart, and whether a jump, before the next step."""
        del state
        return restarts, made_jump

    def before_step(self, state: State) -> State:
        """`state`, with additional data for the controller in the controller state."""
        return state

    def after_step(self, state: State) -> State:
        """The inverse of `before_step`."""
        return state


class Kept(Counted):
    """The residuals that a solve collects step by step.

    - `record`, `checkpoints`: the steps and the known states.
    - `spacing`, `due`: the number of attempted steps between spread states, and that at
        which the next one is held. The spacing is independent of the states held, so that
        all elements of a batch hold one at once.
    - `advanced`: whether the last step was accepted. After a rejected one, the state may
        have been restarted, and is not held.
    - `rest`: the entries at rest; `None` if they do not matter.
    - `varying`: which leaves of the controller state are part of a known state.
    """

    record: Record
    checkpoints: Checkpoints
    spacing: IntScalarLike
    due: IntScalarLike
    advanced: BoolScalarLike
    rest: Rest | None
    varying: tuple[bool, ...] = eqx.field(static=True)

    def buffers(self) -> list:
        return self.record.buffers()

    @property
    def holds(self) -> bool:
        return self.checkpoints.capacity > 0

    def append(
        self, before: State, after: State, solver: AbstractReversibleSolver
    ) -> tuple[Self, BoolScalarLike]:
        accepted = after.num_accepted_steps > before.num_accepted_steps
        scalars = to_record(solver, before.solver_state)
        record = self.record.append(before, scalars, accepted)
        rest = self.rest
        if rest is not None:
            states = (before.y, before.solver_state), (after.y, after.solver_state)
            rest = rest.during(2 * before.num_accepted_steps, *states, accepted)
        kept = dataclasses.replace(self, record=record, advanced=accepted, rest=rest)
        if not self.holds:
            return kept, False
        return kept, accepted & (after.num_steps >= self.due)

    def interrupt(
        self,
        state: State,
        solver_state: SolverState,
        restarts: BoolScalarLike,
        crossed: BoolScalarLike,
        goes_on: BoolScalarLike,
    ) -> Self:
        kept = super().interrupt(state, solver_state, restarts, crossed, goes_on)
        record, rest = self.record.interrupt(restarts, crossed), self.rest
        if rest is not None:
            states = (state.y, state.solver_state), (state.y, solver_state)
            changes = jnp.logical_or(restarts, crossed)
            rest = rest.during(2 * state.num_accepted_steps - 1, *states, changes)
        kept = dataclasses.replace(kept, record=record, rest=rest)
        if not self.holds:
            return kept
        spread = goes_on & self.advanced & (state.num_steps >= self.due)
        known = Known.of(state, self.record.last_end, self.varying)
        needed = spread & self._is_last(state)
        held = known, restarts, restarts | spread, self._end, self._prefers_restarts
        spacing = jnp.where(spread, self._next_spacing(state), self.spacing)
        due = jnp.where(spread, (state.num_steps // spacing + 1) * spacing, self.due)
        held = self.checkpoints.hold(*held, needed)
        return dataclasses.replace(kept, checkpoints=held, spacing=spacing, due=due)

    @property
    def _end(self) -> IntScalarLike:
        """The step before which states are held."""
        return self.record.count + 1

    @property
    def _prefers_restarts(self) -> BoolScalarLike:
        """Whether the record is complete, so that only restarts need replays."""
        return self.record.first == 0

    def _is_last(self, state: State) -> BoolScalarLike:
        """Whether no further state is due before the end."""
        del state
        return False

    def _next_spacing(self, state: State) -> IntScalarLike:
        """The spacing, doubled whenever about half of the held states have been dropped."""
        many = state.num_steps >= 2 * self.checkpoints.capacity * self.spacing
        return jnp.where(many, 2 * self.spacing, self.spacing)
