"""Dense output between the ends of a step."""

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, PyTree

from .._custom_types import RealScalarLike, Y


class HermiteInterpolation(AbstractLocalInterpolation):
    """Hermite interpolation through both ends of a step and, if given, its mid-point.

    Without mid-point cubic; with the solution and its derivative at the mid-point
    quintic. Exact to the bit at both ends, and linear in the data.

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `y0`, `y1`: the solution there.
    - `k0`, `k1`: its derivative there, times `t1 - t0`.
    - `y_mid`: the solution at the mid-point, less `y0`. `None` for cubic interpolation.
    - `k_mid`: its derivative at the mid-point, times `t1 - t0`.

    All of `y0, ...` are PyTrees of arrays of the structure and shapes of the state.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    y1: Y
    k0: Y
    k1: Y
    y_mid: Y | None = None
    k_mid: Y | None = None

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        # A step of no length has `y0 == y1`; any fraction will do.
        trivial = length == 0
        fraction = jnp.where(trivial, 0, t0 - self.t0) / jnp.where(trivial, 1, length)
        cubic = jtu.tree_map(
            lambda *data: _cubic(fraction.astype(data[0].dtype), *data),
            self.y0,
            self.y1,
            self.k0,
            self.k1,
        )
        if self.y_mid is None:
            return cubic
        return jtu.tree_map(
            lambda c, *data: c + _bump(fraction.astype(c.dtype), *data),
            cubic,
            self.y0,
            self.y1,
            self.k0,
            self.k1,
            self.y_mid,
            self.k_mid,
        )


def _cubic(x: Array, y0: Array, y1: Array, k0: Array, k1: Array) -> Array:
    x_ = 1 - x
    return (1 + 2 * x) * x_**2 * y0 + x**2 * (1 + 2 * x_) * y1 + x * x_ * (x_ * k0 - x * k1)


def _bump(
    x: Array, y0: Array, y1: Array, k0: Array, k1: Array, y_mid: Array, k_mid: Array
) -> Array:
    """What the cubic misses at the mid-point, by a quintic that is flat at the ends.

    `16 x^2 (1 - x)^2` is one at the mid-point and has no slope there.
    """
    value = y_mid - (y1 - y0) / 2 - (k0 - k1) / 8
    slope = k_mid - 3 * (y1 - y0) / 2 + (k0 + k1) / 4
    return 16 * (x * (1 - x)) ** 2 * (value + (x - 0.5) * slope)
