"""The walk back along the steps of a solve, pulling cotangents along."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import DenseInfo, IntScalarLike
from .._diffrax import State
from .._solver.base import (
    advance_densely,
    Cotangent,
    linearise_step,
    Start,
)
from .._tree import tree_add, tree_replace, tree_zeros_like
from .between_steps import go_on, undo_jump
from .drift import tolerance
from .finish import pull_finish, PulledFinish
from .forward import Residuals
from .outputs import Cursor, materialise
from .problem import Inputs, Problem, save_states
from .pull_outputs import pull_dense, pull_dense_times, pull_start, pull_step_outputs
from .replay import Replayer
from .steps import Record
from .walk import Position, Walk


def _undo_step(walk: Walk, position: Position, record: Record) -> Position:
    """One step of the walk."""
    step = position.step - 1
    _, args = walk.bind(walk.params)
    clock = record.undo(
        step,
        position.clock,
        walk.problem.stepsize_controller,
        walk.residuals.count - 1,
        walk.residuals.record.outermost,
        position.y,
        args,
    )
    position = eqx.tree_at(lambda p: p.clock, position, clock)
    restarted, crossed = record.before(step)
    t0, t1 = clock.start, clock.end
    position = pull_step_outputs(walk, position, t1)
    solver = walk.problem.solver
    # A start that was restarted from, or was before a jump, is another.
    is_known = (step == 0) & jnp.logical_not(jnp.logical_or(restarted, crossed))
    start = Start(is_known, walk.inputs.y0, walk.inputs.solver_state)
    solver_state = solver.recall(position.solver_state, record.recorded_before(step))
    state = position.y, solver_state
    ct = position.cotangent
    interpolated = [i for i, output in enumerate(walk.outputs) if output.sub.ts is not None]
    linear = all(walk.outputs[i].saves_state for i in interpolated)
    if linear and not walk.differentiates_times:
        dense_bar = None
        if len(interpolated) > 0 or walk.with_dense:
            # Nothing but its shapes is used: interpolations are linear.
            dense_info = _dense_struct(walk, t0, t1, *state)
            dense_bar, ct, cursors = pull_dense(
                walk, position, interpolated, t0, t1, dense_info
            )
            position = eqx.tree_at(lambda p: p.cursors, position, cursors)
        y0, state0, ct = solver.inverse_step_and_pullback(
            walk.bind, walk.params, t0, t1, *state, ct, dense_bar, start
        )
        probe = ct.probe
    else:

        def step_times(params):
            times = walk.context(params).times
            return times.of(t0), times.of(t1)

        y0, state0, dense_info, pull = linearise_step(
            solver, walk.bind, walk.params, t0, t1, *state, start, step_times
        )
        dense_bar, ct, cursors = pull_dense(
            walk, position, interpolated, t0, t1, dense_info
        )
        position = eqx.tree_at(lambda p: p.cursors, position, cursors)
        ct, probe = pull(ct, dense_bar), None
    growth = position.growth
    if growth is not None:
        if probe is None:
            bars = ct, dense_bar
            probe = solver.probe(walk.bind, walk.params, t0, t1, y0, *bars)
        assert probe is not None
        growth = growth.update(probe)
    ct = Cotangent(ct.y, ct.solver_state, ct.params)
    if walk.problem.with_jumps:
        state0, ct = lax.cond(
            eqxi.unvmap_any(crossed),
            lambda: undo_jump(walk, crossed, t0, y0, state0, ct),
            lambda: (state0, ct),
        )
    no = jnp.array(False)
    return tree_replace(
        lambda p: (
            *(p.step, p.y, p.solver_state, p.cotangent),
            *(p.growth, p.known, p.restarted),
        ),
        position,
        (step, y0, state0, ct, growth, no, no | restarted),
    )


def _pull_init(walk: Walk, position: Position) -> Position:
    """The solver state that the solve began with, unless it was given.

    It is made here again, and its activations are not held on to meanwhile.
    """
    problem, ct = walk.problem, position.cotangent
    if problem.passed_solver_state:
        return position

    def init(y, params):
        context = walk.context(params)
        step = context.times.t0, context.times.of(problem.init_state.tnext)
        state = problem.solver.init(context.terms, *step, y, context.args)
        return eqx.filter(state, eqx.is_inexact_array)

    _, pull = jax.vjp(init, position.y, walk.params)
    y_bar, params_bar = pull(ct.solver_state)
    state_bar = tree_zeros_like(ct.solver_state)
    ct = Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
    return eqx.tree_at(lambda p: p.cotangent, position, ct)


def _dense_struct(walk: Walk, t0, t1, y, solver_state) -> DenseInfo:
    terms, args = walk.bind(walk.params)
    _, _, dense_info, _, _ = eqx.filter_eval_shape(
        advance_densely, walk.problem.solver, terms, t0, t1, y, args, solver_state
    )
    return dense_info


# Of a position, while steps are undone.
_stays = ("origin", "reach", "drifts", "undone", "replayed", "params_cotangent")

# In a batch, elements that can undo steps make so many of them while others wait for a
# known state.
_at_once = 16


def _undo_all(walk: Walk, position: Position) -> Position:
    """The whole walk: what cannot be undone is seen to outside of the loop over steps."""

    def undo_steps(position, kept):
        def undoes(carry):
            position, count = carry
            waits = jnp.logical_not(position.undoes_next | position.done)
            waits = eqxi.unvmap_any(waits) & (count >= _at_once)
            return position.undoes_next & jnp.logical_not(waits)

        def undo(carry):
            position, count = carry
            return _undo_step(walk, position, kept.record), count + 1

        moves = dataclasses.replace(position, **{name: None for name in _stays})
        moved, _ = lax.while_loop(undoes, undo, (moves, jnp.array(0)))
        stays = {name: getattr(position, name) for name in _stays}
        return dataclasses.replace(moved, **stays)

    def segment(carry):
        position, kept = carry
        return go_on(walk, undo_steps(position, kept), kept)

    kept = walk.residuals.kept
    if not walk.stops:
        # In memory for fewer states.
        return go_on(walk, undo_steps(position, kept), kept)[0]

    def on_the_way(carry):
        return eqxi.unvmap_any(jnp.logical_not(carry[0].done))

    return lax.while_loop(on_the_way, segment, (position, kept))[0]


class Walked(NamedTuple):
    """What has come of a walk back.

    - `gradient`: the cotangent of what was solved.
    - `drifts`: how far the walk was off where it could be checked.
    - `shares`: which part of the cotangent has grown where the solution contracts.
    - `undone`, `replayed`: how many steps were.
    """

    gradient: Inputs
    drifts: list[Float[Array, ""]]
    shares: list[Float[Array, ""]]
    undone: IntScalarLike
    replayed: IntScalarLike


def walk_back(
    inputs: Inputs,
    perturbed: Inputs,
    problem: Problem,
    residuals: Residuals,
    cotangent: State,
    drift_tol: float | None,
) -> Walked:
    """Undo every step of a solve, and pull the cotangent of its outputs back.

    **Arguments:**

    - `inputs`, `problem`: what was solved.
    - `perturbed`: which leaves of `inputs` are differentiated.
    - `residuals`: what `solve_and_record` kept of it.
    - `cotangent`: as the final state of the solve, with `None` for zero.
    - `drift_tol`: by how much known states may be missed. Where there is room for others in
        between, the steps are undone once more, before it is told that they were.
    """
    params, nondiff = eqx.partition(inputs.context, perturbed.context)
    with_times = any(jtu.tree_leaves(perturbed.context.times))
    pulled = pull_finish(inputs, params, nondiff, problem, residuals, cotangent, with_times)
    dense_rows = None
    if len(jtu.tree_leaves(cotangent.dense_infos)) > 0:
        dense_rows = materialise(cotangent.dense_infos, residuals.dense_structs)
    walk = Walk(
        inputs,
        problem,
        residuals,
        Replayer(inputs, problem),
        pulled.outputs,
        dense_rows,
        pulled.end_dense,
        params,
        nondiff,
        with_times,
        tolerance(drift_tol, (inputs.y0, inputs.solver_state)),
    )
    position = _at_the_end(residuals, cotangent, pulled)
    position = pull_dense_times(walk, position, cotangent)
    position = walk.start(position)
    position = _undo_all(walk, position)
    position = pull_start(walk, position)
    position = _pull_init(walk, position)
    return _walked(position, perturbed)


def _at_the_end(residuals: Residuals, cotangent: State, pulled: PulledFinish) -> Position:
    """Where the walk begins."""
    record, checkpoints, end = residuals.record, residuals.kept.checkpoints, residuals.end
    assert checkpoints is not None
    saved = [save_states(end)[output.index] for output in pulled.outputs]
    return Position(
        residuals.count,
        record.clock(end),
        end.y,
        end.solver_state,
        Cotangent(
            tree_add(materialise(cotangent.y, end.y), pulled.y),
            materialise(cotangent.solver_state, end.solver_state),
            pulled.params,
        ),
        [Cursor(s.save_index, s.saveat_ts_index) for s in saved],
        jnp.logical_not(record.restarted),
        record.restarted,
        jnp.maximum(checkpoints.step_before(residuals.count), record.first),
        None,
    )


def _walked(position: Position, perturbed: Inputs) -> Walked:
    """Where the walk has ended."""
    ct, drifts = position.cotangent, position.drifts
    assert drifts is not None
    if position.params_cotangent is not None:
        params_bar = tree_add(position.params_cotangent, ct.params)
        ct = dataclasses.replace(ct, params=params_bar)
    if len(drifts) > 0:
        # Judged by the tolerance for the state.
        drifts = [*drifts, position.clock.drift.astype(drifts[0].dtype)]
    shares = []
    if position.growth is not None:
        differentiates_y = any(jtu.tree_leaves((perturbed.y0, perturbed.solver_state)))
        shares = position.growth.shares(ct.y, beside_all=not differentiates_y)
    gradient = Inputs(ct.y, ct.solver_state, ct.params)
    return Walked(gradient, drifts, shares, position.undone, position.replayed)
