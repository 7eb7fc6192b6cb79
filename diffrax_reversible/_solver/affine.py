"""Functions that are seen to be affine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree


# Of which the derivative is zero, or need not be that of the function, so that it does not
# tell; beside all that makes integers and Booleans.
_jumps = {
    *("floor", "ceil", "round", "sign", "rem", "nextafter", "stop_gradient"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("pure_callback", "io_callback"),
}
# With the inputs of what is called.
_calls = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


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
    return not _has_jump(jaxpr, set(jaxpr.invars))


def _has_jump(jaxpr, moving: set) -> bool:
    """Whether there is one among what depends on the `moving` variables."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if not any(_moves(v, moving) for v in equation.invars):
            continue
        outputs = [v.aval.dtype for v in equation.outvars]
        discrete = not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in outputs)
        if name in _jumps or (discrete and name not in _calls):
            return True
        moving.update(equation.outvars)
        for inner in _inner(equation.params):
            # In a loop, whatever is carried may move in the end.
            inputs = inner.invars
            if name in _calls:
                pairs = zip(inputs, equation.invars, strict=True)
                inputs = [v for v, outer in pairs if _moves(outer, moving)]
            if _has_jump(inner, set(inputs)):
                return True
    return False


def _inner(params: dict[str, Any]) -> list:
    """The computations within an operation, such as a loop."""
    values = [x for v in params.values() for x in (v if isinstance(v, tuple) else (v,))]
    values = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in values if hasattr(value, "eqns")]


def _moves(variable, moving: set) -> bool:
    return not hasattr(variable, "val") and variable in moving
