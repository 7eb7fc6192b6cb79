"""What deviations are measured by: every entry by a scale of its own."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._precision import eps


# Restart where a deviation has grown by this power of the machine epsilon since the last
# restart, as by so much rounding errors grow in the walk back: to about a hundredth of the
# square root of the machine epsilon.
growth_power = -0.37
# No entry is taken for smaller than this power of the machine epsilon of the largest.
_least_scale = 0.75
_sample_size = 1024


def sample(x: Array) -> Float[Array, " sample"]:
    """Every entry of an array of up to two thousand, and of a larger one about a thousand,
    evenly spread.

    To watch every entry of these would cost as many passes over memory as a cheap vector
    field does. What happens to an entry that is not sampled, and to none that is, goes
    unnoticed until the walk back.
    """
    x = x.reshape(-1)
    # Odd, for axes of even length not to be sampled at the same places.
    stride = 1 if x.size <= 2 * _sample_size else x.size // _sample_size | 1
    return x[::stride]


def largest_so_far(
    scales: Float[Array, " sample"], y: Array
) -> tuple[Float[Array, " sample"], Float[Array, " sample"]]:
    """The largest magnitude that sampled entries have had, from that before and the present
    state; and the same to divide by, of which none is zero, or tiny beside the others."""
    scales = jnp.maximum(scales, jnp.abs(sample(y)))
    return scales, units(scales)


def units(scales: Float[Array, " sample"]) -> Float[Array, " sample"]:
    """Scales to divide by."""
    least = eps(scales) ** _least_scale * largest_entry(scales)
    scales = jnp.maximum(scales, least)
    return jnp.where(scales == 0, 1, scales)


def largest_entry(x: Array) -> Float[Array, ""]:
    return jnp.max(x, initial=0)


def has_grown(relative: Float[Array, ""], seed: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a deviation has grown as much since it was the `seed` as may be walked
    back."""
    return relative > eps(relative) ** growth_power * seed
