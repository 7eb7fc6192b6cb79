"""Probes, by which the adjoint detects gradients that grow without reason."""

import abc
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from .._custom_types import (
    Args,
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    VF,
    Y,
)
from .base import AbstractReversibleSolver
from .cotangent import Cotangent, Probe
from .ode_term import as_ode_term


_SolverState = TypeVar("_SolverState")


class Departure(NamedTuple):
    """The distance of the second approximation from the first after a step of `y' = λ y`
    that began with both equal: about `coefficient * |h λ|**power` times `y`. The first one
    does not grow if `-stable < h λ < 0`."""

    coefficient: float
    power: int
    stable: float

    @staticmethod
    def of(
        distance: float, power: int, amplify: Callable[[np.ndarray], np.ndarray]
    ) -> "Departure":
        """From the distance after a step with `h λ = -2`, as smaller steps add little, and
        larger ones are hardly stable; and from the first approximation after a step."""
        z = np.linspace(0, 20, 2001)
        grows = np.abs(amplify(-z)) > 1 + 1e-9
        stable = z[np.argmax(grows)] if np.any(grows) else z[-1]
        return Departure(float(abs(distance)) / 2**power, power, float(stable))


class HasProbe(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can pull a cotangent back through the vector field at the start of a
    step."""

    @property
    def departure(self) -> Departure | None:
        """How far the second approximation departs from the first in a step. `None` if the
        backward pass cannot restart in place of the solve."""
        return None

    def with_other_derivatives(
        self, where: BoolScalarLike
    ) -> "AbstractReversibleSolver | None":
        """A solver with the same steps, whose derivatives `where` this is wanted are those
        of a less accurate method: two gradients that are both accurate agree. `None` if
        there is no such method."""
        del where
        return None

    def slope(
        self,
        terms: Terms,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> VF:
        """The vector field at the end of a step, up to the error of the step."""
        del solver_state
        return as_ode_term(self, terms).vf(t, y, args)

    @abc.abstractmethod
    def probe(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> Probe | None:
        """A probe to detect gradients that grow where the solution contracts.

        `None` if the solver has no `departure`; no error is then raised for them.

        **Arguments:**

        - `combine`, `params`: `terms, args = combine(params)`.
        - `t0`, `t1`, `y0`: the step, and the state at its start.
        - `cotangent`: the cotangent at `t0`.
        - `dense_cotangent`: the cotangent of the interpolation data of the step.
        """
