"""The drifts and kicks of a step, and higher derivatives of the solution."""

from typing import NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractTerm
from jaxtyping import Array

from .._coefficients.splitting_tableau import SplittingTableau
from .._custom_types import Args, RealScalarLike, VF, Y
from .._isolated import isolated
from .._jaxpr import derives_custom_vjp
from .._precision import as_floats
from .._total_derivative import total_derivatives
from .._tree import tree_scale
from .base import AbstractReversibleSolver
from .chain import Chain, Update
from .ode_term import as_ode_term
from .splitting_state import SplittingState


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


Terms = tuple[AbstractTerm, AbstractTerm]


_no_higher_derivatives = (
    "`{}` interpolates with derivatives of the vector field, by forward mode, which a "
    "function with `jax.custom_vjp` does not have. Define it with `jax.custom_jvp`; or "
    "use `SaveAt(t1=True)` or `SaveAt(steps=True)`; or take a solver of order 4, such as "
    "`BlanesMoan4`."
)


class Stage(NamedTuple):
    """A drift and the kick after it; stacked along the first axis for a step."""

    drift: Array
    drift_time: Array
    kick: Array
    kick_time: Array
    drift_error: Array
    kick_error: Array
    # One for the last kick, and zero for all others.
    is_last: Array


class AbstractSplittingChain(AbstractReversibleSolver[SplittingState]):
    """The chain of drifts and kicks of an `AbstractSplitting`."""

    tableau: AbstractVar[SplittingTableau]
    compensated: AbstractVar[bool]
    bitwise: AbstractVar[bool]

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        (term_q, term_p), (q, p) = self._terms(terms), y0
        return term_q.vf(t0, p, args), term_p.vf(t0, q, args)

    def _chain(
        self,
        h_q: RealScalarLike,
        h_p: RealScalarLike,
        t0: RealScalarLike,
        t1: RealScalarLike,
    ) -> Chain:
        """The drifts and kicks, which update `q` and `p`, without the first kick."""

        def make_update(target: int, term: AbstractTerm, t, factor, args: Args):
            evaluate = lambda y: (term.vf(t, y, args), None)
            alike = lambda y: (self._evaluate(term, t, y, args), None)
            alike = alike if self.bitwise else None
            return Update(target, evaluate, factor=factor, alike=alike)

        def make_round(terms: Terms, args: Args, stage: Stage):
            term_q, term_p = self._terms(terms)
            drift = stage.drift_time, h_q * stage.drift
            kick = stage.kick_time, h_p * stage.kick
            return make_update(0, term_q, *drift, args), make_update(1, term_p, *kick, args)

        return Chain(make_round, _stages(self.tableau, t0, t1))

    def _higher_derivatives(
        self,
        terms: Terms,
        t: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike],
        y: Y,
        args: Args,
    ) -> list[VF]:
        """The second and higher derivatives of the solution for dense output."""
        t, t0, t1 = as_floats(t, *step)
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)

        def field(t, y):
            velocity, force = self.func(terms, t, y, args)
            return tree_scale(h_q, velocity), tree_scale(h_p, force)

        count = self.tableau.order // 2 - 2
        if count <= 0:
            return []
        derivatives = total_derivatives(field, count, t1 - t0)
        if derives_custom_vjp(derivatives, t, y):
            # Most solves do not read them. While `t` is traced, only a read is an error.
            message = _no_higher_derivatives.format(type(self).__name__)
            unknown = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), field(t, y))
            return [eqx.error_if(unknown, t == t, message)] * count
        _, *higher = derivatives(t, y)
        return higher

    def _evaluate(self, term: AbstractTerm, t: RealScalarLike, y: Y, args: Args) -> VF:
        """A vector field; if `bitwise`, it rounds alike wherever it is compiled."""
        if not self.bitwise:
            return term.vf(t, y, args)
        return isolated(lambda t, y: term.vf(t, y, args), t, y)

    def _terms(self, terms: Terms) -> Terms:
        term_q, term_p = terms
        return as_ode_term(self, term_q), as_ode_term(self, term_p)


def _stages(tableau: SplittingTableau, t0: RealScalarLike, t1: RealScalarLike) -> Stage:
    t0, t1 = as_floats(t0, t1)
    array = lambda x: jnp.asarray(x, t0.dtype)
    times = t0 + array(tableau.kick_times[1:-1]) * (t1 - t0)
    # Exactly the float at which the next step begins.
    kick_times = jnp.concatenate([times, t1[None]])
    return Stage(
        array(tableau.drifts),
        t0 + array(tableau.drift_times) * (t1 - t0),
        array(tableau.kicks[1:]),
        kick_times,
        array(tableau.drift_error_weights[1:]),
        array(tableau.kick_error_weights[1:]),
        array(np.arange(len(tableau.drifts)) == len(tableau.drifts) - 1),
    )
