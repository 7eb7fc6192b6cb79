"""The whole walk, done again if the gradient grows where the solution contracts."""

import dataclasses
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from .._precision import eps
from .._tree import tree_add, tree_select, tree_zeros_of
from .between_steps import go_on
from .growth import any_grown, Growth, Plan
from .growth_rates import Rates
from .kept import Kept
from .position import params_of, Position, with_params, without_params
from .pull_change import pull_change
from .pull_outputs import pull_start
from .shared import Shared
from .sketch import alike, norm, Sketch, sketch
from .spread import many
from .undo_steps import undo_steps
from .walk import Walk


# A gradient that seems to have grown is accepted if it differs by no more than this
# fraction from that of another walk: a spoilt gradient would differ more. Tuned on
# `examples/benchmarks/refusals.py`.
_alike = 0.1
# If the gradients differ, their cotangents at the start of the solve have to be as near.
_near = 0.01
# An array of the cotangent of the state has vanished below this power of the machine
# epsilon, as a fraction of the largest entry that it has had: 7e-5 in single precision.
_vanished = 0.6
# Members of a batch on which two walks differ may contribute this fraction of their sum.
_hardly = 0.03


def run_walks(walk: Walk, end: Position) -> tuple[Position, BoolScalarLike]:
    """The whole walk, from the `end` to the start.

    Restarts and known states are handled outside the loop over steps. If the gradient grows
    where the solution contracts, the walk begins again and restarts there, see
    `Growth.spoils`. Also returns whether two walks have come to the same gradient.

    A spoilt gradient differs between the first and the second walk, as these restart at
    different steps. If a solver has steps with other derivatives, there is a walk with
    those in between, with which the last one is compared. If they differ, two more walks
    divide the steps that are unstable for what has grown, see `Growth.parts`, and are
    compared.
    """
    position = walk.start(end, Plan.nothing(), Rates.none())
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


class _Sketches(NamedTuple):
    """Sketches of a gradient: of the cotangents of the initial state, whether or not it is
    differentiated, and of the parameters."""

    states: list[Sketch]
    params: list[Sketch]

    @staticmethod
    def none() -> "_Sketches":
        return _Sketches([], [])


def _finish(walk: Walk, position: Position) -> tuple[Position, _Sketches]:
    """The position with the gradient at the start of the solve, and a sketch of that."""
    before = pull_start(walk, position)
    passed = walk.problem.passed_solver_state
    if walk.departure is None:
        return before if passed else _pull_init(walk, before), _Sketches.none()
    after = _pull_init(walk, before)
    # What `init` adds to many parameters would be another copy, as would the sum of both
    # parts, and sketches are linear.
    parts = params_of(before if many(walk.params) else after)
    params, earlier = map(sketch, parts)
    params = tree_add(params, earlier) if len(earlier) > 0 else params
    # If the solver state was passed, its cotangent counts as if `init` had made it: how a
    # cotangent is divided between the two approximations does not matter.
    sketches = _Sketches(sketch(after.cotangent.y), params)
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


def _agree(
    walk: Walk, growth: Growth, last: _Sketches, here: _Sketches, grown: BoolScalarLike
) -> BoolScalarLike:
    """Whether this walk has come to the same gradient as the last one.

    - `grown`: whether the gradient of this element of a batch has grown, or would have.

    The members of a batch have a single gradient of what they share, to which those that
    differ may contribute little.
    """
    flags = [False] * len(here.params)
    if walk.summed is not None and walk.shared is None:
        flags = jtu.tree_leaves(walk.summed.flags)
    starts = walk.differentiates_start
    sizes = jtu.tree_leaves(growth.largest)
    same = _alike_states(last, here, sizes) if starts else jnp.array(True)
    for before, now, is_shared in zip(last.params, here.params, flags, strict=True):
        agrees = alike(before, now, _alike)
        if is_shared:
            assert walk.summed is not None
            differs = grown & jnp.logical_not(agrees)
            agrees |= _hardly_differs(walk.summed, before, now, differs)
        same &= agrees
    return same


def _alike_states(
    last: _Sketches,
    here: _Sketches,
    sizes: list[Array] | None = None,
    tol: RealScalarLike = _alike,
) -> Bool[Array, ""]:
    """Whether this walk has come to the same cotangent of the initial state.

    Where the flow has contracted a lot, that has vanished, and the rest of it is a matter
    of rounding. So an array of it may also differ by a tiny fraction of its largest entry
    so far, see `_vanished`, if these `sizes` are given.
    """
    same = [alike(*both, tol) for both in zip(last.states, here.states, strict=True)]
    for i, size in enumerate(sizes or []):
        before, now = last.states[i], here.states[i]
        vanished = norm(now - before, size) <= eps(now) ** _vanished
        same[i] |= vanished & jnp.isfinite(size)
    return jnp.stack([jnp.array(True), *same]).all()


