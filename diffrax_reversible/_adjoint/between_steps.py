"""Between two steps of the walk: known states, restarts and replays."""

import dataclasses

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractBrownianPath
from jaxtyping import Array, Float

from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    RealScalarLike,
    SolverState,
)
from .._solver.capabilities import CanRestart, interrupt
from .._solver.pullback import Cotangent
from .._tree import tree_add, tree_replace, tree_zeros_like
from .drift import coarsest_eps, Drift
from .kept import Kept
from .known import Known
from .undo_step import undo_step
from .walk import longest_reach, Position, Walk


# Fractions of the tolerance. The walk repeats a segment whose miss exceeds both the first,
# tuned on `examples/benchmarks/outcomes.py`, and the segment's share of the second, by
# which eight segments may miss together. After a miss below the third, the number of steps
# between known states doubles.
_repeated, _repeated_of_all, _well = 1 / 64, 1 / 8, 1 / 512
# Rounding errors, in machine epsilons of the largest entry of an array: negligible for a
# gradient, and allowed in a single step.
_rounding, _rounding_of_step = 4, 16


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
    misses = walk.drifts(position, (known.y, state), _beside_rounding(walk, single))
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
            lambda: _judge(walk, position, arrived, walked, beside, here),
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


def _judge(
    walk: Walk,
    position: Position,
    arrived: Position,
    walked: list[Float[Array, ""]],
    beside: list[Float[Array, ""]],
    here: BoolScalarLike,
) -> tuple[BoolScalarLike, RealScalarLike, IntScalarLike]:
    """Whether the walk missed a known state, the largest error of a replay so far, and the
    next number of steps between known states, which adapts as step sizes do."""
    origin, drifts, reach = position.origin, position.drifts, position.reach
    assert origin is not None and drifts is not None
    # NaN if the walk has overflowed.
    off = [w.astype(jnp.float32) for w in beside]
    worst = jnp.max(jnp.stack([w.astype(jnp.float32) for w in walked]))
    within = worst <= walk.drift_tol
    if walk.residuals.record.outermost is not None:
        # Recorded times are exact, unless the solve was replayed.
        off.append(position.clock.off(arrived.clock.start).astype(jnp.float32))
    off = jnp.max(jnp.stack(off))
    parted = jnp.maximum(position.parted, jnp.where(here & position.known, off, 0))
    so_far = jnp.array([d <= walk.drift_tol for d in drifts]).all()
    so_far = so_far & (position.clock.drift <= walk.drift_tol)
    length = origin.step - position.step
    right = within & (off <= _allowed(walk, parted, length))
    several = (length > 1) & (reach > 1)
    missed = several & jnp.logical_not(right)
    if walk.pulls_from_start:
        # A single step that misses is not undone again.
        missed |= (length == 1) & (reach > 0) & jnp.logical_not(within)
    missed &= here & so_far
    well = max(_well * walk.drift_tol, _rounding * coarsest_eps(walk.start_states))
    well = (off <= well) & (worst <= _repeated_of_all * walk.drift_tol)
    well = here & well & (2 * length >= reach)
    fewer = jnp.maximum(jnp.minimum(reach, length) // 4, jnp.where(several, 1, 0))
    more = jnp.maximum(2 * reach, 1)
    reach = jnp.where(well, more, jnp.where(missed, fewer, reach))
    return missed, parted, jnp.minimum(reach, longest_reach)


def _beside_rounding(walk: Walk, single: BoolScalarLike) -> RealScalarLike:
    """The least scale of an entry, as a fraction of the largest in its array, for deciding
    whether to undo steps again, and whether a `single` step misses.

    An entry of a vector field is a sum, and rounds as its terms do. With this scale, so
    many epsilons of the largest entry are no miss.
    """
    epsilons = jnp.where(single, _rounding_of_step, _rounding)
    rounding = coarsest_eps(walk.start_states) * epsilons
    allowed = walk.drift_tol * jnp.where(single, 1, _repeated)
    return rounding / jnp.maximum(allowed, rounding)


def _allowed(
    walk: Walk, parted: Float[Array, ""], length: IntScalarLike
) -> Float[Array, ""]:
    """The largest miss of a known state after which a segment of `length` steps is kept.

    This is a fraction of the tolerance, so that gradients are more accurate than required.
    It is larger, up to the tolerance, if a replay has `parted` further from the solve. With
    a Brownian path it is the tolerance, as the path turns an ulp of time into the square
    root of an ulp.
    """
    terms, _ = walk.combine(walk.params)
    is_path = lambda x: isinstance(x, AbstractBrownianPath)
    random = any(map(is_path, jtu.tree_leaves(terms, is_leaf=is_path)))
    count = jnp.maximum(walk.residuals.count, 1)
    share = jnp.asarray(length, jnp.float32) / count.astype(jnp.float32)
    least = 1 if random else jnp.maximum(_repeated, _repeated_of_all * share)
    return jnp.clip(parted, least * walk.drift_tol, walk.drift_tol)


def _undo_restart(
    walk: Walk, known: Known, ct: Cotangent, restarted: BoolScalarLike
) -> tuple[SolverState, Cotangent]:
    """The solver state after a restart, and the cotangent before it, if this element of
    a batch was `restarted`."""
    solver = walk.problem.solver
    assert isinstance(solver, CanRestart)
    diff_state, nondiff_state = eqx.partition(known.solver_state, eqx.is_inexact_array)

    def restart(y, diff_state, params):
        context = walk.context(params)
        state = eqx.combine(diff_state, nondiff_state)
        return solver.restart(
            context.terms, context.times.of(known.t), y, context.args, state
        )

    _, pull = eqx.filter_vjp(restart, known.y, diff_state, walk.params)
    y_bar, state_bar, params_bar = pull(ct.solver_state)
    # The output of `filter_vjp` might round differently from the solve.
    after = restart(known.y, diff_state, walk.params)
    before = Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
    return jtu.tree_map(
        lambda n, o: jnp.where(restarted, n, o),
        (after, before),
        (known.solver_state, ct),
    )
