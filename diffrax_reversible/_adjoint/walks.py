"""The whole walk, done again if the gradient grows where the solution contracts."""

import dataclasses
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import BoolScalarLike, IntScalarLike
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


def _finish(walk: Walk, position: Position) -> tuple[Position, list[Sketch]]:
    """The position with the gradient at the start of the solve, and a sketch of that."""
    before = pull_start(walk, position)
    passed = walk.problem.passed_solver_state
    if walk.departure is None:
        return before if passed else _pull_init(walk, before), []
    after = _pull_init(walk, before)
    # What `init` adds to many parameters would be another copy, as would the sum of both
    # parts, and sketches are linear.
    parts = params_of(before if many(walk.params) else after)
    params, earlier = map(sketch, parts)
    params = tree_add(params, earlier) if len(earlier) > 0 else params
    # If the solver state was passed, its cotangent counts as if `init` had made it: how a
    # cotangent is divided between the two approximations does not matter.
    states = after.cotangent.y if walk.differentiates_start else []
    return before if passed else after, [*sketch(states), *params]


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
    walk: Walk, growth: Growth, walks: "_Walks", here: list[Sketch], grown: BoolScalarLike
) -> BoolScalarLike:
    """Whether this walk has come to the same gradient as the last one.

    - `grown`: whether the gradient of this element of a batch has grown, or would have.

    Where the flow has contracted a lot, the cotangent of the state has vanished, and the
    rest of it is a matter of rounding. So an array of it may also differ by a tiny fraction
    of the largest entry that it has had, see `_vanished`. The members of a batch have a
    single gradient of what they share, to which those that differ may contribute little.
    """
    sizes = jtu.tree_leaves(growth.largest) if walk.differentiates_start else []
    flags = [False] * len(here)
    if walk.summed is not None and walk.shared is None:
        flags[len(sizes) :] = jtu.tree_leaves(walk.summed.flags)
    same = []
    for i, (last, now) in enumerate(zip(walks.last, here, strict=True)):
        agrees = alike(last, now, _alike)
        if i < len(sizes):
            vanished = norm(now - last, sizes[i]) <= eps(now) ** _vanished
            agrees |= vanished & jnp.isfinite(sizes[i])
        elif flags[i]:
            assert walk.summed is not None
            differs = grown & jnp.logical_not(agrees)
            agrees |= _hardly_differs(walk.summed, last, now, differs)
        same.append(agrees)
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
    last: list[Sketch]
    agree: BoolScalarLike

    @staticmethod
    def start(walk: Walk, position: Position) -> "_Walks":
        ct, here = position.cotangent, []
        if walk.departure is not None:
            # The shapes of what `_finish` returns, which would trace `init`.
            states = ct.y if walk.differentiates_start else []
            here = jax.eval_shape(lambda: [*sketch(states), *sketch(ct.params)])
        return _Walks(jnp.array(_most(walk)), tree_zeros_of(here), jnp.array(False))


def _most(walk: Walk) -> int:
    """The number of walks, if the gradient grows."""
    return 2 + int(walk.compares) + 2 * int(walk.divides)


def _again(
    walk: Walk,
    end: Position,
    position: Position,
    here: list[Sketch],
    kept: Kept,
    walks: _Walks,
) -> tuple[Position, _Walks]:
    """The position at the start of the solve, or the `end` if some element of the batch has
    to begin again. `here` is a sketch of the gradient."""
    if walk.departure is None:
        return position, walks._replace(left=jnp.array(0))
    growth, record = position.growth, kept.record
    assert growth is not None
    # Steps are divided in the last two walks, if at all.
    left, to_divide = walks.left, 2 * int(walk.divides)
    first, cured = left == _most(walk), left == 1 + to_divide
    proves = jnp.logical_not(first)
    if not walk.compares:
        # The second walk restarts where the two approximations depart, as they do in every
        # step beyond the limit of stability, unless the solve restarts there. If neither
        # ever does, no step is unstable. If only the solve does, both walks are the same,
        # which proves nothing.
        proves &= (growth.restarts > 0) | (kept.restarts == 0)
    # Depends on the sketch, so that XLA need not copy what is sketched.
    grown = any_grown(walk.shares(position), walk.drift_tol)
    grown |= first & any_grown(walk.shares_of_integrals(position), walk.drift_tol)
    divides = growth.plan.divides > 0
    agree = proves & _agree(walk, growth, walks, here, grown | divides)
    agree = jnp.where(cured | (divides & (left == 1)), agree, walks.agree)
    cures = jnp.where(first, grown, growth.plan.cures)
    doubtful = cures & grown & jnp.logical_not(agree) & _matters(growth, position)
    divides |= cured & doubtful
    again = eqxi.unvmap_any(jnp.where(left > 1 + to_divide, cures, divides) & (left > 1))
    plan = Plan(cures, cures & first, jnp.where(divides, jnp.where(cured, 1, 2), 0))
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


def _matters(growth: Growth, position: Position) -> BoolScalarLike:
    """See `Growth.matters`, at the start of the solve."""
    if growth.spread is None:
        return True
    params_bar, earlier = params_of(position)
    return growth.matters(params_bar if earlier is None else tree_add(params_bar, earlier))
