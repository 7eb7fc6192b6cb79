"""Between two steps of the walk: known states, restarts and replays."""

import dataclasses

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import BoolScalarLike, IntScalarLike, SolverState
from .._solver.capabilities import CanRestart, interrupt
from .._solver.pullback import Cotangent
from .._tree import tree_add, tree_replace, tree_zeros_like
from .drift import Drift
from .judge import beside_rounding, judge
from .kept import Kept
from .known import Known
from .pull_restart import pull_restart
from .undo_step import undo_step
from .walk import Position, Walk


def go_on(walk: Walk, position: Position, kept: Kept) -> tuple[Position, Kept]:
    """Continue from a known state where the step before cannot be undone, and compare the
    reconstruction with it. If that state is not held, or the steps before it are not
    recorded, the solve is replayed from the last state that is held.

    Elements of a batch that can undo their next step do nothing here.
    """
    assert kept.record is not None and kept.checkpoints is not None
    step = position.step
    here = jnp.logical_not(position.undoes_next | position.done)
    # A known position continues from an earlier state.
    held = jnp.logical_not(position.known) & kept.checkpoints.held(step)
    replays = here & jnp.logical_not(held)
    limit = step + jnp.where(held, 1, 0)
    known = kept.checkpoints.before(limit, walk.replayer.start)
    if walk.replays:
        before = known.step
        known, kept = lax.cond(
            eqxi.unvmap_any(replays),
            lambda: _replay(walk, known, kept, step, replays, position.least_reach),
            lambda: (known, kept),
        )
        count = position.replayed + jnp.where(replays, known.step - before, 0)
        position = dataclasses.replace(position, replayed=count)
    position = _come_to(walk, position, known, here)
    assert kept.record is not None and kept.checkpoints is not None
    replayed, step = replays & (position.step == step), position.step
    stop = jnp.maximum(kept.checkpoints.step_before(step), kept.record.first)
    if walk.repeats:
        # Otherwise replay the steps first, to hold states in between.
        goes_on = step - stop <= position.least_reach
        goes_on &= kept.record.reaches(step, walk.residuals.count - 1)
        stop = jnp.where(replayed | goes_on, stop, step)
    stop = jnp.where(here, stop, position.stop)
    position = eqx.tree_at(lambda p: p.stop, position, stop)
    if walk.pulls_from_start:
        position = _pull_from_start(walk, position, kept, here)
    return position, kept


def _pull_from_start(
    walk: Walk, position: Position, kept: Kept, here: BoolScalarLike
) -> Position:
    """Pull back through a single step from its start, a known state, if the walk missed
    that state when it undid the step."""
    solver, record, checkpoints = walk.problem.solver, kept.record, kept.checkpoints
    assert record is not None and checkpoints is not None

    def alone(position):
        start = position.step - 1
        single = position.undoes_next & (position.stop == start) & checkpoints.held(start)
        return here & single & (position.reach == 0)

    def pull(position):
        known = checkpoints.before(position.step, walk.replayer.start)
        terms, args = walk.combine(walk.params)
        step = known.t, known.y, args, known.solver_state
        before = record.before(position.step - 1)
        state, _, _ = interrupt(solver, terms, *step, *before)
        return undo_step(walk, position, record, (known.y, state))

    # A loop of at most one iteration updates in place, and only the elements that need it.
    return lax.while_loop(alone, pull, position)


def _replay(
    walk: Walk,
    known: Known,
    kept: Kept,
    step: IntScalarLike,
    replays: BoolScalarLike,
    reach: IntScalarLike,
) -> tuple[Known, Kept]:
    last = walk.residuals.count - 1, walk.residuals.record.last_end
    most = walk.residuals.end.num_steps
    new, replayed = walk.replayer.run(known, kept, step, last, most, replays, reach)
    assert replayed.record is not None and kept.record is not None
    # Elements that do not replay have written and held nothing.
    record = replayed.record.where(replays, kept.record)
    kept = tree_replace(
        lambda k: (k.record, k.checkpoints), kept, (record, replayed.checkpoints)
    )
    return new.where(replays, known), kept


