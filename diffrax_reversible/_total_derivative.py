"""Derivatives along a solution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._custom_types import RealScalarLike


def total_derivatives(field: Callable, count: int, length: RealScalarLike = 1) -> Callable:
    """A function of `(t, y)` that returns `field` and its first `count` derivatives along
    the solution of `y' = field(t, y)`.

    Each is computed from the one before, so that all but the last are evaluated once. If
    `field` is multiplied by the `length` of a step, then so is each derivative.
    """

    def up_to(lower):
        def derivatives(t, y):
            dt = jnp.asarray(length, jnp.result_type(t))
            values, tangents = jax.jvp(lower, (t, y), (dt, field(t, y)))
            return values[:1] + tangents

        return derivatives

    result = lambda t, y: (field(t, y),)
    for _ in range(count):
        result = up_to(result)
    return result
