"""The error estimate of Gauss methods, and its filter."""

from collections.abc import Callable
from math import factorial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._coefficients.gauss import GaussTableau
from .._custom_types import Y
from .._tree import tree_add, tree_combine, tree_scale
from .base import AbstractReversibleSolver
from .gauss_state import GaussState
from .linear_inverse import inverse
from .ode_term import as_ode_term


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


# The weight of the difference of the defects at both ends. With one stage the estimate is
# the leading term of the error. With two and three, errors at a given tolerance are about
# those of `Kvaerno5`, on equations that are not stiff.
_error_weight = 1 / 6
# The `|h λ|` at which the estimate is as large as the leading term of the error on
# `y' = λ y`.
_sharp_at = 2.0


class AbstractGaussError(AbstractReversibleSolver[GaussState]):
    """The error estimate of an `AbstractGauss`."""

    tableau: AbstractVar[GaussTableau]
    linear_solver: AbstractVar[lx.AbstractLinearSolver]

    def _error(self, step: tuple, y0: Y, y1: Y, k: PyTree[Array]) -> Y:
        """An error estimate from the defect `h f(t, u) - h u'` of the collocation
        polynomial `u` at both ends.

        The defect is zero at the nodes. So to leading order those at both ends agree up to
        the sign `(-1)^s`, and their difference is of order `s + 2`. If `f` is affine in `y`
        and does not depend on `t`, they agree altogether, up to that sign. Then the effect
        of the defect on the solution tells the error. On `y' = λ y`, with `z = h λ` and the
        defect `δ` at the end,

            δ = s! / (2s)! z^(s+1) + ...,    e^z - R(z) = (-1)^s s! / (2s + 1)! z^s δ + ...

        where `z^s` is replaced by `z0^(s-1) h ∂f/∂y`, `z0` being `_sharp_at`. The estimate
        is a sixth of the difference of the defects, minus that effect. With one stage this
        is the leading term of the error; with more, only its size means anything. Both
        parts grow with the stiffness, and are therefore filtered by linear solves with
        `1 - γ h ∂f/∂y`.

        Reference: Hairer & Wanner (1996), section IV.8, doi:10.1007/978-3-642-05221-7.
        """
        terms, t0, t1, args = step
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)
        at0, at1 = self.tableau.defect_weights
        sign = (-1) ** self.tableau.stages

        def defect(t, y, weights):
            slope = tree_scale(control, term.vf(t, y, args))
            return jtu.tree_map(jnp.subtract, slope, tree_combine(weights, k))

        first, last = defect(t0, y0, at0), tree_scale(sign, defect(t1, y1, at1))
        difference = jtu.tree_map(jnp.subtract, first, last)
        common = tree_scale(sign / 2, tree_add(first, last))
        filtered = self._filter_at(step, y0, common)
        # `h ∂f/∂y δ`, filtered.
        effect = jtu.tree_map(jnp.subtract, filtered(common), common)
        stages = self.tableau.stages
        weight = _sharp_at ** (stages - 1) * factorial(stages) / factorial(2 * stages + 1)
        effect = tree_scale(weight / self._filter, effect)
        error = tree_scale(_error_weight, difference)
        return filtered(jtu.tree_map(jnp.subtract, error, effect))

    def _filter_at(self, step: tuple, y: Y, like: Y) -> Callable[[Y], Y]:
        """`(1 - γ h ∂f/∂y)^-1`, at the start of a step."""
        terms, t0, t1, args = step
        term = as_ode_term(self, terms)
        weight = term.contr(t0, t1) * self._filter

        def stiff(x):
            _, tangent = jax.jvp(lambda y: term.vf(t0, y, args), (y,), (x,))
            return jtu.tree_map(jnp.subtract, x, tree_scale(weight, tangent))

        solve = inverse(stiff, like, self.linear_solver)
        return lambda x: solve(x)[0]

    @property
    def _filter(self) -> float:
        """The `γ` of the filter: with one stage that of the step itself, and comparable
        with more."""
        return 1 / (2 * self.tableau.stages)
