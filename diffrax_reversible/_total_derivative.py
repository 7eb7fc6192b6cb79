"""Derivatives along a solution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._custom_types import RealScalarLike


def total_derivative(g: Callable, field: Callable, length: RealScalarLike = 1) -> Callable:
    """`d/dt g(t, y(t))` as a function of `(t, y)`, with `y' = field(t, y)`.

    If `field` is times `length`, then so is the derivative.
    """

    def derivative(t, y):
        dt = jnp.asarray(length, jnp.result_type(t))
        _, tangent = jax.jvp(g, (t, y), (dt, field(t, y)))
        return tangent

    return derivative
