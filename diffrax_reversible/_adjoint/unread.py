"""Leaves of `terms` and `args` that nothing in a solve reads."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS

from .._custom_types import Args, Terms
from .._diffrax import State
from .._jaxpr import reads
from .problem import EventFns, SaveFns


def detach_unread(
    terms: Terms,
    args: Args,
    save_fns: SaveFns,
    event_fns: EventFns,
    init_state: State,
    given: dict[str, Any],
) -> tuple[Terms, Args]:
    """`terms` and `args`, where leaves that no step, output, event or controller reads have
    no derivative.

    Often `args` is a whole model that includes the vector field. The cotangent of the
    rest is zero, and takes no memory if JAX knows that.
    """
    diff, nondiff = eqx.partition((terms, args), eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(diff)
    if len(leaves) == 0:
        return terms, args
    y, solver_state = init_state.y, init_state.solver_state
    solver, controller, t0 = (
        given[name] for name in ("solver", "stepsize_controller", "t0")
    )

    def read(leaves):
        def inputs():
            # A copy for each call, as some objects can be used only once.
            return eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)

        def event(fn):
            terms, args = inputs()
            return fn(t0, y, args, terms)

        terms, args = inputs()
        first = solver.init(terms, t0, t0, y, args)
        terms, args = inputs()
        step = terms, t0, t0, y, args
        *made, result = solver.step(*step, solver_state, jnp.array(False))
        result = None if result is RESULTS.successful else result
        saved = [fn(t0, y, inputs()[1]) for fn in save_fns if fn is not None]
        events = [event(fn) for fn in event_fns]
        step = t0, t0, y, y, inputs()[1], y, solver.error_order(terms)
        *adapted, _ = controller.adapt_step_size(*step, init_state.controller_state)
        everything = first, made, result, saved, events, adapted
        return eqx.filter(everything, eqx.is_array)

    used = reads(read, leaves)
    leaves = [x if u else lax.stop_gradient(x) for x, u in zip(leaves, used, strict=True)]
    return eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)
