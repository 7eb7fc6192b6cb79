"""Dense output of asynchronous leapfrog, by Hermite interpolation."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, PyTree

from .._coefficients.continuous_extension import ContinuousExtension
from .._coefficients.tableau import ALFTableau
from .._custom_types import RealScalarLike, VF, Y
from .._tree import tree_axpy


class HermiteInterpolation(AbstractLocalInterpolation):
    """Hermite interpolation through both ends of a step and values within it.

    `ALF4` and its like use it between steps. It is the polynomial through the solution at
    both ends, its derivative at the start, and whatever else is given: its derivative at
    the end and at the mid-point, and the solution at fractions of the step. Its degree is
    two, and one more for each of these. It is exact to the bit at both ends, and linear in
    the data.

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `y0`, `y1`: the solution at `t0` and `t1`.
    - `k0`: its derivative at `t0`, times `t1 - t0`.
    - `k1`, `k_mid`: the same at `t1` and at the mid-point, or `None`. With both, one of the
        fractions has to be a half.
    - `inner`: the solution at the `fractions`, minus `y0`.
    - `fractions`: numbers greater than zero and less than one.

    `y0`, `y1`, `k0`, `k1`, `k_mid` and the elements of `inner` are PyTrees of arrays with
    the structure and shapes of the state.

    **Raises:** `ValueError` if both `k1` and `k_mid` are given without the solution at the
    mid-point, as they then determine no polynomial.

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
    k1: Y | None = None
    inner: list[Y] = eqx.field(default_factory=list)
    k_mid: Y | None = None
    fractions: tuple[float, ...] = eqx.field(default=(), static=True)

    def __check_init__(self):
        if self.k1 is not None and self.k_mid is not None and 0.5 not in self.fractions:
            raise ValueError(
                "`HermiteInterpolation(k1=..., k_mid=...)` needs the solution at the "
                f"mid-point, got `fractions={self.fractions}`. Pass it as one of `inner`, "
                "with 0.5 among the `fractions`, or leave out one of the derivatives."
            )

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        del left
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        # A step of no length has `y0 == y1`; any fraction will do.
        trivial = length == 0
        x = jnp.where(trivial, 0, t0 - self.t0) / jnp.where(trivial, 1, length)
        slopes = {0.0: self.k0, 1.0: self.k1, 0.5: self.k_mid}
        slopes = {theta: k for theta, k in slopes.items() if k is not None}
        bumps = _bumps(x, self.fractions, tuple(slopes))

        def combine(y0, y1, *data):
            dtype = y0.dtype
            # An infinite bound stays one.
            bound, given = jnp.isinf(y0) & (y0 == y1), y0
            y0, y1 = (jnp.where(bound, 0, y) for y in (y0, y1))
            x_, change = x.astype(dtype), y1 - y0
            y = (1 - x_) * y0 + x_ * y1
            # Add what the line misses, whose slope is `change`.
            shares = *self.fractions, *(1.0 for _ in slopes)
            for bump, share, there in zip(bumps, shares, data, strict=True):
                y = y + bump.astype(dtype) * (there - share * change)
            return jnp.where(bound, given, y)

        return jtu.tree_map(combine, self.y0, self.y1, *self.inner, *slopes.values())


def _bumps(
    x: Array, fractions: tuple[float, ...], slopes: tuple[float, ...]
) -> list[Array]:
    """Polynomials `x (1 - x) B(x)`, zero at both ends: one for each of the fractions, where
    it is one, and for each of the `slopes`, where it has slope one. All others are zero
    there, or have slope zero."""
    powers = np.arange(len(fractions) + len(slopes))
    # `B` in powers of `x - 1/2`.
    at, beside = np.array(fractions), np.array(slopes)
    values = (at * (1 - at))[:, None] * np.power.outer(at - 0.5, powers)
    changes = powers * np.power.outer(beside - 0.5, np.maximum(powers - 1, 0))
    changes = (beside * (1 - beside))[:, None] * changes
    changes += (1 - 2 * beside)[:, None] * np.power.outer(beside - 0.5, powers)
    coefficients = np.linalg.inv(np.concatenate([values, changes]))
    basis = [x * (1 - x) * (x - 0.5) ** k for k in range(len(powers))]
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
            with_slopes(values, extension, i, slopes) for i, values in enumerate(inner)
        ]
        return HermiteInterpolation(
            t0, t1, y0, y1, inner=inner, fractions=extension.fractions, **slopes
        )


def with_slopes(
    values: Y, extension: ContinuousExtension, i: int, slopes: dict[str, VF]
) -> Y:
    """Add the terms of the derivatives to the `i`-th value within the step."""
    for name, weight in zip(extension.slopes, extension.slope_weights[i], strict=True):
        if weight != 0:
            values = tree_axpy(float(weight), slopes[name], values)
    return values
