"""A solve and its backward pass, as a function with a custom gradient."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import is_okay

from .._diffrax import State
from .._tree import any_nonzero, tree_replace
from .backward import walk_back, Walked
from .batch import call_in_batches, Sharing
from .drift import refuse_wrong
from .forward import default_checkpoints, solve_and_record, solve_plainly
from .partition import detach
from .problem import Inputs, Problem, save_states
from .validate import (
    collective_outside,
    differentiate_once,
    first_step_alone,
    moving_steps,
    steps_move_with,
    steps_that_follow_the_state,
)


class Settings(NamedTuple):
    """The settings of `ReversibleAdjoint` and `diffeqsolve`."""

    checkpoints: int | None
    drift_tol: float | None
    report: Callable[[dict[str, int]], None] | None
    watch: Callable[[dict[str, Any]], None] | None
    throw: bool


def reversible_loop(
    inputs: Inputs, problem: Problem, settings: Settings
) -> tuple[State, dict]:
    """The final state, which can be differentiated, and the statistics."""
    final_state, aux_stats = call_in_batches(_solve, inputs, problem, settings)
    return _differentiate_outputs_only(final_state), aux_stats


def _differentiate_outputs_only(final_state: State) -> State:
    """Detach everything but the outputs, as the backward pass holds it fixed."""

    def outputs(state):
        saved = [(save_state.ts, save_state.ys) for save_state in save_states(state)]
        outputs = [x for pair in saved for x in pair]
        outputs += [state.dense_ts, state.dense_infos, state.y, state.solver_state]
        return [output for output in outputs if output is not None]

    detached = jtu.tree_map(detach, final_state)
    return eqx.tree_at(outputs, detached, outputs(final_state))


@eqx.filter_custom_vjp
def _solve(inputs: Inputs, problem: Problem, settings: Settings, sharing: Sharing):
    del settings, sharing
    return solve_plainly(inputs, problem)


@_solve.def_fwd
def _solve_fwd(
    perturbed, inputs: Inputs, problem: Problem, settings: Settings, sharing: Sharing
):
    del sharing
    _refuse_gradients(inputs, perturbed, problem)
    checkpoints = settings.checkpoints
    if checkpoints is None:
        checkpoints = default_checkpoints(inputs, problem)
    with _axes_bound():
        final_state, aux_stats, residuals = solve_and_record(
            inputs, perturbed, problem, checkpoints
        )
    return (differentiate_once(final_state), aux_stats), residuals


def _refuse_gradients(inputs: Inputs, perturbed: Inputs, problem: Problem) -> None:
    """Raise an error for gradients that ignore too much, as steps are held fixed."""
    times, dt0 = perturbed.context.times, perturbed.context.dt0
    others = tree_replace(
        lambda p: (p.context.times, p.context.dt0), perturbed, (None,) * 2
    )
    if dt0 and not any(jtu.tree_leaves((times, others))):
        raise NotImplementedError(first_step_alone)
    if not problem.saves_ends_of_steps:
        return
    with_t0, with_t1 = steps_move_with(problem.stepsize_controller)
    moving = with_t0 and (times.t0 or dt0 or any(times.prescribed))
    if moving or (with_t1 and times.t1):
        raise NotImplementedError(moving_steps)
    if any(jtu.tree_leaves(others)) and problem.steps_follow_state(inputs):
        raise NotImplementedError(steps_that_follow_the_state)


@_solve.def_bwd
def _solve_bwd(
    residuals,
    cotangent,
    perturbed,
    inputs: Inputs,
    problem: Problem,
    settings: Settings,
    sharing: Sharing,
):
    state_cotangent: State = cotangent[0]
    # The gradient with respect to `dt0` is zero.
    unread = jtu.tree_map(lambda _: False, perturbed.context.dt0)
    perturbed = tree_replace(lambda p: p.context.dt0, perturbed, unread)
    tol, throw = settings.drift_tol, settings.throw
    solve = inputs, perturbed, problem, residuals
    with _axes_bound():
        walked = walk_back(*solve, state_cotangent, sharing, tol, settings.watch)
    torn = residuals.record.torn
    if throw:
        # Diffrax attaches this error to the solution, which need not be used.
        torn = residuals.result.error_if(torn, ~is_okay(residuals.result))
    if settings.report is not None:
        _report(settings.report, walked)
    # The gradient of outputs that are not used is zero, however far off the walk is.
    used = any_nonzero(state_cotangent) | jnp.invert(jnp.isfinite(walked.drift))
    drift = jnp.where(used, walked.drift, 0)
    doubts = drift, walked.shares, torn, walked.drift_tol
    gradient = refuse_wrong(walked.gradient, walked.shared, *doubts, throw)
    return differentiate_once(_as_weak_as(inputs, gradient))


@contextlib.contextmanager
def _axes_bound() -> Iterator[None]:
    """Raise an error in words for a collective over the axis of a `jax.vmap`, which
    JAX does not bind where it differentiates the batch as a whole."""
    try:
        yield
    except NameError as error:
        if "axis name" in str(error):
            raise NotImplementedError(collective_outside) from error
        raise


def _as_weak_as(inputs: Inputs, gradient: Inputs) -> Inputs:
    """The gradient, weakly typed for weakly typed inputs, such as Python floats."""

    def of_array(bar, x):
        if bar is None or not getattr(x, "weak_type", False):
            return bar
        # The transpose of a conversion is the conversion back.
        _, pull = jax.vjp(lambda x: lax.convert_element_type(x, x.dtype), x)
        return pull(bar)[0]

    return jtu.tree_map(of_array, gradient, inputs, is_leaf=lambda x: x is None)


def _report(report: Callable[[dict[str, int]], None], walked: Walked) -> None:
    names = "undone_steps", "replayed_steps", "restarted_steps"

    def tell(*counts):
        report(dict(zip(names, map(int, counts), strict=True)))

    jax.debug.callback(tell, walked.undone, walked.replayed, walked.restarted)
