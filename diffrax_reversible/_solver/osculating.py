"""Dense output from derivatives at both ends of a step."""

import math

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import RealScalarLike, VF, Y
from .step_interpolation import AbstractStepInterpolation


class OsculatingInterpolation(AbstractStepInterpolation):
    """Hermite interpolation of derivatives of any order at both ends of a step.

    `StormerVerlet`, `BlanesMoan4`, `BlanesMoan6` and `KahanLi8` use it between steps. With
    `n - 1` derivatives the polynomial has degree `2n - 1` and an error of order `2n`. It is
    exact to the bit at both ends, and linear in the data:

        Σ_k B_k(x) y0^(k) + (-1)^k B_k(1 - x) y1^(k),
        B_k(x) = (1 - x)^n x^k/k! Σ_{j < n-k} C(n-1+j, j) x^j,    k = 0, ..., n - 1

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `y0`, `y1`: the solution at `t0` and `t1`.
    - `k0`, `k1`: its derivatives there, times `t1 - t0`.
    - `higher0`, `higher1`: its second and higher derivatives there, times `t1 - t0` to the
        power of their order.

    Example:

    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import OsculatingInterpolation
    >>> y0, y1, k0, k1, a0, a1 = map(jnp.array, (0.0, 1.0, 0.0, 5.0, 0.0, 20.0))  # t^5
    >>> interpolation = OsculatingInterpolation(0.0, 1.0, y0, y1, k0, k1, [a0], [a1])
    >>> print(interpolation.evaluate(0.5))
    0.03125

    Reference: Two-point Taylor polynomials: Davis (1975), *Interpolation and
    Approximation*, section 2.5.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    y1: Y
    k0: VF
    k1: VF
    higher0: list[VF]
    higher1: list[VF]

    def _at(self, x: Float[Array, ""], t: RealScalarLike, left: bool) -> PyTree[Array]:
        del t, left
        starts = [self.y0, self.k0, *self.higher0]
        ends = [self.y1, self.k1, *self.higher1]
        count = len(starts)
        weights = [_basis(x, k, count) for k in range(count)]
        weights += [(-1) ** k * _basis(1 - x, k, count) for k in range(count)]

        def combine(*data):
            # An infinite bound stays one.
            y0, y1 = data[0], data[count]
            bound = jnp.isinf(y0) & (y0 == y1)
            data = [jnp.where(bound, 0, d) for d in data]
            y = sum(w.astype(d.dtype) * d for w, d in zip(weights, data, strict=True))
            return jnp.where(bound, y0, y)

        return jtu.tree_map(combine, *starts, *ends)


def _basis(x: Array, k: int, count: int) -> Array:
    series = sum(math.comb(count - 1 + j, j) * x**j for j in range(count - k))
    return (1 - x) ** count * x**k / math.factorial(k) * series
