"""Pulling a cotangent back through a restart."""

import dataclasses

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp

from .._solver.capabilities import CanRestart
from .._solver.pullback import Cotangent
from .._tree import tree_add, tree_select
from .position import Position
from .walk import Walk


def pull_restart(walk: Walk, position: Position) -> Position:
    """Pull the cotangent back through a restart at this `position`, if one is pending."""
    if not walk.residuals.restartable and walk.departure is None:
        return position
    # A loop of at most one iteration, as a conditional copies what it returns.
    ct, _ = lax.while_loop(
        lambda carry: carry[1],
        lambda carry: (_pull(walk, position, carry[0]), jnp.array(False)),
        (position.cotangent, eqxi.unvmap_any(position.pending)),
    )
    return dataclasses.replace(position, cotangent=ct, pending=jnp.array(False))


def _pull(walk: Walk, position: Position, ct: Cotangent) -> Cotangent:
    solver, t = walk.problem.solver, position.clock.start
    assert isinstance(solver, CanRestart)
    is_diff = eqx.is_inexact_array
    diff_state, nondiff_state = eqx.partition(position.solver_state, is_diff)

    def restart(y, diff_state, params):
        context = walk.context(params)
        state = eqx.combine(diff_state, nondiff_state)
        state = solver.restart(context.terms, context.times.of(t), y, context.args, state)
        return eqx.filter(state, is_diff)

    _, pull = eqx.filter_vjp(restart, position.y, diff_state, walk.params)
    pending = ct.where(position.pending)
    y_bar, state_bar, params_bar = pull(pending.solver_state)
    state_bar = tree_select(position.pending, state_bar, ct.solver_state)
    return Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
