"""Inputs that all members of a batch share, whose cotangents are summed as they arise.

Otherwise every member would hold a cotangent of its own of, say, all weights of a network,
and JAX would sum these after the backward pass.
"""

import functools as ft
from collections.abc import Hashable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._axes import lend, share, total, without
from .._custom_types import BoolScalarLike, Params
from .._tree import tree_select
from .batch import Sharing
from .problem import Inputs


class Shared:
    """Which of the differentiated `params` the members of a batch share.

    - `names`: the axes of the batch, one for each `jax.vmap`.
    - `flags`: for every leaf of `params`, whether it is shared.
    """

    def __init__(self, names: tuple[Hashable, ...], flags: PyTree[bool]):
        self.names, self.flags = names, flags

    @staticmethod
    def of(sharing: Sharing, inputs: Inputs, perturbed: Inputs) -> "Shared | None":
        """The shared leaves among the `perturbed` ones of `inputs.context`, by the
        `sharing` of all arrays in `inputs` and others. `None` if there are none."""
        names, flags = sharing
        if len(names) == 0 or not _takes_sums():
            return None
        leaves, structure = jtu.tree_flatten(eqx.filter(inputs, eqx.is_array))
        flags = jtu.tree_unflatten(structure, flags[: len(leaves)])
        flags = eqx.combine(flags, jtu.tree_map(lambda _: False, inputs))
        flags = eqx.filter(flags.context, perturbed.context)
        return Shared(names, flags) if any(jtu.tree_leaves(flags)) else None

    def share(self, params: Params) -> Params:
        """`params`, whose cotangents are summed over the batch."""

        def share_if(flag, x):
            return share(x, self.names) if flag else x

        return jtu.tree_map(share_if, self.flags, params)

    def any(self, pred: BoolScalarLike) -> Bool[Array, ""]:
        """Whether `pred` holds for any member."""
        count = total(jnp.asarray(pred).astype(jnp.int32), self.names)
        return count > 0

    def all(self, pred: BoolScalarLike) -> Bool[Array, ""]:
        """Whether `pred` holds for all members."""
        return jnp.logical_not(self.any(jnp.logical_not(pred)))

    def lend(self, tree: PyTree, here: BoolScalarLike) -> PyTree:
        """`tree`, and for members that are not `here` the arrays of one that is, if there
        is one."""
        arrays, others = eqx.partition(tree, eqx.is_array)
        lend_one = lambda x: lend(x, jnp.asarray(here), self.names)
        return eqx.combine(jtu.tree_map(lend_one, arrays), others)

    def unshared(self, params: Params) -> Params:
        """`params` without those that all members share."""
        return eqx.filter(params, self.flags, inverse=True)

    def mean(self, x: Float[Array, ""], here: BoolScalarLike) -> Float[Array, ""]:
        """The mean of `x` over the members that are `here`; NaN if any of these is."""
        # Both have the same axes.
        sums = jnp.where(here, x, 0), jnp.where(here, x - x + 1, 0)
        x, count = (total(s, self.names) for s in sums)
        return x / jnp.maximum(count, 1)

    def check(self, params_bar: Params) -> Params:
        """`params_bar`, once it is certain that they are sums over the batch."""

        def check(flag, x):
            return without(x, self.names) if flag else x

        return jtu.tree_map(check, self.flags, params_bar)


@ft.cache
def _takes_sums() -> bool:
    """Whether JAX takes a cotangent for that of all members if it lacks their axis, as all
    versions up to 0.10 do, although no documentation says so."""
    product = jax.custom_vjp(lambda w, x: w * x)
    summed = lambda x, ct: (total(ct * x, ("members",)), ct)
    product.defvjp(lambda w, x: (w * x, x), summed)
    of_members = jax.vmap(product, (None, 0), axis_name="members")
    with jax.ensure_compile_time_eval():
        gradient = jax.grad(lambda w: jnp.sum(of_members(w, jnp.arange(4.0))))
        return bool(gradient(jnp.array(1.0)) == 6)


def params_where(
    shared: Shared | None, pred: BoolScalarLike, new: Params, old: Params
) -> Params:
    """Cotangents of the parameters: `new` where `pred`, otherwise `old`. What the members
    of a batch share is `new` if `pred` holds for any of them."""
    if shared is None:
        return tree_select(pred, new, old)
    some = shared.any(pred)
    choose = lambda flag, n, o: jnp.where(some if flag else pred, n, o)
    return jtu.tree_map(choose, shared.flags, new, old)
