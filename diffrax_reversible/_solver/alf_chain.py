"""The sub-steps of compositions of asynchronous leapfrog."""

from typing import NamedTuple, TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from diffrax import AbstractTerm
from jaxtyping import Array

from .._coefficients.alf_tableau import ALFTableau
from .._custom_types import Args, DenseInfo, RealScalarLike, VF, Y
from .._isolated import isolated
from .._precision import as_floats
from .._tree import tree_axpy, tree_scale, tree_zeros_like
from .alf_state import ALFState, split_sums, sums_of
from .base import AbstractReversibleSolver
from .chain import Chain, undo, Update
from .ode_term import as_ode_term


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class SubStep(NamedTuple):
    """The coefficients of one sub-step; stacked along the first axis for a step."""

    # From the last evaluation, or the start of the step, to this evaluation.
    drift: Array
    midpoint: Array
    # The weights of the evaluation in the linear functionals of a step.
    weights: dict[str, Array]


class AbstractALFChain(AbstractReversibleSolver[ALFState]):
    """The chain of sub-steps of an `AbstractALF`, and the sums of their evaluations."""

    tableau: AbstractVar[ALFTableau]
    compensated: AbstractVar[bool]
    bitwise: AbstractVar[bool]

    def _functionals(self) -> dict[str, np.ndarray]:
        """Weights of `u_0 = v_0, u_1, ..., u_s` in the outputs of a step besides `(z, v)`,
        one column per output.

        Outputs that are used together are stacked, which is faster for small states.
        """
        errors = list(self._error_functionals().values())
        functionals = dict(errors=np.stack(errors, axis=1))
        if len(inner := self.tableau.continuous_extension.weights) > 0:
            functionals["inner"] = inner.T
        return functionals

    def _error_functionals(self) -> dict[str, np.ndarray]:
        """Weights of the stages in the error estimates and the deviation."""
        tableau = self.tableau
        errors = dict(fine=tableau.error_weights)
        if np.any(tableau.coarse_error_weights):
            errors["coarse"] = tableau.coarse_error_weights
        if tableau.deviation_weights is not None:
            errors["deviation"] = tableau.deviation_weights
        return errors

    def _inner_functionals(self) -> dict[str, np.ndarray]:
        """Weights of the stages in the solution at fractions of the step."""
        weights = self.tableau.continuous_extension.weights
        return {f"inner_{i}": row for i, row in enumerate(weights)}

    @property
    def _evaluates_slopes(self) -> bool:
        """Whether interpolation evaluates the vector field at the ends of the step."""
        return len(self.tableau.continuous_extension.fractions) > 0

    @property
    def _midpoint(self) -> int:
        """The index of the mid-point among the fractions."""
        return self.tableau.continuous_extension.fractions.index(0.5)

    def _chain(
        self,
        control: RealScalarLike,
        t0: RealScalarLike,
        t1: RealScalarLike,
        functionals: dict[str, np.ndarray],
    ) -> Chain:
        """The sub-steps, which update `z` and `v`, without the drift after the last one."""
        t0, t1 = as_floats(t0, t1)

        def make_round(terms: AbstractTerm, args: Args, sub: SubStep):
            term, t = as_ode_term(self, terms), t0 + sub.midpoint * (t1 - t0)
            evaluate = lambda k: (term.vf(t, k, args), None)
            alike = lambda k: (self._field(term, t, k, args), None)
            drift = Update(0, None, factor=control * sub.drift)
            alike = alike if self.bitwise else None
            return drift, Update(1, evaluate, scale=-1, factor=2, alike=alike)

        dtype = t0.dtype
        sub_steps = SubStep(
            jnp.asarray(self.tableau.drifts[:-1], dtype),
            jnp.asarray(self.tableau.midpoints, dtype),
            {name: jnp.asarray(w[1:], dtype) for name, w in functionals.items()},
        )
        return Chain(make_round, sub_steps)

    def _walk_back(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: ALFState,
        functionals: dict[str, np.ndarray],
    ) -> tuple[Y, ALFState, DenseInfo]:
        """Undo a step. Also returns its `functionals`, which do not involve `v_0`."""
        control = as_ode_term(self, terms).contr(t0, t1)
        z, v = sums_of(y1, solver_state)
        k = z.minus(tree_scale(control * float(self.tableau.drifts[-1]), v.high))
        chain = self._chain(control, t0, t1, functionals)
        zeros = {name: tree_zeros_like(v.high) for name in functionals}
        (z, v), sums = undo(chain, terms, args, (k, v), zeros, add_weighted)
        y0, v0, low = split_sums(z, v)
        sums = tree_scale(control, sums)
        return y0, ALFState(v0, solver_state.deviation, low, jnp.array(False)), sums

    def _field(self, term: AbstractTerm, t: RealScalarLike, y: Y, args: Args) -> VF:
        """The vector field; if `bitwise`, it rounds alike wherever it is compiled."""
        if not self.bitwise:
            return term.vf(t, y, args)
        return isolated(lambda t, y: term.vf(t, y, args), t, y)


def add_weighted(
    sums: dict[str, VF], sub: SubStep, evaluated: list[tuple[VF, None]]
) -> dict[str, VF]:
    """The sums of evaluations, with another sub-step."""
    _, (u, _) = evaluated
    return {name: tree_axpy(sub.weights[name], u, total) for name, total in sums.items()}
