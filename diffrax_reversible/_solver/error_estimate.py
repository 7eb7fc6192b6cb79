"""The error estimate of a step, combined from several."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._coefficients.coarse_error import power, threshold
from .._precision import tiny
from .entry_scales import sample


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


class Excess(eqx.Module):
    """An error estimate for the sampled entries of an array, and their scales."""

    error: Float[Array, " sample"]
    unit: Float[Array, " sample"]

    def raise_error(self, error: Array) -> Array:
        """Raise the sampled entries of another estimate at least to this one.

        If not all entries are sampled, the whole estimate is raised by the average factor
        of the sample."""
        known = jnp.abs(sample(error))
        raised = jnp.maximum(known, self.error)
        if raised.size == error.size:
            return raised.reshape(error.shape).astype(error.dtype)
        before, after = (jnp.sum((x / self.unit) ** 2) for x in (known, raised))
        factor = jnp.sqrt(jnp.where(before == 0, 1, after / before))
        return error * factor.astype(error.dtype)
