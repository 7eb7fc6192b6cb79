"""One step of the walk, and the jump before it."""

import dataclasses

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp

from .._custom_types import BoolScalarLike, RealScalarLike, SolverState, Y
from .._solver.capabilities import cross_jump, recall
from .._solver.cotangent import Cotangent
from .._solver.interrupted_solver import before_jump
from .._tree import tree_add, tree_select
from .growth import Growth
from .kept import Kept
from .position import Position
from .pull_change import pull_change
from .pull_outputs import pull_step_outputs
from .pull_step import pull_step, PulledStep
from .steps import Record
from .walk import Walk


def undo_step(walk: Walk, position: Position, kept: Kept) -> Position:
    """Undo a step."""
    record, step = kept.record, position.step - 1
    restarted, crossed = record.before(step)
    if position.moves is not None:
        crossed &= position.moves
    position = _begin(walk, position, record)
    clock = position.clock
    position = pull_step_outputs(walk, position, clock.end)
    recorded = record.recorded_before(step)
    solver_state = recall(walk.problem.solver, position.solver_state, recorded)
    pulled = pull_step(walk, position, solver_state, kept)
    ct, no = pulled.cotangent, jnp.array(False)
    y0, state0 = pulled.y, pulled.solver_state
    # At the start of the solve, to restart would change nothing.
    begins = (step == 0) | restarted | crossed
    growth, pending = _grow(walk, position, pulled, begins)
    if walk.problem.with_jumps:
        state0, ct = lax.cond(
            eqxi.unvmap_any(crossed),
            lambda: _undo_jump(walk, crossed, clock.start, y0, state0, ct),
            lambda: (state0, ct),
        )
        y0, state0 = walk.settle(2 * step - 1, (y0, state0))
    if growth is not None:
        growth = growth.after_step(ct.params)
    hidden = position.hidden
    if hidden is not None:
        hidden = tree_add(hidden, pulled.hidden)
    position = walk.show_progress(position, clock.start)
    from_start = None if position.from_start is None else no
    return dataclasses.replace(
        position,
        step=step,
        y=y0,
        solver_state=state0,
        cotangent=ct,
        cursors=pulled.cursors,
        growth=growth,
        known=no,
        restarted=no | restarted,
        pending=pending,
        hidden=hidden,
        from_start=from_start,
    )


def _grow(
    walk: Walk, position: Position, pulled: PulledStep, begins: BoolScalarLike
) -> tuple[Growth | None, BoolScalarLike]:
    """The growth after a step was pulled back, and whether the backward pass restarts
    before it, unless the solve `begins` anew there."""
    growth, probe, parts = position.growth, pulled.probe, pulled.parts
    if growth is None:
        return None, jnp.array(False)
    departure = walk.departure
    assert probe is not None and departure is not None
    growth = growth.update(probe, departure, walk.before(position), parts)
    pending = (growth.spoils(probe, departure) | (parts > 1)) & jnp.logical_not(begins)
    return growth.count(pending), pending


def _begin(walk: Walk, position: Position, record: Record) -> Position:
    """The position with the clock at the step to undo, or at one of length zero, to which
    no cotangent is pulled back, for an element that waits."""
    _, args = walk.combine(walk.params)
    clock = record.undo(
        position.step - 1,
        position.clock,
        walk.problem.stepsize_controller,
        walk.residuals.count - 1,
        walk.residuals.record.outermost,
        position.y,
        args,
    )
    ct, moves = position.cotangent, position.moves
    if moves is not None:
        clock, ct = tree_select(moves, clock, position.clock.still), ct.where(moves)
    return dataclasses.replace(position, clock=clock, cotangent=ct)


def _undo_jump(
    walk: Walk,
    crossed: BoolScalarLike,
    t: RealScalarLike,
    y: Y,
    solver_state: SolverState,
    ct: Cotangent,
) -> tuple[SolverState, Cotangent]:
    """Undo the crossing of a jump just before `t`, if it was `crossed`."""
    solver = walk.problem.solver
    terms, args = walk.combine(walk.params)
    # Other members of a batch stay where they are: before the start of the solve, their
    # vector field may not be finite.
    just_before = lambda t: jnp.where(crossed, before_jump(t), t)
    before, _ = cross_jump(solver, terms, t, just_before(t), y, args, solver_state)

    def cross(context, y, state):
        after = context.times.of(t)
        times = just_before(after), after
        return cross_jump(solver, context.terms, *times, y, context.args, state)[0]

    _, ct = pull_change(walk, cross, y, before, ct, crossed)
    return tree_select(crossed, before, solver_state), ct
