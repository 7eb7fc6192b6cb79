"""A function with a custom gradient that is told which inputs the members of a batch share.

`jax.vmap` transforms such a function member by member, so that a gradient of shared inputs
is computed for each member, and summed in the end. The function cannot tell whether it is
in a batch, or what is shared. Here it is the operand of an operation with a rule for
batches, which notes that.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from .._members import jvp_of


# The names of the axes of the batch, and for every array whether its members share it.
Sharing = tuple[tuple[Hashable, ...], list[bool]]


class _Axis:
    """The name of an axis, and the indices of the outputs that have it."""

    def __init__(self):
        self.returned: set[int] = set()


class _Level(NamedTuple):
    """One `jax.vmap`.

    - `name`, `size`: the name and the size of its axis.
    - `told`: whether the function is told of it; otherwise JAX sums over it.
    - `groups`: the number of groups of members. Each group has a sum of its own, so that
        devices among which the batch is divided need not exchange it.
    - `mapped`: whether each input has the axis, which is its first.
    - `returned`: the same for the outputs.
    """

    name: _Axis
    size: int
    told: bool
    groups: int
    mapped: tuple[bool, ...]
    returned: tuple[bool, ...] = ()

    def map(self, fn: Callable) -> Callable:
        """`fn` for all members."""

        def for_all(*xs):
            # What does not have the axis is the same for all members.
            pairs = zip(self._vmap(fn, 0)(*xs), self.returned, strict=True)
            return [x if returned else x[0] for x, returned in pairs]

        return for_all

    def map_and_note(self, fn: Callable) -> Callable:
        """`fn` for all members, which notes in the name of the axis what is returned."""
        axis = self.name

        def of_member(*xs):
            outputs = list(enumerate(fn(*xs)))
            axis.returned.clear()
            for i, x in outputs:
                _look_p.bind(x, axis=axis, index=i)
            with_axis = [x for i, x in outputs if i in axis.returned]
            return with_axis, [x for i, x in outputs if i not in axis.returned]

        def for_all(*xs):
            both = self._vmap(of_member, (0, None))(*xs)
            indices, (with_axis, without) = range(sum(map(len, both))), map(iter, both)
            return [next(with_axis if i in axis.returned else without) for i in indices]

        return for_all

    def _vmap(self, fn: Callable, out_axes) -> Callable:
        axes = tuple(0 if m else None for m in self.mapped)
        of_group = jax.vmap(fn, axes, out_axes, axis_name=self.name)
        if self.groups == 1:
            return of_group
        of_groups = jax.vmap(of_group, axes, out_axes)

        def divide(x):
            return x.reshape((self.groups, len(x) // self.groups, *x.shape[1:]))

        def unite(x):
            return x.reshape((self.groups * x.shape[1], *x.shape[2:]))

        def of_batch(*xs):
            pairs = zip(xs, self.mapped, strict=True)
            outputs = of_groups(*(divide(x) if m else x for x, m in pairs))
            if out_axes == 0:
                return [unite(x) for x in outputs]
            with_axis, without = outputs
            return [unite(x) for x in with_axis], without

        return of_batch


def call_in_batches(fn: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """`fn(*args, sharing)`, with a `Sharing` of the arrays in `args`, in their order.

    When it is differentiated, `fn` is called anew with the sharing of the batch. Its value
    must not depend on that.
    """
    dynamic, static = eqx.partition(args, eqx.is_array)
    leaves, structure = jtu.tree_flatten(dynamic)
    outputs = []

    def flat(sharing, *leaves):
        args = eqx.combine(jtu.tree_unflatten(structure, leaves), static)
        dynamic, static_outputs = eqx.partition(fn(*args, sharing), eqx.is_array)
        leaves, out_structure = jtu.tree_flatten(dynamic)
        outputs[:] = [(out_structure, static_outputs)]
        return leaves

    alone: Sharing = ((), [False] * len(leaves))
    jaxpr = jax.make_jaxpr(lambda *leaves: flat(alone, *leaves))(*leaves)
    # A collective over an axis of the caller has to be mapped by it, without a sharing.
    has_axis = any(type(effect).__name__ == "NamedAxisEffect" for effect in jaxpr.effects)
    if has_axis or any(isinstance(x, Tracer) for x in jaxpr.consts):
        return fn(*args, alone)
    leaves = _call_p.bind(*leaves, fn=flat, jaxpr=jaxpr, levels=())
    ((out_structure, static_outputs),) = outputs
    return eqx.combine(jtu.tree_unflatten(out_structure, leaves), static_outputs)


_call_p = jex.Primitive("call_in_batches")
_call_p.multiple_results = True


def _evaluate(*xs, fn, jaxpr, levels):
    del fn, levels
    return jex.jaxpr_as_fun(jaxpr)(*xs)


def _abstract_eval(*xs, fn, jaxpr, levels):
    del xs, fn, levels
    return jaxpr.out_avals, jaxpr.effects


def _jvp(primals, tangents, *, fn, jaxpr, levels):
    pairs = zip(primals, jaxpr.in_avals, strict=True)
    # JAX keeps constant scalars as Python numbers.
    primals = [
        x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype) for x, aval in pairs
    ]
    if any(level.size == 0 for level in levels):
        # Outputs have no entries, also those that members share once `jax.vmap` returns
        # them, except by `out_axes=None`.
        values = _call_p.bind(*primals, fn=fn, jaxpr=jaxpr, levels=levels)
        return values, [ad.Zero(x.aval.to_tangent_aval()) for x in values]
    shared = [not any(level.mapped[i] for level in levels) for i in range(len(primals))]
    sharing = tuple(level.name for level in levels if level.told), shared
    call = lambda *xs: fn(sharing, *xs)
    for level in levels:
        call = level.map(call)
    return jvp_of(call, primals, tangents)


def _batch(axis_data, xs, dims, *, fn, jaxpr, levels):
    if all(dim is None for dim in dims):
        outputs = _call_p.bind(*xs, fn=fn, jaxpr=jaxpr, levels=levels)
        return outputs, [None for _ in outputs]
    pairs = zip(xs, dims, strict=True)
    xs = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in pairs]
    # The batch may be divided among all devices.
    devices = jax.device_count()
    told = axis_data.size % devices == 0 and axis_data.spmd_name is None
    mapped = tuple(dim is not None for dim in dims)
    level = _Level(_Axis(), axis_data.size, told, devices if told else 1, mapped)
    jaxpr = jax.make_jaxpr(level.map_and_note(jex.jaxpr_as_fun(jaxpr)))(*xs)
    returned = tuple(i in level.name.returned for i in range(len(jaxpr.out_avals)))
    level = level._replace(returned=returned)
    outputs = _call_p.bind(*xs, fn=fn, jaxpr=jaxpr, levels=(*levels, level))
    return outputs, [0 if r else None for r in returned]


_call_p.def_impl(_evaluate)
# JAX 0.12 calls this where the function has operations that JAX builds from others, such as
# `jax.numpy.searchsorted`.
_call_p.to_lojax = _evaluate
_call_p.def_effectful_abstract_eval(_abstract_eval)
ad.primitive_jvps[_call_p] = _jvp
batching.fancy_primitive_batchers[_call_p] = _batch
mlir.register_lowering(_call_p, mlir.lower_fun(_evaluate, multiple_results=True))


# The identity, whose rule for batches notes that the operand has the axis.
_look_p = jex.Primitive("look_for_axis")


def _look(x, *, axis, index):
    del axis, index
    return x


def _batch_look(axis_data, xs, dims, *, axis, index):
    (x,), (dim,) = xs, dims
    if dim is not None and axis_data.name is axis:
        axis.returned.add(index)
    return _look_p.bind(x, axis=axis, index=index), dim


_look_p.def_impl(_look)
_look_p.def_abstract_eval(_look)
mlir.register_lowering(_look_p, mlir.lower_fun(_look, multiple_results=False))
batching.fancy_primitive_batchers[_look_p] = _batch_look
