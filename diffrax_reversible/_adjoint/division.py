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
# After a step, the sums over the steps before it count by so much.
_kept = 0.5
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
    - `sums`: the numerator of both quotients, and the denominators, over the latest steps.
        In a single step an entry may be next to zero, where its quotient may have any size.
    - `longest`: the longest step in each stretch, unless it was divided.
    - `count`: the number of parts into which steps were divided.
    """

    rates: Float[Array, "arrays stretches"]
    beside_all: Float[Array, "arrays stretches"]
    sums: Float[Array, "arrays 3"]
    longest: Float[Array, " stretches"]
    count: IntScalarLike

    @staticmethod
    def start(y: Y) -> "Division":
        # A state may have no array.
        arrays = 1 + len(jtu.tree_leaves(y))
        rates = jnp.zeros((arrays, _stretches), jnp.float32)
        sums = jnp.zeros((arrays, 3), jnp.float32)
        return Division(rates, rates, sums, rates[0], jnp.array(0))

    def again(self) -> "Division":
        """For another backward pass, which begins with the rates of this one."""
        sums, longest = jnp.zeros_like(self.sums), jnp.zeros_like(self.longest)
        none = dict(sums=sums, longest=longest, count=jnp.array(0))
        return dataclasses.replace(self, **none)

    def update(
        self,
        probe: Probe,
        sizes: PyTree[Array],
        grown: PyTree[Bool[Array, "..."]],
        when: RealScalarLike,
    ) -> "Division":
        """With the rates after a step, before which there is a fraction `when` of all.

        - `sizes`: see `Growth`.
        """
        control = jnp.asarray(probe.control)
        of_array = ft.partial(_squares, control)
        of_arrays = jtu.tree_map(of_array, probe.vf_bar, probe.pulled, sizes, grown)
        of_arrays = [jnp.zeros(3, jnp.float32), *jtu.tree_leaves(of_arrays)]
        sums = _kept * self.sums + jnp.stack(of_arrays)
        product, *squares = sums.T
        product *= -jnp.sign(control).astype(sums.dtype)
        rates, beside_all = [product / jnp.where(s == 0, 1, s) for s in squares]
        i = _stretch(when)
        more = beside_all > self.beside_all[:, i]
        choose = lambda old, new: old.at[:, i].set(jnp.where(more, new, old[:, i]))
        new = dict(
            rates=choose(self.rates, rates), beside_all=choose(self.beside_all, beside_all)
        )
        return dataclasses.replace(self, sums=sums, **new)

    def notice(self, control: RealScalarLike, when: RealScalarLike) -> "Division":
        """After a step, which may be unstable."""
        length = jnp.abs(jnp.asarray(control)).astype(jnp.float32)
        longest = self.longest.at[_stretch(when)].max(length)
        return dataclasses.replace(self, longest=longest)

    def at_start(
        self, rates: Float[Array, " arrays"], stable: float
    ) -> tuple["Division", Bool[Array, ""]]:
        """With the rates of modes at the start of the solve, up to the first step that is
        unstable for them, and whether there is one."""
        unstable = self.longest[None] * rates[:, None] > stable
        some = jnp.any(unstable, axis=1, keepdims=True)
        before = jnp.arange(_stretches)[None] <= jnp.argmax(unstable, axis=1, keepdims=True)
        rates = jnp.where(some & before, rates[:, None], 0)
        new = dataclasses.replace(self, rates=self.rates.at[1:].max(rates))
        return new, jnp.any(some)

    def unstable(self, stable: float) -> BoolScalarLike:
        """Whether a step exceeds the limit of stability for one of the rates."""
        return jnp.any(self.longest * self._largest_rates > stable)

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
        """The `|h λ|` of a step."""
        rate = self._largest_rates[_stretch(when)]
        return jnp.abs(jnp.asarray(control)).astype(rate.dtype) * rate

    @property
    def _largest_rates(self) -> Float[Array, " stretches"]:
        """The largest rate in each stretch and the two beside."""
        rates = jnp.pad(jnp.max(self.rates, axis=0), 1)
        return jnp.maximum(jnp.maximum(rates[:-2], rates[1:-1]), rates[2:])


def _most(times: IntScalarLike, steps: IntScalarLike) -> Array:
    return jnp.asarray(times * jnp.maximum(_parts_per_step * steps, _least_parts))


def _stretch(when: RealScalarLike) -> Array:
    return jnp.clip(jnp.asarray(when * _stretches, jnp.int32), 0, _stretches - 1)


def _squares(
    control: Array, vf_bar: Array, pulled: Array, size: Array, grown: Bool[Array, "..."]
) -> Float[Array, "3"]:
    """The numerator of the Rayleigh quotient of the entries of an array that have grown,
    its denominator, and that beside all entries, relative to the largest `size`."""
    # A cotangent of the vector field is one of the state times the length of the step.
    scale = (control * largest(size)).astype(vf_bar.dtype)
    scale = jnp.where(scale == 0, 1, scale)
    vf_bar, pulled = vf_bar / scale, pulled / scale
    square = jnp.real(vf_bar * jnp.conj(vf_bar))
    product = jnp.where(grown, jnp.real(pulled * jnp.conj(vf_bar)), 0)
    terms = product, jnp.where(grown, square, 0), square
    squares = jnp.stack([jnp.sum(term) for term in terms])
    return jnp.where(jnp.isfinite(squares).all(), squares, 0).astype(jnp.float32)
