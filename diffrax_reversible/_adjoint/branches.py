"""Functions that may have kinks."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from .._jaxpr import meets


# Of which the derivative jumps, or which have a derivative of their own, that may; beside
# all comparisons.
_kinks = {
    *("max", "min", "abs", "sign", "clamp", "floor", "ceil", "round", "rem", "sort"),
    *("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"),
    *("cummax", "cummin", "nextafter"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
# Functions of JAX that compare, and are smooth all the same.
_smooth = frozenset({"softplus"})


def may_branch(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether there may be points at which the derivative of `fn` jumps, so that it is not
    the same for a point and for one that is off by rounding. What a callback does is not
    seen."""
    jaxpr = jax.make_jaxpr(fn)(*point).jaxpr
    return meets(jaxpr, set(jaxpr.invars), _kinks, _smooth)
