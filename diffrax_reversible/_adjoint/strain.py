"""Detecting a gradient of the initial state that consists of modes that should decay."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import BoolScalarLike, Y
from .._solver.cotangent import Probe
from .._tree import largest


# A cotangent pulled back through the vector field counts beside so many times what outputs
# within the step have added, which need not have decayed yet.
_beside_outputs = 4.0
# Tuned on a heat equation in single precision, with `ALF4` and `McCallumFoster(Tsit5())` at
# tolerances from 1e-5 to 1e-2: of the gradients below, 3 % were off by more than 10 %.
_most = 0.5
# Where an array passes through zero, its Rayleigh quotient may have any size. Its cotangent
# in the vector field is then small beside what it is after the step.
_crosses = 0.02


class Strain(eqx.Module):
    """How much of each array of the state's cotangent consists of modes that should decay.

    In a step with `h λ < -1`, the cotangent of a mode decays to a third or less. If the
    step is unstable, it grows instead. Where a solve still finds its step size, a single
    such step is enough to spoil the gradient of the initial state, in which slow modes may
    hide that no entry has grown by much. Fast modes show where the cotangent is pulled back
    through the vector field, as that multiplies each by its `λ`. Afterwards, they decay at
    that rate.

    - `sizes`: the size of what was pulled back, relative to that of the cotangent.
    - `rates`: the Rayleigh quotient at the step where the former was largest.
    """

    sizes: Float[Array, " arrays"]
    rates: Float[Array, " arrays"]

    @staticmethod
    def start(y: Y) -> "Strain":
        zeros = jnp.zeros(len(jtu.tree_leaves(y)), jnp.float32)
        return Strain(zeros, zeros)

    def update(self, probe: Probe) -> "Strain":
        """After the pull-back of a step."""
        control = jnp.asarray(probe.control)
        leaves = probe.vf_bar, probe.pulled, probe.y_bar, probe.outputs
        leaves = zip(*map(jtu.tree_leaves, leaves), strict=True)
        both = [_size_and_rate(control, *leaf) for leaf in leaves]
        sizes, rates = jnp.array(both, jnp.float32).reshape(-1, 2).T
        length = jnp.abs(control).astype(jnp.float32)
        left = self.sizes * jnp.exp(-length * self.rates)
        more = (length * rates > 1) & (sizes > left)
        return Strain(jnp.where(more, sizes, left), jnp.where(more, rates, self.rates))

    @property
    def strained(self) -> list[BoolScalarLike]:
        """Whether each array is strained."""
        return [size > _most for size in self.sizes]


def _size_and_rate(
    control: Array, vf_bar: Array, pulled: Array, y_bar: Array, outputs: Array
) -> list[Array]:
    """The size and the rate of an array, see `Strain`."""
    total = lambda x: jnp.sum(jnp.abs(x))
    beside = total(y_bar) + _beside_outputs * total(outputs)
    size = total(pulled) / jnp.where(beside == 0, 1, beside)
    crosses = total(vf_bar) < _crosses * jnp.abs(control) * total(y_bar)
    size = jnp.where(crosses, 0, size)
    scale = largest(vf_bar)
    scale = jnp.where(scale == 0, 1, scale).astype(vf_bar.dtype)
    vf_bar, pulled = vf_bar / scale, pulled / scale
    product = jnp.sum(jnp.real(pulled * jnp.conj(vf_bar)))
    square = jnp.sum(jnp.real(vf_bar * jnp.conj(vf_bar)))
    return [size, -jnp.sign(control) * product / jnp.where(square == 0, 1, square)]
