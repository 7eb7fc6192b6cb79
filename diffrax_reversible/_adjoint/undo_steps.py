"""Undoing steps up to the next known state."""

import dataclasses

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp

from .._tree import tree_cond
from .kept import Kept
from .position import Position, with_params, without_params
from .pull_restart import pull_restart
from .shared import params_where, Shared
from .undo_step import undo_step
from .walk import Walk


# Fields of a position that do not change while steps are undone.
_stays = (
    *("origin", "reach", "parted", "drift"),
    *("undone", "replayed", "params_cotangent"),
)

# The number of steps that some elements of a batch may undo while the rest have come to a
# known state.
_at_once = 2


def undo_steps(walk: Walk, position: Position, kept: Kept) -> Position:
    """Undo steps up to the next known state or restart."""
    moves = dataclasses.replace(position, **{name: None for name in _stays})
    if walk.shared is None:
        moved = _undo_apart(walk, moves, kept)
    else:
        moved = _undo_together(walk, moves, kept, walk.shared)
    stays = {name: getattr(position, name) for name in _stays}
    return dataclasses.replace(moved, **stays)


def _undo_apart(walk: Walk, position: Position, kept: Kept) -> Position:
    """As `undo_steps`, where an element of a batch hardly waits for the others."""

    def undoes(carry):
        position, count = carry
        if not walk.stops:
            # Only the start ends the loop; elements that are done wait for the rest.
            return position.undoes_next
        waits = position.needs_known & (position.waited < 0)
        waits = eqxi.unvmap_any(waits | position.pending) & (count >= _at_once)
        return position.undoes_next & jnp.logical_not(waits)

    def undo(carry):
        position, count = carry
        return undo_step(walk, position, kept), count + 1

    position, count = lax.while_loop(undoes, undo, (position, jnp.array(0)))
    waited = position.waited + eqxi.unvmap_max(count)
    waited = jnp.where(position.waited < 0, position.waited, waited)
    return dataclasses.replace(position, waited=waited)


def _undo_together(walk: Walk, position: Position, kept: Kept, shared: Shared) -> Position:
    """As `undo_steps`, until every element of a batch has come to a known state. The sums
    of shared cotangents are then accepted, or discarded, for the whole batch."""

    def undoes(position):
        return eqxi.unvmap_any(position.undoes_next)

    def undo(position):
        moves = position.undoes_next
        after = undo_step(walk, dataclasses.replace(position, moves=moves), kept)
        after = dataclasses.replace(after, moves=None)
        # The cotangents of the parameters, with those of all members where it is shared.
        params = [p.cotangent.params for p in (after, position)]
        params = params_where(shared, moves, *params)
        position = tree_cond(moves, without_params(after), without_params(position))
        position = with_params(position, (params, None))
        return position if walk.departure is None else pull_restart(walk, position)

    return lax.while_loop(undoes, undo, position)
