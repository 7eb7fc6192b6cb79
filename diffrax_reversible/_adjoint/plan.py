"""What a backward pass does about growth."""

from typing import NamedTuple

import jax.numpy as jnp

from .._custom_types import BoolScalarLike, IntScalarLike


class Plan(NamedTuple):
    """What the backward pass does about growth.

    - `cures`: whether it restarts where the gradient would grow otherwise, see
        `Growth.spoils`.
    - `compares`: whether steps have other derivatives, if the solver has these. The
        gradient of the next backward pass is compared with this one.
    - `divides`: whether it divides steps that are too large for a mode, see `Division`:
        into as few parts as are stable, or into so many times as many. Zero if it does not.
    """

    cures: BoolScalarLike
    compares: BoolScalarLike
    divides: IntScalarLike

    @staticmethod
    def nothing() -> "Plan":
        return Plan(jnp.array(False), jnp.array(False), jnp.array(0))
