"""The interpolation of two coupled copies."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, Float, PyTree

from .._custom_types import RealScalarLike, Y
from .step_interpolation import AbstractStepInterpolation


class CoupledInterpolation(AbstractStepInterpolation):
    """The interpolation of the Runge–Kutta step, plus an offset that is linear in time."""

    interpolation: AbstractLocalInterpolation
    offset0: Y
    offset1: Y

    @property
    def t0(self):
        return self.interpolation.t0

    @property
    def t1(self):
        return self.interpolation.t1

    def _at(self, x: Float[Array, ""], t: RealScalarLike, left: bool) -> PyTree[Array]:
        def add(y, d0, d1):
            weight = x.astype(d0.dtype)
            # An infinite bound stays one.
            d0, d1 = (jnp.where(jnp.isinf(y), 0, d) for d in (d0, d1))
            return y + ((1 - weight) * d0 + weight * d1)

        y = self.interpolation.evaluate(t, left=left)
        return jtu.tree_map(add, y, self.offset0, self.offset1)


class MakeCoupled(eqx.Module):
    """Creates a `CoupledInterpolation` around that of a Runge–Kutta solver; hashable."""

    inner: Callable[..., AbstractLocalInterpolation] = eqx.field(static=True)

    def __call__(self, *, t0, t1, offset0, offset1, inner) -> CoupledInterpolation:
        return CoupledInterpolation(self.inner(t0=t0, t1=t1, **inner), offset0, offset1)
