"""Recognition of affine functions."""

from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jaxpr import meets, reads


# Operations whose derivative is zero or need not be that of the function, so that it says
# nothing. Operations that return integers or Booleans are excluded as well.
_jumps = {
    *("floor", "ceil", "round", "sign", "rem", "nextafter", "stop_gradient"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("pure_callback", "io_callback"),
}


def is_affine(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether `fn` is recognised as affine at `point`: no operation of its derivative
    depends on the point, and no operation of `fn` lacks a derivative.

    Some affine functions are not recognised."""

    def derivative(point, direction):
        return jax.jvp(fn, point, direction)[1]

    if meets(fn, *point, names=_jumps):
        return False
    used = reads(derivative, point, point)
    return not any(used[: len(jtu.tree_leaves(point))])
