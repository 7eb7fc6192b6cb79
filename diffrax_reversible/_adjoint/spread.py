"""How much of the gradient of the parameters stems from cotangents that have grown."""

import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import BoolScalarLike, Params


# The accepted part of a sum, and thus of the gradient.
_accepted = 1e-3


class Spread(eqx.Module):
    """What was added to the cotangent of the parameters since that of the state has grown.

    Before its first input arrives, a system may rest in a state that does not depend on its
    parameters. Steps of any size are accurate there, and the cotangent of the state grows
    in steps that are too large for its modes. If the initial state is not differentiated,
    this matters only to the cotangent of the parameters, to which rest adds nothing.

    - `begun`: whether an entry has grown.
    - `added`: with the sums of the cotangent since the last known state, the sums of what
        was added since then, see `sums`.
    """

    begun: BoolScalarLike
    added: Float[Array, " sums"]

    @staticmethod
    def start(params_bar: Params) -> "Spread":
        return Spread(jnp.array(False), jnp.zeros_like(sums(params_bar)))

    def begin(self, grown: BoolScalarLike, before: Float[Array, " sums"]) -> "Spread":
        """After a step in which an entry has `grown`, with the sums `before` that step."""
        begins = grown & jnp.logical_not(self.begun)
        return Spread(self.begun | grown, jnp.where(begins, -before, self.added))

    def at_known(self, params_bar: Params) -> "Spread":
        """At a known state, where the cotangent begins anew with zero."""
        added = self.added + jnp.where(self.begun, sums(params_bar), 0)
        return Spread(self.begun, added)

    def matters(self, params_bar: Params, earlier: Params | None) -> BoolScalarLike:
        """Whether more than a thousandth was added, where the gradient is the sum of the
        cotangent since the last known state and of an `earlier` part."""
        since = whole = sums(params_bar)
        if earlier is not None:
            whole = whole + sums(earlier)
        right = jnp.abs(since + self.added) <= _accepted * jnp.abs(whole)
        return self.begun & jnp.logical_not(right.all())


def sums(tree: PyTree[Array]) -> Float[Array, " sums"]:
    """For every array, the sum of its entries, with signs in no order, so that an addition
    hardly leaves it as it is. Sums are linear, and need no reshaping of sharded arrays."""

    single = jnp.dtype("float32")

    def of_array(x):
        if jnp.iscomplexobj(x):
            return [*of_array(jnp.real(x)), *of_array(jnp.imag(x))]
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
            index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        # Multiplicative hashing.
        signs = index * jnp.uint32(2654435769) >> 31
        signed = jnp.where(signs == 1, -x, x)
        return [jnp.sum(signed, dtype=max(x.dtype, single, key=_size))]

    found = [s for x in jtu.tree_leaves(tree) for s in of_array(x)]
    dtype = max((s.dtype for s in found), key=_size)
    return jnp.stack([s.astype(dtype) for s in found])


def _size(dtype: jnp.dtype) -> int:
    return dtype.itemsize
