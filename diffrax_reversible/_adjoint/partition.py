"""Splitting a solve into its differentiated inputs and its fixed part."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import Event

from .._custom_types import Args, Terms
from .._diffrax import State
from .._tree import tree_replace
from .close import close
from .closure import close_controller, close_terms
from .controller_traits import makes_jumps, varying_leaves
from .problem import (
    Context,
    Inputs,
    Problem,
    take_event_fns,
    take_save_fns,
    take_state,
    take_times,
)
from .reverse_only import reverse_only
from .times import prescribed_times
from .traced_field import hides_tracers
from .unread import detach_unread
from .validate import hold_fixed, hold_times_fixed


def make_visible(
    terms: Terms, args: Args, event: Event | None, init_state: State, given: dict[str, Any]
) -> tuple[Context, dict[str, Any]]:
    """The context of a solve, with closed-over values as leaves.

    `given` has the other arguments of the solve, which conditions of events receive. Also
    returns the replacements for some of these, and the event.
    """
    solver, t0 = given["solver"], given["t0"]
    y0, solver_state = init_state.y, init_state.solver_state
    given_terms = terms
    terms, args = close_terms(solver, terms, args, t0, y0, solver_state)
    controller = close_controller(
        given["stepsize_controller"], solver, terms, t0, args, init_state
    )
    given = given | dict(stepsize_controller=controller)

    def close_condition(fn: Callable) -> Callable:
        # A condition may call a vector field in other ways than the solver does.
        def condition(t, y, args, terms):
            known = given_terms if hides_tracers(terms) else terms
            return fn(t, y, args, terms=known, **given)

        return close(condition, t0, y0, args, terms)

    event, event_fns = take_event_fns(event, close_condition)
    saveat, save_fns = take_save_fns(given["saveat"], lambda fn: close(fn, t0, y0, args))
    times = take_times(t0, given["t1"], saveat, controller)
    terms, args = detach_unread(terms, args, save_fns, event_fns, init_state, given)
    context = Context(terms, args, save_fns, event_fns, times, given["dt0"])
    return context, dict(stepsize_controller=controller, saveat=saveat, event=event)


def partition(
    context: Context,
    init_state: State,
    given: dict[str, Any],
    *,
    passed_solver_state: bool,
    passed_controller_state: bool,
) -> tuple[Inputs, Problem]:
    """The inputs and the fixed part, which raises an error if it is differentiated."""
    y0, solver_state = init_state.y, init_state.solver_state
    # If no solver state was passed, the backward pass differentiates `init`.
    passed, made = (solver_state, None) if passed_solver_state else (None, solver_state)
    controller = given["stepsize_controller"]
    times = (
        *(given[name] for name in ("dt0", "t0", "t1", "saveat")),
        prescribed_times(controller),
    )
    (y0, passed, context), (made, *times) = reverse_only(
        (y0, passed, context), (made, *times)
    )
    inputs = Inputs(y0, passed if passed_solver_state else made, context)
    times = jtu.tree_map(detach_integers, hold_times_fixed(times))
    dt0, t0, t1, saveat, prescribed = times
    controller = eqx.tree_at(prescribed_times, controller, prescribed)
    if passed_controller_state:
        init_state = tree_replace(
            lambda s: s.controller_state,
            init_state,
            hold_fixed(init_state.controller_state, "`controller_state`"),
        )
    solver = given["solver"]
    controlled = controller, solver, context.terms, context.args, init_state
    # In this order, as later fields may depend on earlier ones.
    problem = Problem(
        t0=t0,
        t1=t1,
        dt0=dt0,
        saveat=saveat,
        event=hold_fixed(given["event"], "`event`"),
        solver=hold_fixed(solver, "`solver`"),
        stepsize_controller=hold_fixed(controller, "`stepsize_controller`"),
        init_state=jtu.tree_map(detach, take_state(init_state)),
        progress_meter=given["progress_meter"],
        max_steps=given["max_steps"],
        passed_solver_state=passed_solver_state,
        with_jumps=makes_jumps(*controlled),
        varying=varying_leaves(*controlled),
    )
    return inputs, problem


def detach(x: Any) -> Any:
    if eqx.is_inexact_array(x):
        return lax.stop_gradient(x)
    return detach_integers(x)


def detach_integers(x: Any) -> Any:
    if eqx.is_inexact_array(x):
        return x
    if eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
        # JAX gives even the integer outputs of a custom gradient a tangent, which not
        # every operation accepts. Bitwise operations have none.
        return lax.bitwise_or(x, x)
    return x
