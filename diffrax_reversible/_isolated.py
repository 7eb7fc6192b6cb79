"""Computations that round alike wherever they stand."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
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


def recomputed(fn: Callable, t: RealScalarLike, *args) -> Any:
    """`fn(t, *args)`, of which a gradient keeps nothing but what it is a function of.

    It is isolated as well: it is made again only when the cotangent of its value is there.
    Nothing else would keep XLA from making it before the walk back, and holding on to its
    activations meanwhile.
    """
    return isolated(eqx.filter_checkpoint(fn), t, *args)
