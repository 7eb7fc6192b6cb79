"""Whether two walks have come to the same gradient."""

from typing import NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._axes import total
from .._custom_types import BoolScalarLike
from .._precision import eps
from .growth import Growth
from .sketch import alike, largest_number, norm, Sketch, sketch
from .spread import many
from .walk import Walk


# A gradient that seems to have grown is accepted if it differs by no more than this
# fraction from that of another walk: a spoilt gradient would differ more. Tuned on
# `examples/benchmarks/refusals.py`.
_alike = 0.1
# If steps are divided, single arrays of many parameters may differ by this fraction, if all
# of them together differ by no more than that. Near the minimum of a loss, what is left of
# an array is a matter of the solve's error, of which each of many arrays has its own.
_alike_each, _alike_together = 0.3, 0.05
# If two walks differ, the cotangent of the initial state by a third one has to be as near
# to that of the second one.
_near = 0.01
# An array of the cotangent of the state has vanished below this power of the machine
# epsilon, as a fraction of the largest entry that it has had: 7e-5 in single precision.
_vanished = 0.6
# Members of a batch on which two walks differ may contribute this fraction of their sum,
# and this one of an array of which each member has its own.
_hardly_of_sum, _hardly_of_array = 0.03, 1e-3


class Sketches(NamedTuple):
    """Sketches of a gradient: of the cotangents of the initial state, whether or not it is
    differentiated, and of the parameters."""

    states: Sketch
    params: Sketch

    @staticmethod
    def none() -> "Sketches":
        return Sketches(sketch(()), sketch(()))


def same_gradient(
    walk: Walk, growth: Growth, last: Sketches, here: Sketches, grown: BoolScalarLike
) -> BoolScalarLike:
    """Whether this walk has come to the same gradient as the last one.

    - `grown`: whether the gradient of this element of a batch has grown, or would have.

    Where the flow has contracted a lot, the cotangent of the state has vanished, and the
    rest of it is a matter of rounding. So an array of it may also differ by a tiny fraction
    of the largest entry that it has had, see `_vanished`. The members of a batch have a
    single gradient of what they share, to which those that differ may contribute little. So
    they may to an array of parameters of which each member has its own: next to the others
    it is nothing, and where a solution has vanished, it is a matter of the solve's error.
    """
    same = alike(last.params, here.params, _alike)
    if len(walk.axes) > 0:
        differs = jnp.logical_not(same) & grown
        same |= _hardly_differ(walk, last.params, here.params, differs)
    same = same.all()
    if many(walk.params) and len(here.params) > 1:
        same |= (growth.plan.divides > 1) & same_together(last.params, here.params)
    if walk.differentiates_start:
        largest = jtu.tree_leaves(growth.largest)
        sizes = jnp.array([*largest], here.states.dtype)
        change = norm(here.states - last.states, sizes)
        vanished = change <= jnp.array([eps(x) ** _vanished for x in largest], change.dtype)
        vanished &= jnp.isfinite(sizes)
        same &= (alike(last.states, here.states, _alike) | vanished).all()
    return same


def same_together(last: Sketch, here: Sketch) -> BoolScalarLike:
    """Whether all arrays together are the same, and none differs by much."""
    together = alike(last.ravel(), here.ravel(), _alike_together)
    return alike(last, here, _alike_each).all() & together


def same_at_start(last: Sketches, here: Sketches, agree: BoolScalarLike) -> BoolScalarLike:
    """Whether this walk has come to the same cotangent of the initial state as the last
    one, of which it is known whether it and the one before it `agree`."""
    return alike(last.states, here.states, jnp.where(agree, _alike, _near)).all()


def _hardly_differ(
    walk: Walk, last: Sketch, now: Sketch, differs: Bool[Array, " arrays"]
) -> Bool[Array, " arrays"]:
    """Whether the members of a batch that differ hardly contribute to its gradient: of an
    array that they share, to the sum; otherwise, to the array of all members."""
    flags = [False] * len(now)
    if walk.summed is not None:
        flags = jtu.tree_leaves(walk.summed.flags)
    axes, is_shared = walk.axes, jnp.array(flags, bool)
    scale = total(largest_number(last, now), axes)
    doubtful = jnp.where(differs, norm(last, scale) + norm(now, scale), 0)
    of_sum = _hardly_of_sum * norm(total(now, axes), scale)
    of_array = _hardly_of_array * jnp.sqrt(total(norm(now, scale) ** 2, axes))
    hardly = total(doubtful, axes) <= jnp.where(is_shared, of_sum, of_array)
    # What is summed as it arises is the same for all members.
    has_members = jnp.logical_not(is_shared) | (walk.shared is None)
    return hardly & jnp.isfinite(scale) & has_members
