"""The two updates of a step that couples two copies of the state."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractERK, ButcherTableau

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Terms, Y
from .._tree import tree_add, tree_axpy, tree_scale
from .base import AbstractReversibleSolver
from .chain import Chain, Update
from .coupled_state import CoupledState
from .ode_term import as_ode_term
from .runge_kutta import combine, evaluate, stages_of


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class AbstractMcCallumFosterChain(AbstractReversibleSolver[CoupledState]):
    """The updates of a `McCallumFoster`."""

    solver: AbstractVar[AbstractERK]
    coupling: AbstractVar[float]

    @property
    def _tableau(self) -> ButcherTableau:
        assert isinstance(self.solver.tableau, ButcherTableau)
        return self.solver.tableau

    def _increment(self, stages: list[Y]) -> Y:
        """`Ψ`, from its stages."""
        return combine(self._tableau.b_sol, stages)

    def _chain(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        tap: tuple[Y, Y] | None = None,
        lost: BoolScalarLike = False,
    ) -> Chain:
        """The two updates, of `y` and of `z`. The first also returns `Ψ` and its stages.

        - `tap`: its cotangents are those passed to the first stage, and through it to the
            state.
        - `lost`: whether the step back has left the domain of the vector field, so that
            nothing depends on the new `z`. It then has no length, as derivatives outside
            of the domain are not finite, even times zero.
        """
        back_to = t0 if lost is False else jnp.where(lost, t1, t0)

        def make_round(terms: Terms, args: Args, row: None):
            del row
            term = as_ode_term(self, terms)

            def forth(z, tap=None):
                first = z if tap is None else tree_add(z, tap[0])
                first = evaluate(term, t0, first, args, term.contr(t0, t1))
                first = first if tap is None else tree_add(first, tap[1])
                stages = stages_of(self._tableau, term, t0, t1, z, args, first)
                increment = total = self._increment(stages)
                # Infinite entries, as bounds, may be multiplied by one, but not by zero.
                if self.coupling != 1:
                    total = tree_axpy(1 - self.coupling, z, increment)
                return total, (increment, stages)

            def back(y):
                first = evaluate(term, t1, y, args, term.contr(t1, back_to))
                stages = stages_of(self._tableau, term, t1, back_to, y, args, first)
                return self._increment(stages), None

            return Update(0, forth, self.coupling, tap=tap), Update(1, back, factor=-1)

        return Chain(make_round)

    def _dense_info(self, y0: Y, z0: Y, increment: Y, stages: list[Y]) -> DenseInfo:
        offset = jtu.tree_map(jnp.subtract, y0, z0)
        k = jtu.tree_map(lambda *ks: jnp.stack(ks), *stages)
        return dict(
            inner=dict(y0=z0, y1=tree_add(z0, increment), k=k),
            offset0=offset,
            offset1=tree_scale(self.coupling, offset),
        )
