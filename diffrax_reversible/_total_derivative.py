"""Derivatives along a solution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ._custom_types import RealScalarLike


def total_derivative(g: Callable, field: Callable, length: RealScalarLike = 1) -> Callable:
    """`d/dt g(t, y(t))` as a function of `(t, y)`, with `y' = field(t, y)`.

    If `field` is multiplied by `length`, then so is the derivative.
    """

    def derivative(t, y):
        dt = jnp.asarray(length, jnp.result_type(t))
        _, tangent = jax.jvp(g, (t, y), (dt, field(t, y)))
        return tangent

    return derivative


def total_derivatives(field: Callable, count: int) -> Callable:
    """A function of `(t, y)` that returns `field` and its first `count` derivatives along
    the solution.

    Each is computed from the one before, so that all but the last are evaluated once.
    """

    def up_to(lower):
        def derivatives(t, y):
            dt = jnp.ones((), jnp.result_type(t))
            values, tangents = jax.jvp(lower, (t, y), (dt, field(t, y)))
            return values[:1] + tangents

        return derivatives

    result = lambda t, y: (field(t, y),)
    for _ in range(count):
        result = up_to(result)
    return result
