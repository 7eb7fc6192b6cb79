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

from ._axes import share_p
from ._jaxpr import has_custom_vjp


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
    if any(e.primitive is not share_p for e in uses) or variable in jaxpr.outvars:
        return ()
    return tuple(name for e in uses[:1] for name in e.params["names"])


_pull_p.def_impl(_evaluate)
# See `_call_p`.
_pull_p.to_lojax = _evaluate
_pull_p.def_effectful_abstract_eval(_abstract_eval)
ad.primitive_jvps[_pull_p] = _jvp
batching.fancy_primitive_batchers[_pull_p] = _batch
mlir.register_lowering(_pull_p, mlir.lower_fun(_evaluate, multiple_results=True))
