"""Functions that are seen to be affine."""

from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree

from .._jaxpr import meets


# Of which the derivative is zero, or need not be that of the function, so that it does not
# tell; beside all that makes integers and Booleans.
_jumps = {
    *("floor", "ceil", "round", "sign", "rem", "nextafter", "stop_gradient"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("pure_callback", "io_callback"),
}


def is_affine(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether `fn(*point)` is seen to be affine: its derivative is made from the point by
    no operation, and nothing else is made from it that has none. It is not seen of all
    functions that are affine."""

    def derivative(point, direction):
        return jax.jvp(fn, point, direction)[1]

    jaxpr = jax.make_jaxpr(derivative)(point, point).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if any(used[: len(jtu.tree_leaves(point))]):
        return False
    jaxpr = jax.make_jaxpr(fn)(*point).jaxpr
    return not meets(jaxpr, set(jaxpr.invars), _jumps)
