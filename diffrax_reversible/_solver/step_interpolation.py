"""Interpolation by the fraction of a step."""

import abc

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation
from jaxtyping import Array, Float, PyTree

from .._custom_types import RealScalarLike


class AbstractStepInterpolation(AbstractLocalInterpolation):
    """An interpolation that is a function of the fraction of the step."""

    @abc.abstractmethod
    def _at(self, x: Float[Array, ""], t: RealScalarLike, left: bool) -> PyTree[Array]:
        """The solution at the fraction `x` of the step, at time `t`."""

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree[Array]:
        if t1 is not None:
            return jtu.tree_map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = self.t1 - self.t0
        # A step of no length ends where it starts; any fraction will do.
        trivial = length == 0
        x = jnp.where(trivial, 1, t0 - self.t0) / jnp.where(trivial, 1, length)
        return self._at(x, t0, left)
