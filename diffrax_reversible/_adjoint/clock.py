"""The position of the walk in time."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._custom_types import BoolScalarLike, RealScalarLike
from .._precision import eps
from .._tree import tree_select


class Clock(eqx.Module):
    """The position of the walk in time: the start of the step that was undone last.

    - `start`, `end`: the ends of that step; if recorded, the same floats that the solver
        was called with.
    - `previous_end`: the end of the step before it.
    - `controller_state`: the controller state at `start`, if steps are recomputed.
    - `drift`: the largest error of recomputed times, as a fraction of the step.
    """

    start: RealScalarLike
    end: RealScalarLike
    previous_end: RealScalarLike
    controller_state: PyTree
    drift: Float[Array, ""]

    def set(
        self,
        t: RealScalarLike,
        previous_end: RealScalarLike,
        controller_state: PyTree,
        known: BoolScalarLike = True,
    ) -> "Clock":
        """Replace `start`, and the values that precede it, by true ones, if `known`."""
        drift = jnp.maximum(self.drift, jnp.where(known, self.off(t), 0))
        new = t, previous_end, controller_state
        old = self.start, self.previous_end, self.controller_state
        start, before, state = tree_select(known, new, old)
        return Clock(start, self.end, before, state, drift)

    @property
    def still(self) -> "Clock":
        """The clock of a step of length zero, before the one that was undone last."""
        return dataclasses.replace(self, end=self.start)

    def off(self, t: RealScalarLike) -> Float[Array, ""]:
        """The distance of `start` from the true time, as a fraction of the step."""
        step = jnp.abs(self.end - self.start)
        # The same sum may round differently in separately compiled code.
        ulps = 4 * eps(t) * jnp.abs(t)
        off = jnp.maximum(jnp.abs(t - self.start) - ulps, 0)
        return jnp.where(off != 0, off / jnp.where(step == 0, 1, step), 0)


class Ends(eqx.Module):
    """The ends of a step."""

    start: RealScalarLike
    end: RealScalarLike
