"""Computations that round alike wherever they stand."""

from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._custom_types import RealScalarLike


def isolated(fn: Callable, t: RealScalarLike, *args) -> Any:
    """`fn(t, *args)`, in a computation of its own.

    That is a branch of a conditional of which the compiler does not know that it is
    always taken, even where it knows `t`. It cannot mix it with what stands around, which
    in the walk back is something else than in the forward pass, and so it rounds alike.
    """
    structs = jax.eval_shape(fn, t, *args)

    def never(*_):
        return jtu.tree_map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), structs)

    # The same for all elements of a batch, or both branches would be evaluated.
    always = lax.optimization_barrier(eqxi.unvmap_any(t == t))
    return lax.cond(always, lambda *a: fn(*a), never, t, *args)
