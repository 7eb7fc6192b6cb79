"""The rates at which entries of a cotangent that have grown should decay."""

import functools as ft

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import RealScalarLike
from .._solver.cotangent import Probe
from .._tree import largest


_stretches = 16


class Rates(eqx.Module):
    """The rate in each stretch of the solve, of equally many steps.

    What has grown need not be a mode yet, next to entries that have not, so that its
    Rayleigh quotient may have any size. As it grows, it tends to that of the fastest mode.

    - `rates`: the quotient where that beside all entries was largest.
    - `beside_all`: the latter.
    """

    rates: Float[Array, " stretches"]
    beside_all: Float[Array, " stretches"]

    @staticmethod
    def none() -> "Rates":
        zeros = jnp.zeros(_stretches, jnp.float32)
        return Rates(zeros, zeros)

    def update(
        self, probe: Probe, grown: PyTree[Bool[Array, "..."]], when: RealScalarLike
    ) -> "Rates":
        """The rates after a step, before which there is a fraction `when` of all steps."""
        of_array = ft.partial(_rate, jnp.sign(jnp.asarray(probe.control)))
        of_arrays = jtu.tree_map(of_array, probe.vf_bar, probe.pulled, grown)
        rates, beside_all = jnp.stack(jtu.tree_leaves(of_arrays)).reshape(-1, 2).T
        which = jnp.argmax(beside_all)
        i = _stretch(when)
        larger = beside_all[which] > self.beside_all[i]
        choose = lambda old, new: old.at[i].set(jnp.where(larger, new[which], old[i]))
        return Rates(choose(self.rates, rates), choose(self.beside_all, beside_all))

    def size(self, control: RealScalarLike, when: RealScalarLike) -> Float[Array, ""]:
        """The `|h λ|` of a step, for the largest rate in its stretch and the two beside."""
        near = lax.dynamic_slice_in_dim(jnp.pad(self.rates, 1), _stretch(when), 3)
        return jnp.abs(jnp.asarray(control)).astype(near.dtype) * jnp.max(near)


def _stretch(when: RealScalarLike) -> Array:
    return jnp.clip(jnp.asarray(when * _stretches, jnp.int32), 0, _stretches - 1)


def _rate(
    sign: Array, vf_bar: Array, pulled: Array, grown: Bool[Array, "..."]
) -> Float[Array, "2"]:
    """The Rayleigh quotient of the entries of an array that have grown, and the same beside
    all of its entries."""
    scale = largest(jnp.abs(vf_bar))
    vf_bar, pulled = (x / jnp.where(scale == 0, 1, scale) for x in (vf_bar, pulled))
    square = jnp.real(vf_bar * jnp.conj(vf_bar))
    product = jnp.sum(jnp.where(grown, jnp.real(pulled * jnp.conj(vf_bar)), 0))
    squares = jnp.stack([jnp.sum(jnp.where(grown, square, 0)), jnp.sum(square)])
    rates = -sign.astype(product.dtype) * product / jnp.where(squares == 0, 1, squares)
    return jnp.where(jnp.isfinite(rates), rates, 0).astype(jnp.float32)
