"""Replaying steps of a solve from a known state."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController, RESULTS
from jaxtyping import PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .._tree import tree_select
from .clock import Ends
from .forward import Residuals
from .kept import Kept
from .known import Known
from .problem import Inputs, Problem
from .stepper import Advancing, Stepper


class _Next(eqx.Module):
    """A step, if it is `known`; the one before it was then accepted."""

    known: BoolScalarLike
    ends: Ends


class _ReplayedState(eqx.Module):
    """The state of a controller, and the recorded next step of the replayed solve."""

    state: PyTree
    next_step: _Next


class _Replaying(eqx.Module):
    """A controller that follows the record of the solve, where there is one.

    Error estimates round differently in separately compiled loops, which could change the
    decisions of a controller.
    """

    controller: AbstractStepSizeController

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        adapt = self.controller.adapt_step_size
        step = t0, t1, y0, y1, args, y_error, error_order
        if not isinstance(state, _ReplayedState):
            return adapt(*step, state)
        accepts, next_t0, next_t1, made_jump, new_state, result = adapt(*step, state.state)
        after = state.next_step
        accepts = after.known | accepts
        next_t0 = jnp.where(after.known, after.ends.start, next_t0)
        next_t1 = jnp.where(after.known, after.ends.end, next_t1)
        result = RESULTS.where(after.known, RESULTS.successful, result)
        new_state = _ReplayedState(new_state, after)
        return accepts, next_t0, next_t1, made_jump, new_state, result


class _Replay(Kept):
    """The residuals that a replay collects.

    - `target`: the step to replay to.
    - `recorded`: whether every step up to there, with restarts and jumps, is recorded.
    - `last`: the last recorded step, and its end.
    - `ahead`: the ends of the step after the next accepted one, if recorded; `None` if
        steps are recomputed. They are read after each write: XLA would copy a record that
        is read before.
    """

    target: IntScalarLike
    recorded: BoolScalarLike
    last: tuple[IntScalarLike, RealScalarLike]
    ahead: Ends | None

    @staticmethod
    def of(
        kept: Kept,
        known: Known,
        target: IntScalarLike,
        last: tuple[IntScalarLike, RealScalarLike],
        spacing: IntScalarLike,
    ) -> "_Replay":
        """The residuals at the start of a replay from a `known` state."""
        count, last_end = kept.record.count, kept.record.last_end
        # The end of the step before the target is not recorded as the start of the next, if
        # the last replay ended there.
        within = target <= count
        to = jnp.where(within, count - 1, last[0]), jnp.where(within, last_end, last[1])
        # The record has room for the steps before each state.
        rows = kept.record.rows or jnp.iinfo(jnp.int32).max
        spacing = jnp.minimum(spacing, rows)
        replay = _Replay(
            kept.restarts,
            kept.record.rewind(known.step, known.last_end, last[0]),
            kept.checkpoints,
            spacing,
            spacing,
            advanced=jnp.array(False),
            rest=None,
            varying=kept.varying,
            target=target,
            recorded=kept.record.covers(known.step, target, last[0]),
            last=to,
            ahead=None,
        )
        return dataclasses.replace(replay, ahead=replay._ends(known.step + 1))

    @property
    def _end(self) -> IntScalarLike:
        return self.target

    @property
    def _prefers_restarts(self) -> BoolScalarLike:
        return False

    def _is_last(self, state: State) -> BoolScalarLike:
        return state.num_accepted_steps + self.spacing >= self.target

    def _next_spacing(self, state: State) -> IntScalarLike:
        del state
        return self.spacing

    def interruptions(
        self, state: State, restarts: BoolScalarLike, made_jump: BoolScalarLike
    ) -> tuple[BoolScalarLike, BoolScalarLike]:
        """The interruptions of the solve, if they are recorded."""
        if self.record.flags is None:
            return restarts, made_jump
        restarted, crossed = self.record.before(state.num_accepted_steps)
        if restarts is not False:
            restarts = jnp.where(self.recorded, restarted, restarts)
        if made_jump is not False:
            made_jump = jnp.where(self.recorded, crossed, made_jump)
        return restarts, made_jump

    def start(self, state: State) -> State:
        """`state`, with the next accepted step, if it is recorded, in place of the first
        attempt."""
        ends = self._ends(state.num_accepted_steps)
        if ends is None:
            return state
        ends = tree_select(self.recorded, ends, Ends(state.tprev, state.tnext))
        return dataclasses.replace(state, tprev=ends.start, tnext=ends.end)

    def before_step(self, state: State) -> State:
        if self.ahead is None:
            return state
        step = _Next(self.recorded, self.ahead)
        replayed = _ReplayedState(state.controller_state, step)
        return dataclasses.replace(state, controller_state=replayed)

    def after_step(self, state: State) -> State:
        if not isinstance(state.controller_state, _ReplayedState):
            return state
        inner = state.controller_state.state
        return dataclasses.replace(state, controller_state=inner)

    def append(
        self, before: State, after: State, solver: AbstractReversibleSolver
    ) -> tuple["_Replay", BoolScalarLike]:
        replay, holds = super().append(before, after, solver)
        ahead = replay._ends(after.num_accepted_steps + 1)
        return dataclasses.replace(replay, ahead=ahead), holds

    def _ends(self, step: IntScalarLike) -> Ends | None:
        """The ends of the recorded step, or `None` if steps are recomputed."""
        if self.record.starts is None:
            return None
        return self.record.ends(step, *self.last)


class Replayer:
    """Replays steps of a solve from a known state.

    - `start`: the known state at the start of the solve.
    """

    def __init__(self, inputs: Inputs, problem: Problem, residuals: Residuals):
        problem = problem.without_outputs(_Replaying(problem.stepsize_controller))
        inputs = eqx.tree_at(
            lambda i: (i.context.save_fns, i.context.event_fns), inputs, ((), ())
        )
        loops = []

        def found(cond_fun, body_fun, init_val, *, max_steps, buffers):
            del max_steps
            stepper = Stepper(inputs, problem, cond_fun, body_fun, buffers)
            loops.append((stepper, jtu.tree_map(jnp.asarray, init_val)))
            return init_val

        problem.run(inputs, Advancing(problem.solver), found)
        ((self._stepper, self._init_state),) = loops
        init = self._init_state
        self.start = Known.of(init, init.tprev, problem.varying)
        # The last step of the solve, and its end.
        self._last = residuals.count - 1, residuals.record.last_end
        # Bounds the attempted steps of a replay.
        self._most = residuals.end.num_steps

    def run(
        self,
        known: Known,
        kept: Kept,
        target: IntScalarLike,
        replays: BoolScalarLike,
        spacing: IntScalarLike,
    ) -> tuple[Known, Kept]:
        """Replay up to the step `target`, if this element of a batch `replays`. There are
        `spacing` steps between states to hold, if there is room."""

        def on_the_way(state):
            steps, attempts = state.num_accepted_steps, state.num_steps
            return replays & (steps < target) & (attempts < self._most)

        replay = _Replay.of(kept, known, target, self._last, spacing)
        state = replay.start(known.resume(self._init_state))
        # A constant, as Equinox cannot compare one traced outside before JAX 0.7.
        state = dataclasses.replace(state, result=RESULTS.successful)
        state, replay = self._stepper.run(state, replay, on_the_way)
        return Known.of(state, replay.record.last_end, replay.varying), replay
