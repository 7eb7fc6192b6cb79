"""What is seen of a function in its jaxpr."""

from typing import Any

import jax.numpy as jnp


# With the inputs of what is called.
_calls = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}


def meets(
    jaxpr, moving: set, names: set[str], trusted: frozenset[str] = frozenset()
) -> bool:
    """Whether any of the operations that depend on the `moving` variables has one of the
    `names`, or makes integers or Booleans.

    - `trusted`: names of compiled functions that are not looked into.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if not any(_moves(v, moving) for v in equation.invars):
            continue
        moving.update(equation.outvars)
        if name in _calls and equation.params.get("name") in trusted:
            continue
        outputs = [v.aval.dtype for v in equation.outvars]
        discrete = not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in outputs)
        if name in names or (discrete and name not in _calls):
            return True
        for inner in _inner(equation.params):
            # In a loop, whatever is carried may move in the end.
            inputs = inner.invars
            if name in _calls:
                pairs = zip(inputs, equation.invars, strict=True)
                inputs = [v for v, outer in pairs if _moves(outer, moving)]
            if meets(inner, set(inputs), names, trusted):
                return True
    return False


def _inner(params: dict[str, Any]) -> list:
    """The computations within an operation, such as a loop."""
    values = [x for v in params.values() for x in (v if isinstance(v, tuple) else (v,))]
    values = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in values if hasattr(value, "eqns")]


def _moves(variable, moving: set) -> bool:
    return not hasattr(variable, "val") and variable in moving
