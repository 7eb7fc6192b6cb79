"""The whole walk, done again if the gradient grows where the solution contracts."""

import dataclasses
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import BoolScalarLike, IntScalarLike
from .._tree import tree_add, tree_select, tree_zeros_of
from .agreement import same_at_start, same_gradient, Sketches
from .between_steps import go_on
from .division import Division
from .growth import any_grown, any_overflown, Growth
from .kept import Kept
from .plan import Plan
from .position import all_params_of, params_of, Position, with_params, without_params
from .pull_change import pull_change
from .pull_outputs import pull_start
from .sketch import sketch
from .spread import many
from .strain import with_strain
from .undo_steps import undo_steps
from .walk import Walk


# The number of walks that divide steps, the last one into four times as many parts as the
# first one.
_dividing = 3


def run_walks(walk: Walk, end: Position) -> tuple[Position, BoolScalarLike]:
    """The whole walk, from the `end` to the start.

    Restarts and known states are handled outside the loop over steps. If the gradient grows
    where the solution contracts, the walk begins again and restarts there, see
    `Growth.spoils`. Also returns whether two walks have come to the same gradient.

    A spoilt gradient differs between the first and the second walk, as these restart at
    different steps. If a solver has steps with other derivatives, there is a walk with
    those in between, with which the last one is compared. If they differ, or prove nothing,
    up to three more walks divide the steps that are unstable for what has grown, each later
    one into twice as many parts, until two of them agree, see `Division`. If the first of
    these confirms the walk before, that is done again instead.
    """
    position = walk.start(end, Plan.nothing(), Division.start(end.cotangent.y))
    meter = walk.problem.progress_meter.init()
    position = dataclasses.replace(position, meter=meter)
    kept = dataclasses.replace(walk.residuals.kept, rest=None)

    def segment(position, kept):
        return go_on(walk, undo_steps(walk, position, kept), kept)

    if not walk.stops:
        # Without an outer loop, fewer states are in memory.
        return _finish(walk, segment(position, kept)[0])[0], jnp.array(False)

    def go(carry):
        position, kept, walks = carry
        position, kept = segment(position, kept)
        some_wait = eqxi.unvmap_any(jnp.logical_not(position.done))
        # With the branches in the other order, XLA holds two more copies of the parameters.
        position, walks = lax.cond(
            jnp.logical_not(some_wait),
            lambda: _again(walk, end, *_finish(walk, position), kept, walks),
            lambda: (position, walks),
        )
        return position, kept, walks

    walks = _Walks.start(walk, position)
    carry = lax.while_loop(lambda carry: carry[2].left > 0, go, (position, kept, walks))
    return carry[0], carry[2].agree


def _finish(walk: Walk, position: Position) -> tuple[Position, Sketches]:
    """The position with the gradient at the start of the solve, and a sketch of that."""
    before = pull_start(walk, position)
    passed = walk.problem.passed_solver_state
    if walk.departure is None:
        return before if passed else _pull_init(walk, before), Sketches.none()
    after = _pull_init(walk, before)
    assert before.growth is not None
    # Without the outputs at the start of the solve.
    added = jtu.tree_map(jnp.subtract, after.cotangent.y, before.cotangent.y)
    y_bar = tree_add(position.cotangent.y, added)
    growth = with_strain(walk, before.growth, y_bar)
    before, after = (dataclasses.replace(p, growth=growth) for p in (before, after))
    if many(walk.params):
        # What `init` adds would be another copy, as would the sum of both parts, and
        # sketches are linear.
        params, earlier = params_of(before)
        params = sketch(params) if earlier is None else sketch(params) + sketch(earlier)
    else:
        params = sketch(all_params_of(after))
    # If the solver state was passed, its cotangent counts as if `init` had made it: how a
    # cotangent is divided between the two approximations does not matter.
    sketches = Sketches(sketch(after.cotangent.y), params)
    return before if passed else after, sketches


def _pull_init(walk: Walk, position: Position) -> Position:
    """Pull the cotangent of the first solver state back, as that of `init`.

    `init` is called again here, so that its activations need not be stored.
    """
    problem, states = walk.problem, (position.y, position.solver_state)

    def init(context, y, state):
        del state
        step = context.times.t0, context.times.of(problem.init_state.tnext)
        return problem.solver.init(context.terms, *step, y, context.args)

    _, ct = pull_change(walk, init, *states, position.cotangent)
    return dataclasses.replace(position, cotangent=ct)


class _Walks(NamedTuple):
    """The walks from the end to the start of a solve.

    - `left`: the number of walks to go, if the gradient grows where it should not.
    - `last`: a sketch of the gradient by the last one.
    - `agree`: whether two walks have come to the same gradient.
    """

    left: IntScalarLike
    last: Sketches
    agree: BoolScalarLike

    @staticmethod
    def start(walk: Walk, position: Position) -> "_Walks":
        ct, here = position.cotangent, Sketches.none()
        if walk.departure is not None:
            # The shapes of what `_finish` returns, which would trace `init`.
            here = jax.eval_shape(lambda: Sketches(sketch(ct.y), sketch(ct.params)))
        return _Walks(jnp.array(_most(walk)), tree_zeros_of(here), jnp.array(False))


