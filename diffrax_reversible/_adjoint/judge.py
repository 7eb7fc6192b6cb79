"""Whether the walk missed a known state, and the number of steps to the next one."""

from typing import NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractBrownianPath
from jaxtyping import Array, Float

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from .drift import coarsest_eps
from .position import longest_reach, Position
from .walk import Walk


# Fractions of the tolerance. The walk repeats a segment whose miss exceeds both the first,
# tuned on `examples/benchmarks/outcomes.py`, and the segment's share of the second, by
# which eight segments may miss together. After a miss below the third, the number of steps
# between known states doubles.
_repeated, _repeated_of_all, _well = 1 / 64, 1 / 8, 1 / 512
# Rounding errors, in machine epsilons of the largest entry of an array: negligible for a
# gradient, and allowed in a single step.
_rounding, _rounding_of_step = 4, 16


class Arrival(NamedTuple):
    """The arrival of the walk at a known state.

    - `at`: the position there, with the known state.
    - `worst`, `beside`: the largest errors of the reconstruction, relative to the scale of
        each entry, and to that beside the largest of its array. See `Drift`. NaN if the
        walk has overflowed.
    - `here`: whether this element of a batch has arrived.
    """

    at: Position
    worst: Float[Array, ""]
    beside: Float[Array, ""]
    here: BoolScalarLike


def judge(
    walk: Walk, position: Position, arrival: Arrival
) -> tuple[BoolScalarLike, RealScalarLike, IntScalarLike]:
    """Whether the walk missed a known state, the largest error of a replay so far, and the
    next number of steps between known states, which adapts as step sizes do."""
    origin, reach = position.origin, position.reach
    assert origin is not None
    here, off, worst = arrival.here, arrival.beside, arrival.worst
    within = worst <= walk.drift_tol
    if walk.residuals.record.outermost is not None:
        # Recorded times are exact, unless the solve was replayed.
        in_time = position.clock.off(arrival.at.clock.start)
        off = jnp.maximum(off, in_time.astype(off.dtype))
    parted = jnp.maximum(position.parted, jnp.where(here & position.known, off, 0))
    so_far = position.drift <= walk.drift_tol
    so_far &= position.clock.drift <= walk.drift_tol
    length = origin.step - position.step
    # With `drift_tol=0` nothing but a miss of zero is allowed.
    beyond = jnp.where(off == 0, 0, off / _allowed(walk, parted, length))
    right = within & (beyond <= 1)
    if walk.shared is not None and walk.shares_all:
        # All members repeat what one misses, and the gradient is the sum of theirs.
        right |= walk.shared.all(within | jnp.logical_not(here)) & (
            walk.shared.mean(beyond, here) <= 1
        )
    several = (length > 1) & (reach > 1)
    missed = several & jnp.logical_not(right)
    if walk.pulls_from_start:
        # A single step that misses is not undone again.
        missed |= (length == 1) & (reach > 0) & jnp.logical_not(within)
    missed &= here & so_far
    well = max(_well * walk.drift_tol, _rounding * coarsest_eps(walk.start_states))
    well = (off <= well) & (worst <= _repeated_of_all * walk.drift_tol)
    well = here & well & (2 * length >= reach)
    fewer = jnp.maximum(jnp.minimum(reach, length) // 4, jnp.where(several, 1, 0))
    more = jnp.maximum(2 * reach, 1)
    reach = jnp.where(well, more, jnp.where(missed, fewer, reach))
    return missed, parted, jnp.minimum(reach, longest_reach)


def beside_rounding(walk: Walk, single: BoolScalarLike) -> RealScalarLike:
    """The least scale of an entry, as a fraction of the largest in its array, for deciding
    whether to undo steps again, and whether a `single` step misses.

    An entry of a vector field is a sum, and rounds as its terms do. With this scale, so
    many epsilons of the largest entry are no miss.
    """
    epsilons = jnp.where(single, _rounding_of_step, _rounding)
    rounding = coarsest_eps(walk.start_states) * epsilons
    allowed = walk.drift_tol * jnp.where(single, 1, _repeated)
    return rounding / jnp.maximum(allowed, rounding)


def _allowed(
    walk: Walk, parted: Float[Array, ""], length: IntScalarLike
) -> Float[Array, ""]:
    """The largest miss of a known state after which a segment of `length` steps is kept.

    This is a fraction of the tolerance, so that gradients are more accurate than required.
    It is larger, up to the tolerance, if a replay has `parted` further from the solve. With
    a Brownian path it is the tolerance, as the path turns an ulp of time into the square
    root of an ulp.
    """
    terms, _ = walk.combine(walk.params)
    is_path = lambda x: isinstance(x, AbstractBrownianPath)
    random = any(map(is_path, jtu.tree_leaves(terms, is_leaf=is_path)))
    count = jnp.maximum(walk.residuals.count, 1)
    share = jnp.asarray(length, jnp.float32) / count.astype(jnp.float32)
    least = 1 if random else jnp.maximum(_repeated, _repeated_of_all * share)
    return jnp.clip(parted, least * walk.drift_tol, walk.drift_tol)
