"""The position of the walk over the steps of a solve, from the last to the first."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    Params,
    RealScalarLike,
    SolverState,
    Y,
)
from .._solver.cotangent import Cotangent
from .._tree import tree_add, tree_replace
from .clock import Clock
from .growth import Growth
from .outputs import Cursor


# Exceeds the number of steps between known states.
longest_reach = 1 << 28


class Position(eqx.Module):
    """The position of the walk, with `step` steps still to undo.

    - `known`: whether the state and the solver state are known, and not reconstructed.
    - `restarted`: whether a restart here is still to be undone.
    - `pending`: whether the cotangent is still to be pulled back through a restart here.
    - `from_start`: whether the step before is made again from its start, which is known, as
        it cannot be undone; `None` if no step ever is.
    - `stop`: the step of the next known state, or of the oldest step on record.
    - `growth`: the growth of the cotangent, if the solver can detect it.
    - `origin`: the position at the last known state; only its step, state, and
        differentiated leaves of the solver state, if steps are never undone again.
    - `reach`: the largest number of steps between known states; zero if not even a single
        step is to be undone.
    - `parted`: the largest difference between a replay and the solve.
    - `drift`: the largest error at known states; those of replays are scaled by the ratio
        of the tolerances.
    - `undone`, `replayed`: the numbers of steps undone and replayed so far.
    - `hidden`: the errors of entries that have come to rest since the last known state;
        `None` if entries at rest do not matter.
    - `params_cotangent`: the part of the cotangent of the parameters from before the last
        known state, if steps may be undone again.
    - `meter`: the state of the progress meter.
    - `waited`: the number of steps that other elements of the batch have undone since the
        walk has needed a replay to go on; negative if it does not.
    - `moves`: whether the next step is undone; otherwise this element waits for others of
        its batch, and a step of length zero adds nothing to the cotangent of the
        parameters. `None` if no element waits.
    """

    step: IntScalarLike
    clock: Clock
    y: Y
    solver_state: SolverState
    cotangent: Cotangent
    cursors: list[Cursor]
    known: BoolScalarLike
    restarted: BoolScalarLike
    pending: BoolScalarLike
    stop: IntScalarLike
    growth: Growth | None
    origin: "Position | None" = None
    reach: IntScalarLike = longest_reach
    parted: RealScalarLike = 0.0
    drift: RealScalarLike = 0.0
    undone: IntScalarLike = 0
    replayed: IntScalarLike = 0
    hidden: PyTree | None = None
    from_start: BoolScalarLike | None = None
    params_cotangent: Params | None = None
    meter: PyTree = None
    waited: IntScalarLike = -1
    moves: BoolScalarLike | None = None

    def as_origin(self, whole: bool) -> "Position":
        """The part of this position that the walk keeps as an `origin`."""
        ct = dataclasses.replace(self.cotangent, params=None)
        here = dataclasses.replace(
            self,
            cotangent=ct,
            stop=None,
            origin=None,
            reach=None,
            parted=None,
            drift=None,
            undone=None,
            replayed=None,
            hidden=None,
            from_start=None,
            params_cotangent=None,
            meter=None,
            waited=None,
        )
        if whole:
            return here
        nothing = jtu.tree_map(lambda _: None, here)
        diff_state = eqx.filter(here.solver_state, eqx.is_inexact_array)
        kept = here.step, here.y, diff_state
        return tree_replace(lambda p: (p.step, p.y, p.solver_state), nothing, kept)

    def moves_if(self, pred: BoolScalarLike) -> "Position":
        """This position, which also waits unless `pred`."""
        moves = pred if self.moves is None else self.moves & pred
        return dataclasses.replace(self, moves=moves)

    @property
    def least_reach(self) -> IntScalarLike:
        """The number of steps between known states, at least one."""
        return jnp.maximum(self.reach, 1)

    @property
    def undoes_next(self) -> BoolScalarLike:
        """Whether the step before can be undone."""
        return (self.step > self.stop) & jnp.logical_not(self.restarted | self.pending)

    @property
    def needs_known(self) -> BoolScalarLike:
        """Whether the walk continues from a known state."""
        return jnp.logical_not(self.undoes_next | self.pending | self.done)

    @property
    def done(self) -> BoolScalarLike:
        return (self.step == 0) & self.known


def params_of(position: Position) -> tuple[Params, Params | None]:
    """The cotangents of the parameters, since the last known state and before."""
    return position.cotangent.params, position.params_cotangent


def all_params_of(position: Position) -> Params:
    """The whole cotangent of the parameters."""
    params, earlier = params_of(position)
    return params if earlier is None else tree_add(params, earlier)


def with_params(position: Position, params: tuple[Params | None, ...]) -> Position:
    """The position with other cotangents of the parameters."""
    return tree_replace(params_of, position, params)


def without_params(position: Position) -> Position:
    """The position without the cotangents of the parameters."""
    return with_params(position, (None, None))
