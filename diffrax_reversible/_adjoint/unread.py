"""Leaves of `terms` and `args` that nothing in a solve reads."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from .._custom_types import Args, Terms
from .._diffrax import State
from .problem import EventFns, SaveFns


def detach_unread(
    terms: Terms,
    args: Args,
    save_fns: SaveFns,
    event_fns: EventFns,
    init_state: State,
    given: dict[str, Any],
) -> tuple[Terms, Args]:
    """`terms` and `args`, where leaves that neither a step nor an output nor an event reads
    have no derivative.

    Often `args` is a whole model, of which the vector field is a part. The cotangent of the
    rest is zero, and takes no memory if JAX knows that.
    """
    diff, nondiff = eqx.partition((terms, args), eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(diff)
    if len(leaves) == 0:
        return terms, args
    y, solver_state = init_state.y, init_state.solver_state
    solver, t0 = given["solver"], given["t0"]

    def read(leaves):
        terms, args = eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)
        first = solver.init(terms, t0, t0, y, args)
        step = terms, t0, t0, y, args
        *made, result = solver.step(*step, solver_state, jnp.array(False))
        saved = [fn(t0, y, args) for fn in save_fns if fn is not None]
        events = [fn(t0, y, args, terms) for fn in event_fns]
        result = None if result is RESULTS.successful else result
        return eqx.filter((first, made, result, saved, events), eqx.is_array)

    used = _used(read, leaves)
    leaves = [x if u else lax.stop_gradient(x) for x, u in zip(leaves, used, strict=True)]
    return eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)


def _used(fn, leaves: list[PyTree]) -> list[bool]:
    """Which of the `leaves` the value of `fn(leaves)` depends on."""
    jaxpr = jax.make_jaxpr(fn)(leaves).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return used