def _most(walk: Walk) -> int:
    """The number of walks, if the gradient grows."""
    return 2 + int(walk.compares) + _dividing * int(walk.divides)


def _again(
    walk: Walk,
    end: Position,
    position: Position,
    here: Sketches,
    kept: Kept,
    walks: _Walks,
) -> tuple[Position, _Walks]:
    """The position at the start of the solve, or the `end` if some element of the batch has
    to begin again. `here` are the sketches of the gradient."""
    growth, record = position.growth, kept.record
    if growth is None:
        return position, walks._replace(left=jnp.array(0))
    again, plan, agree = _judge(walk, position, growth, here, kept, walks)
    # Some of what was held and recorded is lost.
    there = record.reaches(end.step, walk.residuals.count - 1)
    begin = lambda: dataclasses.replace(
        walk.start(end, plan, growth.division.again()),
        stop=jnp.where(there, end.stop, end.step),
        undone=position.undone,
        replayed=position.replayed,
        meter=position.meter,
    )
    params = tree_select(again, params_of(begin()), params_of(position))
    # Selected apart: in the conditional, XLA holds another copy of the parameters.
    position = lax.cond(
        again, lambda: without_params(begin()), lambda: without_params(position)
    )
    left = jnp.where(again, walks.left - 1, 0)
    return with_params(position, params), _Walks(left, here, agree)


def _judge(
    walk: Walk,
    position: Position,
    growth: Growth,
    here: Sketches,
    kept: Kept,
    walks: _Walks,
) -> tuple[BoolScalarLike, Plan, BoolScalarLike]:
    """Whether some element of the batch has to begin again, what the next walk does, and
    whether two walks have come to the same gradient."""
    # Steps are divided in the last walks, if at all.
    left, to_divide = walks.left, _dividing * int(walk.divides)
    first, cured = left == _most(walk), left == 1 + to_divide
    plan, division = growth.plan, growth.division
    assert walk.departure is not None
    unstable = division.unstable(walk.departure.stable)
    enough = jnp.logical_not(division.lacks_parts(plan.divides, walk.residuals.count))
    proves = enough & jnp.logical_not(first)
    if not walk.compares:
        # The second walk restarts where the two approximations depart, as they do in every
        # step beyond the limit of stability, unless the solve restarts there. If neither
        # ever does, no step is unstable. If only the solve does, both walks are the same,
        # which proves nothing, unless this one divides steps.
        differs = (growth.restarts > 0) | (growth.division.count > 0)
        proves &= differs | (kept.restarts == 0)
    grown = _grown(walk, position, growth, first)
    cures, divides = jnp.where(first, grown, plan.cures), plan.divides > 0
    suspect = grown | unstable
    same = proves & same_gradient(walk, growth, walks.last, here, suspect | divides)
    finely = plan.divides > 1
    agree = jnp.where(cured | finely, same, walks.agree)
    # In unstable steps, what is too slow to be found may grow, and what is found may have
    # grown by as much in both walks.
    doubted = (grown | growth.strained) & unstable
    proven = agree & jnp.logical_not(doubted)
    doubtful = cures & suspect & jnp.logical_not(proven) & _matters(growth, position)
    # A walk that divides shows whether that before it had come to the right cotangent at
    # the start of the solve. If so, its gradient is the better one: states within a step
    # are those of the solver then, which are consistent with both ends.
    confirms = (plan.divides == 1) & enough & same_at_start(walks.last, here, agree)
    divides |= cured & doubtful
    goes_on = divides & jnp.logical_not(finely & same)
    again = eqxi.unvmap_any(jnp.where(left > 1 + to_divide, cures, goes_on)) & (left > 1)
    finer = plan.divides * jnp.where(goes_on, 2, 1)
    parts = jnp.where(cured, 1, jnp.where(confirms, 0, finer))
    plan = Plan(cures, cures & first, jnp.where(divides, parts, 0))
    return again, plan, (agree if walk.divides else proven) | confirms


def _grown(
    walk: Walk, position: Position, growth: Growth, first: BoolScalarLike
) -> BoolScalarLike:
    """Whether the gradient has grown where it should not, in the `first` walk also if that
    is hidden at the start of the solve."""
    shares = walk.shares(position)
    grown = any_grown(shares, walk.drift_tol)
    hidden = any_overflown(shares) | growth.strained
    if len(jtu.tree_leaves(walk.params)) > 0:
        hidden |= any_grown(growth.shares_of_integrals(), walk.drift_tol)
    return grown | (first & hidden)


def _matters(growth: Growth, position: Position) -> BoolScalarLike:
    """See `Growth.matters`, at the start of the solve."""
    if growth.spread is None:
        return True
    return growth.matters(all_params_of(position))
