"""The division of steps that are too large for modes that have grown."""

import dataclasses
import functools as ft

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike, Y
from .._solver.cotangent import Probe
from .._tree import largest


_stretches = 16
# The backward pass divides a step into parts of at most this fraction of the limit of
# stability for the modes that have grown.
_divided = 0.6
# The number of parts is limited to so many per step of the solve, and so many at least; to
# twice as many where parts are half as long.
_parts_per_step, _least_parts = 4, 256


class Division(eqx.Module):
    """The rates at which entries of a cotangent that have grown should decay, and the parts
    of steps that are too large for these.

    What has grown need not be a mode yet, next to entries that have not, so that its
    Rayleigh quotient may have any size. As it grows, it tends to that of the fastest mode.
    The rates are those of each array in each stretch of the solve, of equally many steps.

    - `rates`: the quotient where that beside all entries of the array was largest.
    - `beside_all`: the latter.
    - `unstable`: whether a step exceeds the limit of stability for such a rate.
    - `count`: the number of parts into which steps were divided.
    """

    rates: Float[Array, "arrays stretches"]
    beside_all: Float[Array, "arrays stretches"]
    unstable: BoolScalarLike
    count: IntScalarLike

    @staticmethod
    def start(y: Y) -> "Division":
        # A state may have no array.
        zeros = jnp.zeros((1 + len(jtu.tree_leaves(y)), _stretches), jnp.float32)
        return Division(zeros, zeros, jnp.array(False), jnp.array(0))

    def again(self) -> "Division":
        """For another backward pass, which begins with the rates of this one."""
        none = dict(unstable=jnp.array(False), count=jnp.array(0))
        return dataclasses.replace(self, **none)

    def update(
        self, probe: Probe, grown: PyTree[Bool[Array, "..."]], when: RealScalarLike
    ) -> "Division":
        """With the rates after a step, before which there is a fraction `when` of all."""
        of_array = ft.partial(_rate, jnp.sign(jnp.asarray(probe.control)))
        of_arrays = jtu.tree_map(of_array, probe.vf_bar, probe.pulled, grown)
        of_arrays = [jnp.zeros(2, jnp.float32), *jtu.tree_leaves(of_arrays)]
        rates, beside_all = jnp.stack(of_arrays, axis=1)
        i = _stretch(when)
        more = beside_all > self.beside_all[:, i]
        choose = lambda old, new: old.at[:, i].set(jnp.where(more, new, old[:, i]))
        new = dict(
            rates=choose(self.rates, rates), beside_all=choose(self.beside_all, beside_all)
        )
        return dataclasses.replace(self, **new)

    def notice(
        self, control: RealScalarLike, stable: float, when: RealScalarLike
    ) -> "Division":
        """After a step, which may be unstable."""
        unstable = self.unstable | (self._size(control, when) > stable)
        return dataclasses.replace(self, unstable=unstable)

    def parts(
        self,
        times: IntScalarLike,
        control: RealScalarLike,
        stable: float,
        when: RealScalarLike,
        steps: IntScalarLike,
    ) -> IntScalarLike:
        """The number of parts into which the backward pass divides a step, `times` as many
        as are stable.

        A mode that has died out grows in steps beyond its limit of stability. In the solve
        it has nothing to grow from, and steps average out to the limit: so the number of
        parts is bounded, by the number of `steps` of the solve.
        """

        def parts():
            most = _most(times, steps) - self.count
            size = self._size(control, when) / (_divided * stable)
            parts = jnp.ceil(jnp.minimum(size, 1e6))
            parts = jnp.where(parts > 1, times * parts, 1)
            return jnp.clip(parts.astype(most.dtype), 1, jnp.maximum(most, 1))

        some = eqxi.unvmap_any(times > 0)
        return lax.cond(some, parts, lambda: jnp.ones_like(self.count))

    def count_parts(self, parts: IntScalarLike) -> "Division":
        more = jnp.where(parts > 1, parts, 0)
        return dataclasses.replace(self, count=self.count + more)

    def lacks_parts(self, times: IntScalarLike, steps: IntScalarLike) -> BoolScalarLike:
        """Whether steps were divided into too few parts, as these are limited."""
        # A single one that is left divides nothing.
        return (times > 0) & (self.count >= _most(times, steps) - 1)

    def _size(self, control: RealScalarLike, when: RealScalarLike) -> Float[Array, ""]:
        """The `|h λ|` of a step, for the largest rate in its stretch and the two beside."""
        rates = jnp.pad(jnp.max(self.rates, axis=0), 1)
        near = lax.dynamic_slice_in_dim(rates, _stretch(when), 3)
        return jnp.abs(jnp.asarray(control)).astype(near.dtype) * jnp.max(near)


def _most(times: IntScalarLike, steps: IntScalarLike) -> Array:
    return jnp.asarray(times * jnp.maximum(_parts_per_step * steps, _least_parts))


def _stretch(when: RealScalarLike) -> Array:
    return jnp.clip(jnp.asarray(when * _stretches, jnp.int32), 0, _stretches - 1)


def _rate(
    sign: Array, vf_bar: Array, pulled: Array, grown: Bool[Array, "..."]
) -> Float[Array, "2"]:
    """The Rayleigh quotient of the entries of an array that have grown, and the same beside
    all of its entries."""
    scale = largest(vf_bar)
    scale = jnp.where(scale == 0, 1, scale).astype(vf_bar.dtype)
    vf_bar, pulled = vf_bar / scale, pulled / scale
    square = jnp.real(vf_bar * jnp.conj(vf_bar))
    product = jnp.sum(jnp.where(grown, jnp.real(pulled * jnp.conj(vf_bar)), 0))
    squares = jnp.stack([jnp.sum(jnp.where(grown, square, 0)), jnp.sum(square)])
    rates = -sign.astype(product.dtype) * product / jnp.where(squares == 0, 1, squares)
    return jnp.where(jnp.isfinite(rates), rates, 0).astype(jnp.float32)
