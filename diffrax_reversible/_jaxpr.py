"""Properties of a function that its jaxpr shows."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree


# Operations whose derivative in reverse mode is custom.
custom_vjps = {"custom_vjp_call", "custom_vjp_call_jaxpr"}
# Their inputs are those of the jaxpr that they call.
_calls = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
_none: Mapping[str, Callable] = MappingProxyType({})


def meets(
    fn: Callable[..., PyTree[Array]],
    *args: PyTree[Array],
    names: set[str],
    trusted: Mapping[str, Callable] = _none,
) -> bool:
    """Whether an operation of `fn(*args)` that depends on `args` has one of the `names`, or
    returns integers or Booleans.

    - `names`: of operations, after "complex " for those that count with complex operands
        only, after "inverse " for those with a negative exponent, and before " by" for
        those whose last operand depends on `args`.
    - `trusted`: compiled functions of one array that are not searched, by their names.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _meets(jaxpr, set(jaxpr.invars), names, trusted)


def no_derivative(caller: str, name: str = "vector field") -> str:
    """The message of an error where `derives_custom_vjp`."""
    return (
        f"{caller} with derivatives of the {name}, by forward mode, which a function with "
        "`jax.custom_vjp` does not have. Define it with `jax.custom_jvp`, or, if it is "
        "another solve, pass that `adjoint=diffrax.DirectAdjoint()`."
    )


def derives_custom_vjp(fn: Callable[..., PyTree[Array]], *args: PyTree[Array]) -> bool:
    """Whether `fn(*args)` takes a derivative, by forward mode, of a function with a
    `jax.custom_vjp`. JAX traces most of these, and then does not compile them."""
    try:
        jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    except NotImplementedError:
        # JAX has no rule for the derivative of such a derivative.
        return True
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _meets(jaxpr, set(jaxpr.invars), {"custom_lin"}, discrete=False)


def _meets(
    jaxpr,
    moving: set,
    names: set[str],
    trusted: Mapping[str, Callable] = _none,
    discrete: bool = True,
) -> bool:
    """As `meets`, for operations that depend on the `moving` variables, and those with
    `discrete` results only if asked for."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if not any(_moves(v, moving) for v in equation.invars):
            continue
        moving.update(equation.outvars)
        if name in _calls and _is_one_of(trusted, equation):
            continue
        outputs = [v.aval.dtype for v in equation.outvars]
        inexact = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in outputs)
        found = not names.isdisjoint(_descriptions(equation, moving))
        if found or (discrete and not inexact and name not in _calls):
            return True
        for inner in _inner(equation.params):
            # In a loop, every carried variable may depend on the moving ones in the end.
            inputs = inner.invars
            if name in _calls:
                pairs = zip(inputs, equation.invars, strict=True)
                inputs = [v for v, outer in pairs if _moves(outer, moving)]
            if _meets(inner, set(inputs), names, trusted, discrete):
                return True
    return False


def _descriptions(equation, moving: set) -> set[str]:
    """The name of an operation, and what else is to be said of it, see `meets`."""
    name, operands = equation.primitive.name, equation.invars
    described = {name}
    dtypes = [v.aval.dtype for v in operands]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        described.add(f"complex {name}")
    if name == "integer_pow" and equation.params["y"] < 0:
        described.add(f"inverse {name}")
    if _moves(operands[-1], moving):
        described.add(f"{name} by")
    return described


def _is_one_of(functions: Mapping[str, Callable], equation) -> bool:
    """Whether a call is that of one of these functions of one array: others may have its
    name."""
    fn = functions.get(equation.params.get("name"))
    if fn is None or len(equation.invars) != 1:
        return False
    aval = equation.invars[0].aval
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
    expected = jax.make_jaxpr(fn)(struct).jaxpr
    return [*_operations([equation])] == [*_operations(expected.eqns)]


def _operations(equations: list) -> Iterator[str]:
    """The names of all operations, including those within others."""
    for equation in equations:
        yield equation.primitive.name
        for inner in _inner(equation.params):
            yield from _operations(inner.eqns)


def reads(fn: Callable[..., PyTree[Array]], *args: PyTree[Array]) -> list[bool]:
    """Whether the value of `fn(*args)` depends on each of the arrays in `args`."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return used


def has_custom_vjp(jaxpr) -> bool:
    """Whether an operation of a jaxpr that depends on its inputs has a `jax.custom_vjp`."""
    return _meets(jaxpr, set(jaxpr.invars), custom_vjps, discrete=False)


def _inner(params: dict[str, Any]) -> list:
    """The jaxprs within an operation, such as a loop."""
    values = [x for v in params.values() for x in (v if isinstance(v, tuple) else (v,))]
    values = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in values if hasattr(value, "eqns")]


def _moves(variable, moving: set) -> bool:
    return not hasattr(variable, "val") and variable in moving
