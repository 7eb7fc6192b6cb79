"""Dense output of asynchronous leapfrog, by Hermite interpolation."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._coefficients.alf_tableau import ALFTableau
from .._custom_types import RealScalarLike, VF, Y
from .._tree import tree_axpy
from .step_interpolation import AbstractStepInterpolation


class HermiteInterpolation(AbstractStepInterpolation):
    """Hermite interpolation through both ends of a step and values within it.

    `ALF4` and its like use it between steps. It is the polynomial through the solution and
    its derivative at both ends, the solution at given fractions of the step and, if given,
    the derivative at the mid-point. Its degree is three, and one more for each value within
    the step. It is exact to the bit at both ends, and linear in the data.

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `y0`, `y1`: the solution at `t0` and `t1`.
    - `k0`, `k1`: its derivatives there, times `t1 - t0`.
    - `inner`: the solution at the `fractions`, minus `y0`.
    - `k_mid`: its derivative at the mid-point, times `t1 - t0`. One of the fractions has to
        be a half.
    - `fractions`: numbers greater than zero and less than one.

    `y0`, `y1`, `k0`, `k1`, `k_mid` and the elements of `inner` are PyTrees of arrays with
    the structure and shapes of the state.

    Reference: Hairer, Nørsett & Wanner (1993), *Solving Ordinary Differential Equations I*,
    section II.6, doi:10.1007/978-3-540-78862-1.

    Example:

    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import HermiteInterpolation
    >>> y0, y1, k0, k1 = map(jnp.array, (0.0, 1.0, 0.0, 3.0))  # y = t^3
    >>> print(HermiteInterpolation(0.0, 1.0, y0, y1, k0, k1).evaluate(0.5))
    0.125
    """

    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    y1: Y
    k0: Y
    k1: Y
    inner: list[Y] = eqx.field(default_factory=list)
    k_mid: Y | None = None
    fractions: tuple[float, ...] = eqx.field(default=(), static=True)

    def _at(self, x: Float[Array, ""], t: RealScalarLike, left: bool) -> PyTree[Array]:
        del t, left
        others = [] if self.k_mid is None else [self.k_mid]
        bumps = _bumps(x, self.fractions, self.k_mid is not None)

        def combine(y0, y1, k0, k1, *data):
            dtype = y0.dtype
            # An infinite bound stays one.
            bound, given = jnp.isinf(y0) & (y0 == y1), y0
            y0, y1 = (jnp.where(bound, 0, y) for y in (y0, y1))
            y = _cubic(x.astype(dtype), y0, y1, k0, k1)
            # Add the misses of the cubic at the fractions.
            for i, (theta, inner) in enumerate(zip(self.fractions, data, strict=False)):
                missed = inner - _cubic(theta, jnp.zeros_like(y0), y1 - y0, k0, k1)
                y = y + bumps[i].astype(dtype) * missed
            if self.k_mid is not None:
                missed = data[-1] - (3 * (y1 - y0) / 2 - (k0 + k1) / 4)
                y = y + bumps[-1].astype(dtype) * missed
            return jnp.where(bound, given, y)

        ends = self.y0, self.y1, self.k0, self.k1
        return jtu.tree_map(combine, *ends, *self.inner, *others)


def _cubic(x, y0: Array, y1: Array, k0: Array, k1: Array) -> Array:
    x_ = 1 - x
    return (1 + 2 * x) * x_**2 * y0 + x**2 * (1 + 2 * x_) * y1 + x * x_ * (x_ * k0 - x * k1)


def _bumps(x: Array, fractions: tuple[float, ...], with_slope: bool) -> list[Array]:
    """Polynomials `x^2 (1 - x)^2 B(x)`, flat at both ends, one for each of the fractions:
    one there and zero at the others. `with_slope` they are flat at the mid-point as well,
    and one more has slope one there and is zero at all fractions."""
    nodes = np.array(fractions)
    count = len(nodes) + with_slope
    powers = np.arange(count)
    # `B` in powers of `x - 1/2`. At the mid-point `x^2 (1 - x)^2` is flat.
    rows = (nodes * (1 - nodes))[:, None] ** 2 * np.power.outer(nodes - 0.5, powers)
    if with_slope:
        rows = np.concatenate([rows, [np.where(powers == 1, 1 / 16, 0.0)]])
    coefficients = np.linalg.inv(rows) if count > 0 else rows
    flat = (x * (1 - x)) ** 2
    basis = [flat * (x - 0.5) ** k for k in range(count)]
    zero = jnp.zeros_like(x)
    return [
        sum((float(c) * b for c, b in zip(cs, basis, strict=True)), zero)
        for cs in coefficients.T
    ]


class MakeInterpolation(eqx.Module):
    """Creates the interpolation of a step of asynchronous leapfrog; hashable."""

    tableau: ALFTableau = eqx.field(static=True)

    def __call__(self, *, t0, t1, y0, y1, inner, **slopes) -> HermiteInterpolation:
        extension = self.tableau.continuous_extension
        inner = [
            with_slopes(values, weights, slopes)
            for weights, values in zip(extension.slope_weights, inner, strict=True)
        ]
        return HermiteInterpolation(
            t0, t1, y0, y1, inner=inner, fractions=extension.fractions, **slopes
        )


def with_slopes(values: Y, weights: np.ndarray, slopes: dict[str, VF]) -> Y:
    """Add the terms of the derivatives at the ends and the mid-point to a value within the
    step."""
    for name, weight in zip(("k0", "k1", "k_mid"), weights, strict=False):
        if weight != 0:
            values = tree_axpy(float(weight), slopes[name], values)
    return values
