"""Pull-backs in a batch whose members share parameters.

`jax.vmap` of a pull-back computes a cotangent of the parameters for each member. If only
their sum matters, that takes a batch of outer products for every layer of a network, where
the pull-back of the whole batch takes one product of matrices, which sums over the members.
"""

import functools as ft
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from ._jaxpr import has_custom_vjp


def share(x: Array, names: tuple[Hashable, ...]) -> Array:
    """`x`, which members share along the named axes, over which its cotangent is summed."""
    return _share_p.bind(x, names=names)


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


def value_and_pullback(
    fn: Callable[..., PyTree[Array]], inputs: tuple[PyTree[Array], ...], bar: PyTree[Array]
) -> tuple[PyTree[Array], tuple[PyTree[Array], ...]]:
    """`fn(*inputs)`, and the pull-back of the cotangent `bar` to the `inputs`. Those that
    go through `share` may receive that of all members."""
    leaves, structure = jtu.tree_flatten(inputs)
    closed, out = jax.make_jaxpr(
        lambda *leaves: fn(*jtu.tree_unflatten(structure, leaves)), return_shape=True
    )(*leaves)
    bars = jtu.tree_leaves(bar)
    operands = *closed.consts, *leaves, *bars
    performs = _effects(closed.jaxpr, operands)
    results = _pull_p.bind(*operands, jaxpr=closed.jaxpr, levels=(), performs=performs)
    values, pulled = results[: len(bars)], results[len(bars) :]
    values = jtu.tree_unflatten(jtu.tree_structure(out), values)
    return values, jtu.tree_unflatten(structure, pulled)


def _effects(jaxpr, operands: tuple[Array, ...]) -> frozenset:
    """The effects of a function and of its pull-back, which may have more if a custom
    derivative has, as one that prints a cotangent."""
    if not has_custom_vjp(jaxpr):
        return frozenset(jaxpr.effects)
    pull = ft.partial(_evaluate, jaxpr=jaxpr, levels=(), performs=frozenset())
    return frozenset(jax.make_jaxpr(pull)(*operands).effects)


def jvp_of(fn: Callable, primals, tangents) -> tuple[list, list]:
    """The rule of an operation for forward-mode differentiation, by that of `fn`, to which
    symbolic zeros remain known."""
    moving = [type(t) is not ad.Zero and t.dtype != jax.dtypes.float0 for t in tangents]

    def of_moving(*xs):
        xs = iter(xs)
        return fn(*(next(xs) if m else p for m, p in zip(moving, primals, strict=True)))

    choose = lambda values: [x for x, m in zip(values, moving, strict=True) if m]
    values, dots = jax.jvp(of_moving, choose(primals), choose(tangents))
    zero = lambda x: ad.Zero(x.aval.to_tangent_aval())
    is_zero = lambda dot: dot.dtype == jax.dtypes.float0
    pairs = zip(values, dots, strict=True)
    return values, [zero(x) if is_zero(dot) else dot for x, dot in pairs]


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
_share_p, _total_p = _linear("share"), _linear("total")
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
    return _share_p.bind(*xs, names=names), *dims


def _batch_total(axis_data, xs, dims, *, names):
    (x,), (dim,) = xs, dims
    if dim is not None and axis_data.name in names:
        x, dim = jnp.sum(x, axis=dim, dtype=x.dtype), None
    return _total_p.bind(x, names=names), dim


def _batch_without(axis_data, xs, dims, *, names):
    (x,), (dim,) = xs, dims
    assert dim is None or axis_data.name not in names
    return _without_p.bind(x, names=names), dim


batching.fancy_primitive_batchers[_share_p] = _batch_share
batching.fancy_primitive_batchers[_total_p] = _batch_total
batching.fancy_primitive_batchers[_without_p] = _batch_without
ad.deflinear(_share_p, lambda ct, *, names: [_total_p.bind(ct, names=names)])
ad.deflinear(_total_p, lambda ct, *, names: [_share_p.bind(ct, names=names)])
ad.deflinear(_without_p, lambda ct, *, names: [_without_p.bind(ct, names=names)])


class _Level(NamedTuple):
    """One `jax.vmap`.

    - `mapped`: whether each operand has its axis, which is the first.
    - `summed`: whether the cotangent of each input is summed over it.
    """

    name: Hashable
    size: int
    mapped: tuple[bool, ...]
    summed: tuple[bool, ...]


# The operands are the constants and the inputs of the jaxpr, and the cotangents of its
# outputs; the results, its outputs and the cotangents of its inputs. It `performs` effects.
_pull_p = jex.Primitive("value_and_pullback")
_pull_p.multiple_results = True


def _axes(mapped: Sequence[bool]) -> tuple[int | None, ...]:
    return tuple(0 if m else None for m in mapped)


