"""Whether two walks have come to the same gradient."""

from collections.abc import Hashable
from typing import NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._axes import total
from .._custom_types import BoolScalarLike
from .._precision import eps, finest, for_sums
from .growth import Growth
from .sketch import alike, norm, Sketch
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

    states: list[Sketch]
    params: list[Sketch]

    @staticmethod
    def none() -> "Sketches":
        return Sketches([], [])


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
    flags = [False] * len(here.params)
    if walk.summed is not None:
        flags = jtu.tree_leaves(walk.summed.flags)
    starts, same = [], []
    if walk.differentiates_start:
        sizes = jtu.tree_leaves(growth.largest)
        for before, now, size in zip(last.states, here.states, sizes, strict=True):
            vanished = norm(now - before, size) <= eps(now) ** _vanished
            starts.append(alike(before, now, _alike) | (vanished & jnp.isfinite(size)))
    for before, now, is_shared in zip(last.params, here.params, flags, strict=True):
        agrees = alike(before, now, _alike)
        in_batch = len(walk.axes) > 0
        if in_batch and not (is_shared and walk.shared is not None):
            differs = grown & jnp.logical_not(agrees)
            agrees |= _hardly_differs(walk.axes, is_shared, before, now, differs)
        same.append(agrees)
    agrees = _all(same)
    if many(walk.params) and len(same) > 1:
        agrees |= (growth.plan.divides > 1) & same_together(last.params, here.params)
    return _all([agrees, *starts])


def _all(same: list[Bool[Array, ""]]) -> Bool[Array, ""]:
    return jnp.stack([jnp.array(True), *same]).all()


def same_together(last: list[Sketch], here: list[Sketch]) -> Bool[Array, ""]:
    """Whether all arrays together are the same, and none differs by much."""
    each = [alike(*both, _alike_each) for both in zip(last, here, strict=True)]
    dtype = for_sums(finest(here))
    join = lambda arrays: jnp.concatenate([x.astype(dtype) for x in arrays])
    return _all([*each, alike(join(last), join(here), _alike_together)])


def same_at_start(last: Sketches, here: Sketches, agree: BoolScalarLike) -> BoolScalarLike:
    """Whether this walk has come to the same cotangent of the initial state as the last
    one, of which it is known whether it and the one before it `agree`."""
    tol = jnp.where(agree, _alike, _near)
    return _all([alike(*both, tol) for both in zip(last.states, here.states, strict=True)])


def _hardly_differs(
    axes: tuple[Hashable, ...],
    is_shared: bool,
    last: Sketch,
    now: Sketch,
    differs: BoolScalarLike,
) -> BoolScalarLike:
    """Whether the members of a batch that differ hardly contribute to its gradient: of an
    array that they share, to the sum; otherwise, to the array of all members."""
    # Half precision would overflow.
    if now.dtype.itemsize < 4:
        last, now = last.astype(jnp.float32), now.astype(jnp.float32)
    scale = jnp.max(jnp.maximum(jnp.abs(last), jnp.abs(now)), initial=0)
    scale = total(scale, axes)
    doubtful = jnp.where(differs, norm(last, scale) + norm(now, scale), 0)
    if is_shared:
        whole, least = norm(total(now, axes), scale), _hardly_of_sum
    else:
        whole, least = jnp.sqrt(total(norm(now, scale) ** 2, axes)), _hardly_of_array
    return (total(doubtful, axes) <= least * whole) & jnp.isfinite(scale)