def _come_to(
    walk: Walk, position: Position, known: Known, here: BoolScalarLike
) -> Position:
    """Replace the reconstruction by the `known` state, if this element is `here`."""
    restarted = position.restarted & here
    ct, state = position.cotangent, known.solver_state
    if walk.residuals.restartable:
        state, ct = lax.cond(
            eqxi.unvmap_any(restarted),
            lambda: _undo_restart(walk, known, ct, restarted),
            lambda: (state, ct),
        )
    assert position.origin is not None
    single = position.origin.step - position.step <= 1
    misses = walk.drifts(position, (known.y, state), beside_rounding(walk, single))
    walked, beside = ([getattr(m, name) for m in misses] for name in Drift._fields)
    if walk.repeats:
        # A single step cannot be divided, and the solve itself rounds as much.
        walked = [jnp.where(single, b, w) for b, w in zip(beside, walked, strict=True)]
    # Rounding errors in the solver state grow up to a restart, and differ when a step is
    # recomputed.
    of_y = len(jtu.tree_leaves(eqx.filter(known.y, eqx.is_inexact_array)))
    for misses in (walked, beside):
        misses[of_y:] = [jnp.where(position.known, 0, w) for w in misses[of_y:]]
    clock = position.clock
    controller_state = clock.controller_state
    if walk.residuals.record.outermost is not None:
        controller_state = eqx.combine(known.controller_state, controller_state)
    clock = clock.set(known.t, known.last_end, controller_state, here)
    new, old = (known.y, known.solver_state), (position.y, position.solver_state)
    y, state = jtu.tree_map(lambda n, o: jnp.where(here, n, o), new, old)
    arrived = dataclasses.replace(
        position,
        clock=clock,
        y=y,
        solver_state=state,
        cotangent=ct,
        known=position.known | here,
        restarted=position.restarted & jnp.logical_not(here),
    )
    return _go_back(walk, position, arrived, walked, beside, here)


def _go_back(
    walk: Walk,
    position: Position,
    arrived: Position,
    walked: list[Float[Array, ""]],
    beside: list[Float[Array, ""]],
    here: BoolScalarLike,
) -> Position:
    """The position to continue from, if this element is `here`: the known state at which
    the walk `arrived` or, if it missed that by too much, the origin of the segment, to
    undo the steps again with known states in between."""
    origin, drifts = position.origin, position.drifts
    assert origin is not None and drifts is not None
    missed, parted, reach = jnp.array(False), position.parted, position.reach
    if walk.repeats:
        # A conditional keeps XLA from repeating all this for every array that is chosen.
        missed, parted, reach = lax.cond(
            eqxi.unvmap_any(here),
            lambda: judge(walk, position, arrived, walked, beside, here),
            lambda: (missed, parted, reach),
        )
    if len(walked) > 0:
        worst = jnp.max(jnp.stack([w.astype(jnp.float32) for w in walked]))
        miss = worst / walk.drift_tol
        walk.tell(here, arrived, position.restarted, miss, missed)
    new = arrived.as_origin(walk.repeats)
    choose = lambda pred, x, y: jtu.tree_map(lambda x, y: jnp.where(pred, x, y), x, y)
    counts = here & jnp.logical_not(missed)
    if walk.drift_tol < walk.replay_tol:
        share = walk.drift_tol / walk.replay_tol
        walked = [jnp.where(position.known, share * w, w) for w in walked]
    undone = position.undone + jnp.where(here, origin.step - position.step, 0)
    params_cotangent = None
    if walk.repeats:
        params_bar = arrived.cotangent.params
        added = choose(counts, params_bar, tree_zeros_like(params_bar))
        params_cotangent = tree_add(position.params_cotangent, added)
        # Plain zeros would not wait for the sum, and XLA would copy the summand.
        zeros = jtu.tree_map(jnp.subtract, params_cotangent, params_cotangent)
        arrived = eqx.tree_at(
            lambda p: p.cotangent.params,
            choose(missed, origin, new),
            choose(here, zeros, params_bar),
            is_leaf=lambda x: x is None,
        )
    return dataclasses.replace(
        arrived,
        origin=choose(counts, new, origin),
        reach=reach,
        parted=parted,
        undone=undone,
        replayed=position.replayed,
        meter=position.meter,
        hidden=jtu.tree_map(lambda x: jnp.where(here, 0, x), position.hidden),
        drifts=[
            jnp.maximum(d, jnp.where(counts, w, 0))
            for d, w in zip(drifts, walked, strict=True)
        ],
        params_cotangent=params_cotangent,
    )


def _undo_restart(
    walk: Walk, known: Known, ct: Cotangent, restarted: BoolScalarLike
) -> tuple[SolverState, Cotangent]:
    """The solver state after a restart, and the cotangent before it, if this element of
    a batch was `restarted`."""
    solver = walk.problem.solver
    assert isinstance(solver, CanRestart)
    terms, args = walk.combine(walk.params)
    # Not the output of the linearised restart, which might round differently.
    state = solver.restart(terms, known.t, known.y, args, known.solver_state)
    before = pull_restart(walk, known.t, known.y, known.solver_state, ct)
    return jtu.tree_map(
        lambda n, o: jnp.where(restarted, n, o),
        (state, before),
        (known.solver_state, ct),
    )
