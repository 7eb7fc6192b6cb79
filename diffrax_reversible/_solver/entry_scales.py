"""The scales of deviations, one for every entry."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._precision import eps


# Restart where a deviation has grown by `eps**growth_power` since the last restart.
# Rounding errors grow by as much in the backward pass: to about `sqrt(eps) / 100`.
growth_power = -0.37
# The scale of an entry is at least `eps**_least_scale` times the largest one.
_least_scale = 0.75
_sample_size = 1024


def sample(x: Array) -> Float[Array, " sample"]:
    """Every entry of an array of up to about two thousand entries, and about a thousand
    entries, evenly spread, of a larger one.

    Watching every entry of a large array would cost as many passes over memory as a cheap
    vector field. Growth in entries that are not sampled goes unnoticed until the backward
    pass, unless sampled entries grow too.
    """
    x = x.reshape(-1)
    # An odd stride does not sample axes of even length always at the same places.
    stride = 1 if x.size <= 2 * _sample_size else x.size // _sample_size | 1
    return x[::stride]


def largest_so_far(
    scales: Float[Array, " sample"], y: Array
) -> tuple[Float[Array, " sample"], Float[Array, " sample"]]:
    """The largest magnitudes of sampled entries so far, from the earlier ones and the
    present state; and the same as divisors, see `units`."""
    scales = jnp.maximum(scales, jnp.abs(sample(y)))
    return scales, units(scales)


def units(scales: Float[Array, " sample"]) -> Float[Array, " sample"]:
    """Scales as divisors: none is zero, or tiny compared to the largest."""
    least = eps(scales) ** _least_scale * largest_entry(scales)
    scales = jnp.maximum(scales, least)
    return jnp.where(scales == 0, 1, scales)


def largest_entry(x: Array) -> Float[Array, ""]:
    return jnp.max(x, initial=0)


def has_grown(relative: Float[Array, ""], seed: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a deviation has grown since the `seed` by more than the backward pass can
    undo."""
    return relative > eps(relative) ** growth_power * seed
