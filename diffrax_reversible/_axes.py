"""Operations along the axes of a batch, which do nothing outside of one."""

from collections.abc import Hashable

import jax
import jax.extend.core as jex
import jax.lax as lax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def share(x: Array, names: tuple[Hashable, ...]) -> Array:
    """`x`, which members share along the named axes, over which its cotangent is summed."""
    return share_p.bind(x, names=names)


def total(x: Array, names: tuple[Hashable, ...]) -> Array:
    """The sum of `x` over those of the named axes that it has."""
    return _total_p.bind(x, names=names)


def without(x: Array, names: tuple[Hashable, ...]) -> Array:
    """`x`, which must not have any of the named axes."""
    return _without_p.bind(x, names=names)


def lend(x: Array, here: Array, names: tuple[Hashable, ...]) -> Array:
    """`x`, and for members that are not `here` the `x` of one that is, if there is one: the
    same one for every `x`. What the members share stays as it is."""
    return _lend_p.bind(here, x, names=names)


def _identity(x, *, names):
    del names
    return x


def _linear(name: str) -> jex.Primitive:
    primitive = jex.Primitive(name)
    primitive.def_impl(_identity)
    primitive.def_abstract_eval(_identity)
    mlir.register_lowering(primitive, mlir.lower_fun(_identity, multiple_results=False))
    return primitive


# Both are the identity, except for `jax.vmap` over a named axis, where they are the
# transposes of each other.
share_p, _total_p = _linear("share"), _linear("total")
# The identity, which raises an error if its operand has an axis that it must not have.
_without_p = _linear("without_axes")


# The axes of the first operand are the first ones of the second.
_lend_p = jex.Primitive("lend")
_lend_p.def_impl(lambda here, x, *, names: x)
_lend_p.def_abstract_eval(lambda here, x, *, names: x)
mlir.register_lowering(
    _lend_p, mlir.lower_fun(lambda here, x, *, names: x, multiple_results=False)
)


def _batch_lend(axis_data, operands, dims, *, names):
    here, x = operands
    named, x_dim = axis_data.name in names, dims[1]
    if axis_data.size == 0:
        return x, x_dim

    def first(x, dim):
        if dim is None:
            return jnp.broadcast_to(x, (axis_data.size, *x.shape))
        return jnp.moveaxis(x, dim, 0)

    here = first(here, dims[0])
    if not named:
        return _lend_p.bind(here, first(x, x_dim), names=names), 0
    # Along other axes all members lend to those for which none is `here` along this one.
    some, axes = jnp.any(here, axis=0), here.ndim - 1
    if x_dim is None:
        return _lend_p.bind(some, x, names=names), None
    x, take = jnp.moveaxis(x, x_dim, 0), lax.dynamic_index_in_dim
    for _ in range(axes):
        take = jax.vmap(take, (1, 0, None))
    lent = take(x, jnp.argmax(here, axis=0), 0)
    here = jnp.expand_dims(here, range(here.ndim, x.ndim))
    x = jnp.moveaxis(jnp.where(here, x, jnp.moveaxis(lent, axes, 0)), 0, axes)
    return _lend_p.bind(some, x, names=names), axes


def _jvp_lend(primals, tangents, *, names):
    (here, x), (_, dot) = primals, tangents
    if type(dot) is not ad.Zero and dot.dtype != jax.dtypes.float0:
        dot = _lend_p.bind(here, dot, names=names)
    return _lend_p.bind(here, x, names=names), dot


batching.fancy_primitive_batchers[_lend_p] = _batch_lend
ad.primitive_jvps[_lend_p] = _jvp_lend


def _batch_share(axis_data, xs, dims, *, names):
    del axis_data
    return share_p.bind(*xs, names=names), *dims


def _batch_total(axis_data, xs, dims, *, names):
    (x,), (dim,) = xs, dims
    if dim is not None and axis_data.name in names:
        x, dim = jnp.sum(x, axis=dim, dtype=x.dtype), None
    return _total_p.bind(x, names=names), dim


def _batch_without(axis_data, xs, dims, *, names):
    (x,), (dim,) = xs, dims
    assert dim is None or axis_data.name not in names
    return _without_p.bind(x, names=names), dim


batching.fancy_primitive_batchers[share_p] = _batch_share
batching.fancy_primitive_batchers[_total_p] = _batch_total
batching.fancy_primitive_batchers[_without_p] = _batch_without
ad.deflinear(share_p, lambda ct, *, names: [_total_p.bind(ct, names=names)])
ad.deflinear(_total_p, lambda ct, *, names: [share_p.bind(ct, names=names)])
ad.deflinear(_without_p, lambda ct, *, names: [_without_p.bind(ct, names=names)])
