"""Between two steps of the walk: known states, restarts and replays."""

import dataclasses
import functools as ft

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import BoolScalarLike, IntScalarLike, Params
from .._solver.interrupted_solver import interrupt
from .._tree import tree_add, tree_cond, tree_zeros_like
from .drift import largest_drift
from .judge import Arrival, beside_rounding, judge
from .kept import Kept
from .known import Known
from .position import params_of, Position, with_params, without_params
from .pull_restart import pull_restart
from .shared import params_where
from .walk import Walk


# While some elements of a batch need a replay, the rest undo at least so many steps.
_least_waited = 8


def go_on(walk: Walk, position: Position, kept: Kept) -> tuple[Position, Kept]:
    """Continue from a known state where the step before cannot be undone, and compare the
    reconstruction with it. If that state is not held, or the steps before it are not
    recorded, the solve is replayed from the last state that is held.

    Elements of a batch that can undo their next step do nothing here.
    """
    step = position.step
    here = position.needs_known
    # A known position continues from an earlier state.
    held = jnp.logical_not(position.known) & kept.checkpoints.held(step)
    replays = here & jnp.logical_not(held)
    limit = step + jnp.where(held, 1, 0)
    known = kept.checkpoints.before(limit, walk.replayer.start)
    if walk.replays and walk.shared is None:
        waits = _waits(position, step - known.step, replays)
        waited = jnp.where(waits, jnp.maximum(position.waited, 0), -1)
        position = dataclasses.replace(position, waited=waited)
        here, replays = here & jnp.logical_not(waits), replays & jnp.logical_not(waits)
    if walk.replays:
        before = known.step
        known, kept = lax.cond(
            eqxi.unvmap_any(replays),
            lambda: _replay(walk, known, kept, step, replays, position.least_reach),
            lambda: (known, kept),
        )
        count = position.replayed + jnp.where(replays, known.step - before, 0)
        position = dataclasses.replace(position, replayed=count)
    params = params_of(position)
    if position.growth is not None and walk.repeats:
        growth = position.growth.at_known(position.cotangent.params, here)
        position = dataclasses.replace(position, growth=growth)
    rest = without_params(position)
    arrived, missed = _come_to(walk, rest, known, here)
    arrived = _plan(walk, arrived, kept, step, replays)
    position = _either(here, arrived, rest)
    if walk.repeats:
        params = _add(walk, *params, here, missed)
    return pull_restart(walk, with_params(position, params)), kept


def _either(here: BoolScalarLike, arrived: Position, rest: Position) -> Position:
    """The position, whose `origin` has been chosen by `arrived`."""
    without = ft.partial(dataclasses.replace, origin=None)
    position = tree_cond(here, without(arrived), without(rest))
    return dataclasses.replace(position, origin=arrived.origin)


def _waits(
    position: Position, length: IntScalarLike, replays: BoolScalarLike
) -> BoolScalarLike:
    """Whether an element that needs a replay, over a `length` of steps, waits for more of
    its batch to need one. A replay takes all elements as long as the longest, so that they
    wait for as many steps as that has."""
    others = jnp.logical_not(replays | position.done)
    longest = eqxi.unvmap_max(jnp.where(replays, length, 0))
    enough = eqxi.unvmap_any(position.waited >= jnp.maximum(longest, _least_waited))
    return replays & eqxi.unvmap_any(others) & jnp.logical_not(enough)


def _add(
    walk: Walk,
    params_bar: Params,
    total: Params,
    here: BoolScalarLike,
    missed: BoolScalarLike,
) -> tuple[Params, Params]:
    """Add a segment's cotangent of the parameters to the `total`, unless the walk `missed`
    its known state, and begin the next with zeros, if this element is `here`."""
    where = ft.partial(params_where, walk.shared)
    counts = here & jnp.logical_not(missed)
    nothing = jtu.tree_map(jnp.zeros_like, params_bar)
    total = tree_add(total, where(counts, params_bar, nothing))
    # Plain zeros would not wait for the sum, and XLA would copy the summand.
    zeros = jtu.tree_map(jnp.subtract, total, total)
    return where(here, zeros, params_bar), total


def _plan(
    walk: Walk,
    position: Position,
    kept: Kept,
    step: IntScalarLike,
    replayed: BoolScalarLike,
) -> Position:
    """Find the next stop, where the solve was `replayed` up to a `step`, if at all, and
    whether to pull back through the next step from its start."""
    record, checkpoints = kept.record, kept.checkpoints
    stop = jnp.maximum(checkpoints.step_before(position.step), record.first)
    if walk.repeats:
        # Otherwise replay the steps first, to hold states in between.
        goes_on = position.step - stop <= position.least_reach
        goes_on &= record.reaches(position.step, walk.residuals.count - 1)
        goes_on |= replayed & (position.step == step)
        stop = jnp.where(goes_on, stop, position.step)
    from_start = position.from_start
    if walk.pulls_from_start:
        # The walk missed the start of this step, a known state, when it undid the step.
        from_start = (position.reach == 0) & (stop == position.step - 1)
        from_start &= jnp.logical_not(position.restarted) & checkpoints.held(stop)
    return dataclasses.replace(position, stop=stop, from_start=from_start)


