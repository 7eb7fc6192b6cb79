"""The gradient of a step of the walk back."""

from typing import NamedTuple

import equinox as eqx

from .._custom_types import DenseInfo, SolverState, Y
from .._solver.capabilities import advance_densely
from .._solver.pullback import (
    backward_step_and_pullback,
    Cotangent,
    HasProbe,
    linearise_step,
    Probe,
    Start,
)
from .clock import Clock
from .outputs import Cursor
from .pull_outputs import pull_dense
from .walk import Position, Walk


class PulledStep(NamedTuple):
    """What is known at the start of a step that was undone.

    - `dense_bar`: the cotangent of what the step was interpolated with.
    """

    y: Y
    solver_state: SolverState
    cotangent: Cotangent
    cursors: list[Cursor]
    dense_bar: DenseInfo | None


def pull_step(
    walk: Walk, position: Position, solver_state: SolverState, start: Start
) -> PulledStep:
    """Undo the step that ends at a position, and pull back through it."""
    solver, combine, params = walk.problem.solver, walk.combine, walk.params
    t0, t1 = position.clock.start, position.clock.end
    state = position.y, solver_state
    interpolated = [i for i, output in enumerate(walk.outputs) if output.sub.ts is not None]
    linear = all(walk.outputs[i].saves_state for i in interpolated)
    if linear and not walk.differentiates_times:
        dense_bar, ct, cursors = None, position.cotangent, position.cursors
        if len(interpolated) > 0 or walk.with_dense:
            # Nothing but its shapes is used: interpolations are linear.
            dense_info = _dense_struct(walk, t0, t1, *state)
            step = t0, t1, dense_info
            dense_bar, ct, cursors = pull_dense(walk, position, interpolated, *step)
        y0, state0, ct = backward_step_and_pullback(
            solver, combine, params, t0, t1, *state, ct, dense_bar, start
        )
        return PulledStep(y0, state0, ct, cursors, dense_bar)

    def step_times(params):
        times = walk.context(params).times
        return times.of(t0), times.of(t1)

    y0, state0, dense_info, pull = linearise_step(
        solver, combine, params, t0, t1, *state, start, step_times
    )
    step = t0, t1, dense_info
    dense_bar, ct, cursors = pull_dense(walk, position, interpolated, *step)
    return PulledStep(y0, state0, pull(ct, dense_bar), cursors, dense_bar)


def probe_step(walk: Walk, clock: Clock, pulled: PulledStep) -> Probe:
    """How a cotangent was pulled back."""
    probe = pulled.cotangent.probe
    if probe is None:
        step = clock.start, clock.end, pulled.y, pulled.cotangent, pulled.dense_bar
        solver = walk.problem.solver
        assert isinstance(solver, HasProbe)
        probe = solver.probe(walk.combine, walk.params, *step)
    assert probe is not None
    return probe


def _dense_struct(walk: Walk, t0, t1, y, solver_state) -> DenseInfo:
    terms, args = walk.combine(walk.params)
    _, _, dense_info, _, _ = eqx.filter_eval_shape(
        advance_densely, walk.problem.solver, terms, t0, t1, y, args, solver_state
    )
    return dense_info
