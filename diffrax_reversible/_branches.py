"""Detection of functions that may have kinks or singularities."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

from ._jaxpr import custom_vjps, meets


# Primitives, besides comparisons, that jump, or whose derivative or custom derivative may;
# complex ones at branch cuts.
_kinks = {
    "atan2",
    *(f"complex {name}" for name in ("log", "log1p", "sqrt", "rsqrt", "pow")),
    *(f"complex {kind}{name}" for kind in ("asin", "acos", "atan") for name in ("", "h")),
    *("max", "min", "abs", "sign", "clamp", "floor", "ceil", "round", "rem", "sort"),
    *("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"),
    *("cummax", "cummin", "nextafter"),
    *("custom_jvp_call", *custom_vjps),
}
# Primitives that may be singular, or whose derivatives may.
_singular = {
    *("div by", "inverse integer_pow", "log", "log1p", "pow", "sqrt", "rsqrt", "cbrt"),
    *("tan", "asin", "acos", "acosh", "atanh"),
}
# Functions of JAX that are smooth although they compare.
_smooth = {"softplus": jax.nn.softplus}


def may_branch(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether the derivative of `fn` may jump, and thus differ between a point and its
    reconstruction. Callbacks are not inspected."""
    return meets(fn, *point, names=_kinks, trusted=_smooth)


def may_be_singular(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether `fn` or a derivative may tend to infinity somewhere."""
    return meets(fn, *point, names=_singular, trusted=_smooth)
