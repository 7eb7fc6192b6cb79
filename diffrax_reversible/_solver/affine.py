"""Recognition of affine functions."""

from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from .._jaxpr import meets


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

    jaxpr = jax.make_jaxpr(derivative)(point, point).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if any(used[: len(jtu.tree_leaves(point))]):
        return False
    jaxpr = jax.make_jaxpr(fn)(*point).jaxpr
    return not meets(jaxpr, set(jaxpr.invars), _jumps)