def _hardly_differs(
    summed: Shared, last: Sketch, now: Sketch, differs: BoolScalarLike
) -> BoolScalarLike:
    """Whether members that differ hardly contribute to the sum over a batch."""
    # Half precision would overflow.
    if now.dtype.itemsize < 4:
        last, now = last.astype(jnp.float32), now.astype(jnp.float32)
    scale = summed.total(jnp.max(jnp.maximum(jnp.abs(last), jnp.abs(now)), initial=0))
    doubtful = jnp.where(differs, norm(last, scale) + norm(now, scale), 0)
    hardly = summed.total(doubtful) <= _hardly * norm(summed.total(now), scale)
    return hardly & jnp.isfinite(scale)


class _Walks(NamedTuple):
    """The walks from the end to the start of a solve.

    - `left`: the number of walks to go, if the gradient grows where it should not.
    - `last`: a sketch of the gradient by the last one.
    - `agree`: whether two walks have come to the same gradient.
    """

    left: IntScalarLike
    last: _Sketches
    agree: BoolScalarLike

    @staticmethod
    def start(walk: Walk, position: Position) -> "_Walks":
        ct, here = position.cotangent, _Sketches.none()
        if walk.departure is not None:
            # The shapes of what `_finish` returns, which would trace `init`.
            here = jax.eval_shape(lambda: _Sketches(sketch(ct.y), sketch(ct.params)))
        return _Walks(jnp.array(_most(walk)), tree_zeros_of(here), jnp.array(False))


def _most(walk: Walk) -> int:
    """The number of walks, if the gradient grows."""
    return 2 + int(walk.compares) + 2 * int(walk.divides)


def _again(
    walk: Walk,
    end: Position,
    position: Position,
    here: _Sketches,
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
        walk.start(end, plan, growth.rates),
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
    here: _Sketches,
    kept: Kept,
    walks: _Walks,
) -> tuple[BoolScalarLike, Plan, BoolScalarLike]:
    """Whether some element of the batch has to begin again, what the next walk does, and
    whether two walks have come to the same gradient."""
    # Steps are divided in the last two walks, if at all.
    left, to_divide = walks.left, 2 * int(walk.divides)
    first, cured, last = left == _most(walk), left == 1 + to_divide, left == 1
    divided = jnp.logical_not(growth.lacks_parts(walk.residuals.count))
    proves = divided & jnp.logical_not(first)
    if not walk.compares:
        # The second walk restarts where the two approximations depart, as they do in every
        # step beyond the limit of stability, unless the solve restarts there. If neither
        # ever does, no step is unstable. If only the solve does, both walks are the same,
        # which proves nothing.
        proves &= (growth.restarts > 0) | (kept.restarts == 0)
    # Depends on the sketch, so that XLA need not copy what is sketched.
    grown = any_grown(walk.shares(position), walk.drift_tol)
    grown |= first & any_grown(walk.shares_of_integrals(position), walk.drift_tol)
    cures = jnp.where(first, grown, growth.plan.cures)
    divides, suspect = growth.plan.divides > 0, grown | growth.unstable
    agree = proves & _agree(walk, growth, walks.last, here, suspect | divides)
    agree = jnp.where(cured | (divides & last), agree, walks.agree)
    # In unstable steps, what is too slow to be found may grow, and what is found may grow
    # by as much in both walks.
    proven = agree & jnp.logical_not(grown & growth.unstable)
    doubtful = cures & suspect & jnp.logical_not(proven) & _matters(growth, position)
    # A walk that divides shows whether that before it had come to the right cotangent, at
    # the start of the solve. If so, its gradient is the better one: states within a step
    # are those of the solver then, which are consistent with both ends.
    tol = jnp.where(agree, _alike, _near)
    tried = divides & divided & jnp.logical_not(last)
    accepts = tried & _alike_states(walks.last, here, tol=tol)
    divides |= cured & doubtful
    again = eqxi.unvmap_any(jnp.where(left > 1 + to_divide, cures, divides)) & (left > 1)
    parts = jnp.where(cured, 1, jnp.where(accepts, 0, 2))
    plan = Plan(cures, cures & first, jnp.where(divides, parts, 0))
    return again, plan, agree | accepts


def _matters(growth: Growth, position: Position) -> BoolScalarLike:
    """See `Growth.matters`, at the start of the solve."""
    if growth.spread is None:
        return True
    params_bar, earlier = params_of(position)
    return growth.matters(params_bar if earlier is None else tree_add(params_bar, earlier))
