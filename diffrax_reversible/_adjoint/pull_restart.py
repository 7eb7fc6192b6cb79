"""Pulling a cotangent back through a restart."""

import dataclasses

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp

from .._solver.cotangent import Cotangent
from .._solver.interrupted_solver import CanRestart
from .position import Position
from .pull_change import pull_change
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

    def restart(context, y, state):
        return solver.restart(context.terms, context.times.of(t), y, context.args, state)

    states = position.y, position.solver_state
    return pull_change(walk, restart, *states, ct, position.pending)[1]
