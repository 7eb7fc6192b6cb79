"""The scales of deviations, one for every entry."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._precision import eps


# Restart where a deviation has grown by `eps**growth_power` since the last restart.
# Rounding errors grow by as much in the backward pass: to about `sqrt(eps) / 100`.
growth_power = -0.37
# The scale of an entry is at least `eps**_least_scale` times the largest one.
_least_scale = 0.75


def largest_so_far(
    scales: Float[Array, "..."], y: Array
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The largest magnitude of every entry so far, from the earlier ones and the present
    state; and the same as divisors, see `units`."""
    scales = jnp.maximum(scales, jnp.abs(y))
    return scales, units(scales)


def units(scales: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scales as divisors: none is zero, or tiny compared to the largest."""
    scales = jnp.maximum(scales, least(scales))
    return jnp.where(scales == 0, 1, scales)


def least(scales: Float[Array, "..."]) -> Float[Array, ""]:
    """The smallest scale that is not tiny compared to the largest."""
    return eps(scales) ** _least_scale * largest_entry(scales)


def where_finite(y: Array, *others: Array) -> list[Array]:
    """`y` and `others`, with zero in the entries at which `y` is not finite. An infinite
    bound has no scale."""
    finite = jnp.isfinite(y)
    return [jnp.where(finite, x, jnp.zeros_like(x)) for x in (y, *others)]


def largest_entry(x: Array) -> Float[Array, ""]:
    return jnp.max(x, initial=0)


def has_grown(relative: Float[Array, ""], seed: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a deviation has grown since the `seed` by more than the backward pass can
    undo."""
    return relative > eps(relative) ** growth_power * seed
