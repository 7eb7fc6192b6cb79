"""The error estimate of a step, combined from several."""

import jax.numpy as jnp
from jaxtyping import Array

from .._coefficients.coarse_error import power, threshold
from .._precision import tiny


def combine_errors(fine: Array, coarse: Array, k0: Array, k1: Array) -> Array:
    """The error estimate from two estimates of different order.

    The coarse one counts close to the limit of stability, where it is not small compared to
    the update of the entry, and where the fine one may miss the error. See
    `coarse_error.py`.
    """
    size = jnp.abs(coarse)
    slopes = threshold * (jnp.abs(k0) + jnp.abs(k1))
    limit = jnp.maximum(jnp.maximum(slopes, size), tiny(size))
    coarse = coarse * ((size / limit) ** power).astype(coarse.dtype)
    return jnp.where(jnp.abs(coarse) > jnp.abs(fine), coarse, fine)


def nan_if_infinite(y1: Array, y0: Array) -> Array:
    """The end of a step, NaN where it has become infinite: `PIDController` rejects a step
    that is NaN, but not an infinite one (`inf/inf`)."""
    return jnp.where(jnp.isinf(y1) & jnp.isfinite(y0), jnp.nan, y1)


def raise_error(error: Array, least: Array) -> Array:
    """An error estimate, raised where it is below another one."""
    return jnp.maximum(jnp.abs(error), least).astype(error.dtype)
