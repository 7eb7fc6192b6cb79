"""Steps of a solve made again, from a known state on."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController, RESULTS
from jaxtyping import PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from .._diffrax import State
from .._tree import tree_replace
from .clock import Ends
from .kept import Kept
from .known import Known
from .problem import Inputs, Problem
from .stepper import Advancing, Stepper


class _Next(eqx.Module):
    """A step, if it is `known`: then the one before it is accepted."""

    known: BoolScalarLike
    ends: Ends


class _ReplayedState(eqx.Module):
    """The state of a controller, and what is recorded of the solve that is replayed."""

    state: PyTree
    next_step: _Next


class _Replaying(eqx.Module):
    """A controller that is not asked where the solve is recorded.

    Error estimates round differently in two loops that are compiled apart, and decisions
    could fall differently.
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
    """What is kept of a replay.

    - `target`: to how many steps.
    - `recorded`: whether every step to there, and what was between them, is recorded.
    - `last`: the last step that is recorded, and its end.
    """

    target: IntScalarLike = 0
    recorded: BoolScalarLike = False
    last: tuple[IntScalarLike, RealScalarLike] = (0, 0.0)

    @staticmethod
    def of(
        kept: Kept,
        known: Known,
        target: IntScalarLike,
        last: tuple[IntScalarLike, RealScalarLike],
        spacing: IntScalarLike,
    ) -> "_Replay":
        """From what is `known`, where no step was made again so far."""
        assert kept.record is not None
        count, last_end = kept.record.count, kept.record.last_end
        # Of the step before the target the end is not another's start, if it was the last
        # that was made again.
        within = target <= count
        to = jnp.where(within, count - 1, last[0]), jnp.where(within, last_end, last[1])
        # Each with a record of the steps before it.
        rows = kept.record.rows or jnp.iinfo(jnp.int32).max
        spacing = jnp.minimum(spacing, rows)
        return _Replay(
            kept.restarts,
            kept.record.rewind(known.step, known.last_end, last[0]),
            kept.checkpoints,
            spacing,
            spacing,
            jnp.array(False),
            varying=kept.varying,
            target=target,
            recorded=kept.record.covers(known.step, target, last[0]),
            last=to,
        )

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
        """As they were in the solve, if that is recorded."""
        assert self.record is not None
        if self.record.flags is None:
            return restarts, made_jump
        restarted, crossed = self.record.before(state.num_accepted_steps)
        if restarts is not False:
            restarts = jnp.where(self.recorded, restarted, restarts)
        if made_jump is not False:
            made_jump = jnp.where(self.recorded, crossed, made_jump)
        return restarts, made_jump

    def start(self, state: State) -> State:
        """With the step that was accepted next, if it is recorded, in place of that which
        was tried first."""
        step = self._step(state.num_accepted_steps)
        if step is None:
            return state
        ends = step.ends.where(step.known, Ends(state.tprev, state.tnext))
        return tree_replace(lambda s: (s.tprev, s.tnext), state, (ends.start, ends.end))

    def before_step(self, state: State) -> State:
        step = self._step(state.num_accepted_steps + 1)
        if step is None:
            return state
        replayed = _ReplayedState(state.controller_state, step)
        return tree_replace(lambda s: s.controller_state, state, replayed)

    def after_step(self, state: State) -> State:
        if not isinstance(state.controller_state, _ReplayedState):
            return state
        inner = state.controller_state.state
        return tree_replace(lambda s: s.controller_state, state, inner)

    def _step(self, step: IntScalarLike) -> _Next | None:
        """`None` if steps are recomputed."""
        assert self.record is not None
        if self.record.starts is None:
            return None
        return _Next(self.recorded, self.record.ends(step, *self.last))


class Replayer:
    """Makes steps of a solve again, from a known state on.

    - `start`: where the solve began.
    """

    def __init__(self, inputs: Inputs, problem: Problem):
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

    def run(
        self,
        known: Known,
        kept: Kept,
        target: IntScalarLike,
        last: tuple[IntScalarLike, RealScalarLike],
        most: IntScalarLike,
        replays: BoolScalarLike,
        spacing: IntScalarLike,
    ) -> tuple[Known, Kept]:
        """To a number of steps, if this element of a batch `replays`.

        - `last`: the last step of the solve, and its end.
        - `most`: how many steps it took, with those that were rejected. No replay takes
            more.
        - `spacing`: after how many steps another state is held, if there is room.
        """

        def on_the_way(state):
            steps, attempts = state.num_accepted_steps, state.num_steps
            return replays & (steps < target) & (attempts < most)

        replay = _Replay.of(kept, known, target, last, spacing)
        state = replay.start(known.resume(self._init_state))
        # A constant, as before JAX 0.7 Equinox cannot compare one that is traced outside.
        state = tree_replace(lambda s: s.result, state, RESULTS.successful)
        state, replay = self._stepper.run(state, replay, on_the_way)
        assert replay.record is not None
        return Known.of(state, replay.record.last_end, replay.varying), replay
