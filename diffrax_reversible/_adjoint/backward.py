"""The backward pass: undo the steps of a solve and pull cotangents back through them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractTerm
from jaxtyping import Array, Float

from .._custom_types import BoolScalarLike, DenseInfo, IntScalarLike, Params
from .._diffrax import State
from .._jaxpr import reads
from .._solver.cotangent import Cotangent
from .._solver.pullback import HasPullback
from .._tree import tree_add, tree_replace
from .batch import Sharing
from .drift import replay_tolerance, tolerance
from .finish import pull_finish, PulledFinish
from .forward import Residuals
from .outputs import Cursor, materialise
from .position import Position
from .problem import Context, Inputs, Problem, save_states
from .pull_outputs import pull_dense_times, pull_last
from .replay import Replayer
from .shared import Shared
from .times import constant_times
from .walk import Walk
from .walks import run_walks


class Walked(NamedTuple):
    """The results of a backward pass.

    - `gradient`: the cotangent of the inputs.
    - `drift`: the largest error of the reconstruction at known states, or in time.
    - `drift_tol`: the accepted error.
    - `shares`: the fractions of the gradient that grew where the solution contracts.
    - `undone`, `replayed`: the numbers of steps undone and replayed.
    - `restarted`: the number of restarts of the backward pass.
    - `shared`: what of `gradient.context` is summed over a batch.
    """

    gradient: Inputs
    drift: Float[Array, ""]
    drift_tol: float
    shares: list[Float[Array, ""]]
    undone: IntScalarLike
    replayed: IntScalarLike
    restarted: IntScalarLike
    shared: Shared | None


def walk_back(
    inputs: Inputs,
    perturbed: Inputs,
    problem: Problem,
    residuals: Residuals,
    cotangent: State,
    sharing: Sharing,
    drift_tol: float | None,
    watch: Callable[[dict[str, Any]], None] | None,
) -> Walked:
    """Undo every step of a solve, and pull the cotangent of its outputs back.

    **Arguments:**

    - `inputs`, `problem`: the solve.
    - `perturbed`: which leaves of `inputs` are differentiated.
    - `residuals`: the residuals from `solve_and_record`.
    - `cotangent`: the cotangent of the final state, with `None` for zero.
    - `sharing`: the arrays of `inputs` that the members of a batch share.
    - `drift_tol`: the accepted error at known states. Where states can be held in between,
        the steps are undone again before a larger error is reported.
    - `watch`: a function called at every known state.
    """
    states = inputs.y0, inputs.solver_state
    params, nondiff = _split_context(inputs, perturbed, problem)
    walk = Walk(
        *(problem, residuals, Replayer(inputs, problem, residuals), params, nondiff),
        any(jtu.tree_leaves((perturbed.y0, perturbed.solver_state))),
        _differentiates_control(problem, params, nondiff),
        *(tolerance(drift_tol, states), replay_tolerance(drift_tol, states)),
        *(watch, sharing[0], Shared.of(sharing, inputs, perturbed)),
    )
    pulled = pull_finish(walk, cotangent)
    walk = dataclasses.replace(
        walk,
        outputs=pulled.outputs,
        dense_rows=_dense_rows(residuals, cotangent),
        end_dense=pulled.end_dense,
    )
    position = _at_the_end(residuals, cotangent, pulled)
    position = pull_last(walk, position)
    position = pull_dense_times(walk, position, cotangent)
    position, agree = run_walks(walk, position)
    problem.progress_meter.close(position.meter)
    return _walked(walk, position, agree)


def _split_context(
    inputs: Inputs, perturbed: Inputs, problem: Problem
) -> tuple[Params, Context]:
    """The differentiated leaves of `inputs.context`, and the rest."""
    params, nondiff = eqx.partition(inputs.context, perturbed.context)
    others = nondiff.times.prescribed
    if len(others) == 0:
        return params, nondiff
    others = constant_times(params.times.prescribed, others, problem.t0)
    return params, tree_replace(lambda c: c.times.prescribed, nondiff, others)


def _differentiates_control(problem: Problem, params: Params, nondiff: Context) -> bool:
    """Whether the control of a term depends on `params`, and the solver takes it as given.
    That of an `ODETerm` does not: it is `t1 - t0`."""
    solver, ends = problem.solver, (problem.t0, problem.t1)
    if not isinstance(solver, HasPullback) or solver.differentiates_control:
        return False

    def controls(params):
        terms = eqx.combine(params, nondiff).terms
        is_term = lambda x: isinstance(x, AbstractTerm)
        return [x.contr(*ends) for x in jtu.tree_leaves(terms, is_leaf=is_term)]

    return any(reads(controls, params))


def _dense_rows(residuals: Residuals, cotangent: State) -> DenseInfo | None:
    """The cotangents of the interpolation data of all steps, if dense output has one."""
    if len(jtu.tree_leaves(cotangent.dense_infos)) == 0:
        return None
    return materialise(cotangent.dense_infos, residuals.dense_structs)


def _at_the_end(residuals: Residuals, cotangent: State, pulled: PulledFinish) -> Position:
    """The position at which the walk begins."""
    record, checkpoints, end = residuals.record, residuals.kept.checkpoints, residuals.end
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
        jnp.array(False),
        jnp.maximum(checkpoints.step_before(residuals.count), record.first),
        None,
    )


def _walked(walk: Walk, position: Position, agree: BoolScalarLike) -> Walked:
    """The results, from the position at which the walk ended. Growth does not matter if two
    walks `agree`."""
    ct = position.cotangent
    if position.params_cotangent is not None:
        params_bar = tree_add(position.params_cotangent, ct.params)
        ct = dataclasses.replace(ct, params=params_bar)
    # The tolerance of the state bounds errors in time too; NaN refuses an unfinished walk.
    in_time = jnp.where(position.done, position.clock.drift, jnp.nan)
    drift = jnp.maximum(position.drift, in_time.astype(jnp.float32))
    shares, restarted = walk.shares(position), jnp.array(0)
    if (growth := position.growth) is not None:
        matters = growth.matters(ct.params) & jnp.logical_not(agree)
        shares = [jnp.where(matters, share, 0) for share in shares]
        # Nothing need grow any more, but the last two walks have to agree.
        doubtful = (growth.plan.divides > 0) & jnp.logical_not(agree)
        shares = [jnp.where(doubtful, jnp.inf, share) for share in shares]
        restarted = growth.restarts
    params_bar, shared = ct.params, walk.shared
    if shared is not None:
        params_bar = shared.check(params_bar)
    gradient = Inputs(ct.y, ct.solver_state, params_bar)
    counts = position.undone, position.replayed, restarted
    return Walked(gradient, drift, walk.drift_tol, shares, *counts, shared)