def _replay(
    walk: Walk,
    known: Known,
    kept: Kept,
    step: IntScalarLike,
    replays: BoolScalarLike,
    reach: IntScalarLike,
) -> tuple[Known, Kept]:
    new, replayed = walk.replayer.run(known, kept, step, replays, reach)
    # Elements that do not replay have written and held nothing.
    record = replayed.record.where(replays, kept.record)
    checkpoints = replayed.checkpoints
    kept = dataclasses.replace(kept, record=record, checkpoints=checkpoints)
    return tree_cond(replays, new, known), kept


def _come_to(
    walk: Walk, position: Position, known: Known, here: BoolScalarLike
) -> tuple[Position, BoolScalarLike]:
    """Replace the reconstruction by the `known` state, if this element of a batch is
    `here`. See `_go_back`."""
    restarted = position.restarted & here
    state = known.solver_state
    if walk.residuals.restartable:
        terms, args = walk.combine(walk.params)
        begins = terms, known.t, known.y, args, state
        state, _, _ = interrupt(walk.problem.solver, *begins, restarted, False)
    assert position.origin is not None
    single = position.origin.step - position.step <= 1
    misses = walk.drifts(position, (known.y, state), beside_rounding(walk, single))
    # Rounding errors in the solver state grow up to a restart, and differ when a step is
    # recomputed.
    count = len(jtu.tree_leaves(eqx.filter(known.y, eqx.is_inexact_array)))
    parts = largest_drift(misses[:count]), largest_drift(misses[count:])
    worst, beside = (
        jnp.maximum(of_y, jnp.where(position.known, 0, of_state))
        for of_y, of_state in zip(*parts, strict=True)
    )
    if walk.repeats:
        # A single step cannot be divided, and the solve itself rounds as much.
        worst = jnp.where(single, beside, worst)
    clock = position.clock
    controller_state = clock.controller_state
    if walk.residuals.record.outermost is not None:
        controller_state = eqx.combine(known.controller_state, controller_state)
    arrived = dataclasses.replace(
        position,
        clock=clock.set(known.t, known.last_end, controller_state),
        y=known.y,
        solver_state=known.solver_state,
        known=jnp.array(True),
        restarted=jnp.array(False),
        pending=position.restarted,
    )
    return _go_back(walk, position, Arrival(arrived, worst, beside, here))


def _go_back(
    walk: Walk, position: Position, arrival: Arrival
) -> tuple[Position, BoolScalarLike]:
    """The position to continue from: the known state of the `arrival` or, if the walk
    missed that by too much, the origin of the segment, to undo the steps again with known
    states in between. Also returns whether it missed."""
    origin = position.origin
    assert origin is not None
    arrived, worst, _, here = arrival
    missed, parted, reach = jnp.array(False), position.parted, position.reach
    if walk.repeats:
        # A conditional keeps XLA from repeating all this for every array that is chosen.
        missed, parted, reach = lax.cond(
            eqxi.unvmap_any(here),
            lambda: judge(walk, position, arrival),
            lambda: (missed, parted, reach),
        )
    if walk.repeats and walk.shared is not None:
        # What the batch shares has a single sum, which counts for all or for none.
        all_miss = here & eqxi.unvmap_any(missed)
        reach = jnp.where(all_miss & jnp.logical_not(missed), position.reach, reach)
        missed = all_miss
    miss = jnp.where(worst == 0, 0, worst / walk.drift_tol)
    walk.tell(here, arrived, position.restarted, miss, missed)
    begins = here & jnp.logical_not(missed)
    new = tree_cond(begins, arrived.as_origin(walk.repeats), origin)
    if walk.drift_tol < walk.replay_tol:
        share = walk.drift_tol / walk.replay_tol
        worst = jnp.where(position.known, share * worst, worst)
    undone = position.undone + origin.step - position.step
    # The position has arrived at the new origin, or goes back to the old one.
    arrived = dataclasses.replace(
        new if walk.repeats else arrived,
        origin=new,
        stop=position.stop,
        reach=reach,
        parted=parted,
        waited=position.waited,
        from_start=position.from_start,
        undone=undone,
        replayed=position.replayed,
        meter=position.meter,
        hidden=tree_zeros_like(position.hidden),
        drift=jnp.maximum(position.drift, jnp.where(missed, 0, worst)),
    )
    return arrived, missed