def _evaluate(*xs, jaxpr, levels, performs):
    del performs
    constants = len(jaxpr.constvars)
    both = constants + len(jaxpr.invars)

    def fn(*xs):
        closed = jex.ClosedJaxpr(jaxpr, xs[:constants])
        return jex.jaxpr_as_fun(closed)(*xs[constants:])

    whole = list(itertools.takewhile(lambda level: any(level.summed), levels))
    pull = _of_whole(fn, whole, constants, both)
    for level in levels[len(whole) :]:
        pull = _of_members(pull, level, both)
    values, pulled = pull(*xs)
    return [*values, *pulled]


def _of_whole(fn: Callable, levels: list[_Level], constants: int, both: int) -> Callable:
    """The pull-back of a whole batch."""
    # Each member has a cotangent of its own of what is not summed.
    owns = [[*x.mapped[:constants], *(not summed for summed in x.summed)] for x in levels]
    for level, own in zip(levels, owns, strict=True):
        fn = jax.vmap(fn, in_axes=_axes(own), axis_name=level.name)

    def expand(i, x):
        axis = 0
        # The axis of the last level is the first.
        for level, own in reversed(list(zip(levels, owns, strict=True))):
            has_axis = i >= both or own[i]
            if has_axis and not level.mapped[i]:
                shape = (*x.shape[:axis], level.size, *x.shape[axis:])
                x = jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
            axis += has_axis
        return x

    def same_for_all(x):
        axis = 0
        for level in reversed(levels):
            mapped = any(level.mapped[:both])
            x = x if mapped else lax.index_in_dim(x, 0, axis, keepdims=False)
            axis += mapped
        return x

    def of_batch(*xs):
        xs = [expand(i, x) for i, x in enumerate(xs)]
        of_inputs = lambda *inputs: fn(*xs[:constants], *inputs)
        values, pull = jax.vjp(of_inputs, *xs[constants:both])
        return [same_for_all(x) for x in values], list(pull(xs[both:]))

    return of_batch


def _of_members(pull: Callable, level: _Level, both: int) -> Callable:
    """The pull-back of every member."""
    axes = _axes(level.mapped), (0 if any(level.mapped[:both]) else None, 0)
    batched = jax.vmap(pull, *axes, axis_name=level.name)

    def of_batch(*xs):
        values, pulled = batched(*xs)
        # `share` has summed these already, so that they are the same for all members.
        pairs = zip(pulled, level.summed, strict=True)
        return values, [x[0] if summed else x for x, summed in pairs]

    return of_batch


def _abstract_eval(*xs, jaxpr, levels, performs):
    del xs
    values, pulled = [], []
    for v in jaxpr.outvars:
        shape = v.aval.shape
        for level in levels:
            both = len(jaxpr.constvars) + len(jaxpr.invars)
            if any(level.mapped[:both]):
                shape = (level.size, *shape)
        values.append(ShapedArray(shape, v.aval.dtype))
    for i, v in enumerate(jaxpr.invars):
        shape = v.aval.shape
        for level in levels:
            if not level.summed[i]:
                shape = (level.size, *shape)
        pulled.append(ShapedArray(shape, v.aval.dtype))
    return [*values, *pulled], performs


def _jvp(primals, tangents, **params):
    return jvp_of(ft.partial(_evaluate, **params), primals, tangents)


def _batch(axis_data, xs, dims, *, jaxpr, levels, performs):
    if all(dim is None for dim in dims):
        results = _pull_p.bind(*xs, jaxpr=jaxpr, levels=levels, performs=performs)
        return results, [None for _ in results]
    pairs = zip(xs, dims, strict=True)
    xs = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in pairs]
    mapped = tuple(dim is not None for dim in dims)
    constants = len(jaxpr.constvars)
    both = constants + len(jaxpr.invars)
    pairs = zip(jaxpr.invars, mapped[constants:both], strict=True)
    summed = tuple(not m and axis_data.name in _shared_by(jaxpr, v) for v, m in pairs)
    level = _Level(axis_data.name, axis_data.size, mapped, summed)
    levels = *levels, level
    results = _pull_p.bind(*xs, jaxpr=jaxpr, levels=levels, performs=performs)
    values = [0 if any(mapped[:both]) else None for _ in jaxpr.outvars]
    return results, [*values, *(None if s else 0 for s in summed)]


def _shared_by(jaxpr, variable) -> tuple[Hashable, ...]:
    """The names of the axes along which members share an input, if it goes nowhere but
    through `share`."""
    uses = [e for e in jaxpr.eqns if any(v is variable for v in e.invars)]
    if any(e.primitive is not _share_p for e in uses) or variable in jaxpr.outvars:
        return ()
    return tuple(name for e in uses[:1] for name in e.params["names"])


_pull_p.def_impl(_evaluate)
# See `_call_p`.
_pull_p.to_lojax = _evaluate
_pull_p.def_effectful_abstract_eval(_abstract_eval)
ad.primitive_jvps[_pull_p] = _jvp
batching.fancy_primitive_batchers[_pull_p] = _batch
mlir.register_lowering(_pull_p, mlir.lower_fun(_evaluate, multiple_results=True))
