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
    """The largest rate in each stretch of the solve, of equally many steps."""

    largest: Float[Array, " stretches"]

    @staticmethod
    def none() -> "Rates":
        return Rates(jnp.zeros(_stretches, jnp.float32))

    def update(
        self, probe: Probe, grown: PyTree[Bool[Array, "..."]], when: RealScalarLike
    ) -> "Rates":
        """The rates after a step, before which there is a fraction `when` of all steps."""
        of_array = ft.partial(_rate, jnp.sign(jnp.asarray(probe.control)))
        of_arrays = jtu.tree_map(of_array, probe.vf_bar, probe.pulled, grown)
        rate = jnp.stack([jnp.zeros((), jnp.float32), *jtu.tree_leaves(of_arrays)])
        return Rates(self.largest.at[_stretch(when)].max(jnp.max(rate)))

    def size(self, control: RealScalarLike, when: RealScalarLike) -> Float[Array, ""]:
        """The `|h λ|` of a step, for the largest rate in its stretch and the two beside."""
        near = lax.dynamic_slice_in_dim(jnp.pad(self.largest, 1), _stretch(when), 3)
        return jnp.abs(jnp.asarray(control)).astype(near.dtype) * jnp.max(near)


def _stretch(when: RealScalarLike) -> Array:
    return jnp.clip(jnp.asarray(when * _stretches, jnp.int32), 0, _stretches - 1)


def _rate(
    sign: Array, vf_bar: Array, pulled: Array, grown: Bool[Array, "..."]
) -> Float[Array, ""]:
    """The Rayleigh quotient of the entries of an array that have grown, which as they grow
    tends to that of the fastest mode."""
    vf_bar, pulled = (jnp.where(grown, x, 0) for x in (vf_bar, pulled))
    scale = largest(vf_bar)
    vf_bar, pulled = (x / jnp.where(scale == 0, 1, scale) for x in (vf_bar, pulled))
    product = jnp.sum(jnp.real(pulled * jnp.conj(vf_bar)))
    square = jnp.sum(jnp.real(vf_bar * jnp.conj(vf_bar)))
    rate = -sign.astype(product.dtype) * product / jnp.where(square == 0, 1, square)
    return jnp.where(jnp.isfinite(rate), rate, 0).astype(jnp.float32)
