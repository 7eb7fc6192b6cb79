"""Computations that the compiler does not fuse with their surroundings."""

from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._custom_types import RealScalarLike


def isolated(fn: Callable, t: RealScalarLike, *args) -> Any:
    """`fn(t, *args)`, compiled separately from its surroundings.

    The call is a branch of a conditional. The branch is always taken, but the compiler does
    not know that, even where it knows `t`. So it cannot fuse the call with the surrounding
    operations, which differ between forward and backward pass, and the call rounds alike in
    both.
    """
    structs = jax.eval_shape(fn, t, *args)

    def never(*_):
        return jtu.tree_map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), structs)

    # One predicate for the whole batch: otherwise both branches would be evaluated.
    always = lax.optimization_barrier(eqxi.unvmap_any(t == t))
    return lax.cond(always, lambda *a: fn(*a), never, t, *args)


def unfused(t: RealScalarLike, x: Any) -> Any:
    """`x`, without fusing what computes it with what uses it. Derivatives are not fused
    either. (Where XLA compiles for a CPU, it drops a `lax.optimization_barrier` before it
    fuses.)
    """
    return isolated(lambda t, x: x, t, x)
