"""Explicit Runge–Kutta methods, made reversible by coupling two copies of the state."""

from typing import ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractAdaptiveSolver,
    AbstractERK,
    AbstractTerm,
    ButcherTableau,
    RESULTS,
)

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Terms, VF, Y
from .._tree import larger, tree_axpy
from .capabilities import KeepsStateAtJumps
from .chain import as_sums, as_trees, run, undo
from .coupled_interpolation import MakeCoupled
from .coupled_state import CoupledState, Separation, with_copy
from .error_scales import HasErrorScales
from .interrupted_solver import CanRestart
from .mccallum_foster_pullback import AbstractMcCallumFosterPullback
from .ode_term import as_ode_term
from .overrides import overrides
from .runge_kutta import combine, embedded_weights


class McCallumFoster(
    AbstractMcCallumFosterPullback,
    CanRestart[CoupledState],
    KeepsStateAtJumps[CoupledState],
    HasErrorScales[CoupledState],
    AbstractAdaptiveSolver[CoupledState],
):
    """An explicit Runge–Kutta method made reversible, for problems that hardly contract.

    Let `y + Ψ_h(y)` be a step of the `solver` and `λ` the `coupling`. The state `y` and a
    second copy `z` of it evolve by

        y1 = λ y0 + (1 - λ) z0 + Ψ_h(z0),    z1 = z0 - Ψ_-h(y1)

    so that `z0` and then `y0` follow from `z1` and `y1`.

    Order, embedded order, error estimate and interpolation are those of the `solver`, the
    latter two for its step from `z0`. Each step costs two steps of the `solver`, the second
    without stages that serve only the next step. Memory of `SaveAt(dense=True)`: that of
    the `solver`, and two states per step.

    Algebraically reversible: undoing a step takes at most as many evaluations, and divides
    by `λ`. Errors of the backward pass grow by `1 / λ` per step, unless the flow damps
    them: at the default of 0.999, by 2.7 over 1,000 steps and by 22,000 over 10,000.

    The copies drift apart, fastest where the flow contracts, and the error estimate does
    not show it. A restart sets `z` to `y` before the next step, at no evaluation, where
    their distance exceeds three times the estimate in any entry, on its own scale, or has
    grown too much for the backward pass. For each restart `ReversibleAdjoint` needs two
    states: it holds them, or replays the solve up to there. Contracting problems need more
    restarts than with `ALF4`, and with large steps one per step.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import McCallumFoster
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> solver = McCallumFoster(diffrax.Bosh3())
    >>> sol = diffrax.diffeqsolve(term, solver, 0, 1, 0.1, jnp.array(1.0))
    >>> print(f"{sol.ys[0]:.3f}")
    0.368

    Reference: McCallum & Foster (2024), *Efficient, Accurate and Stable Gradients for
    Neural ODEs*, arXiv:2410.11648.
    """

    solver: AbstractERK
    coupling: float = 0.999

    term_structure: ClassVar = AbstractTerm

    def __check_init__(self):
        given = self.solver
        name = given.__name__ if isinstance(given, type) else f"{type(given).__name__}()"
        tableau = getattr(self.solver, "tableau", None)
        if not (
            isinstance(self.solver, AbstractERK) and isinstance(tableau, ButcherTableau)
        ):
            raise ValueError(
                f"`McCallumFoster({name})` needs an explicit Runge–Kutta solver of "
                "Diffrax with a tableau, such as `diffrax.Tsit5()` or, in place of "
                "`diffrax.Euler()`, `diffrax.Heun()`."
            )
        if overrides(self.solver, "step", AbstractERK):
            raise ValueError(
                f"`McCallumFoster({name})` makes steps by the tableau of the solver, whose "
                "`step` is overridden. Pass a solver with the `step` of Diffrax."
            )
        coupling = self.coupling
        if not (isinstance(coupling, int | float) and 0 < coupling <= 1):
            raise ValueError(
                f"`McCallumFoster(..., coupling={coupling})` must be a positive number, "
                "one at the most, and known when the solve is compiled."
            )

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return MakeCoupled(self.solver.interpolation_cls)

    def order(self, terms: Terms) -> int | None:
        return self.solver.order(terms)

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> CoupledState:
        """A second copy of the state."""
        del t0, t1, args
        as_ode_term(self, terms)
        return CoupledState(y0, Separation.start(y0))

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return as_ode_term(self, terms).vf(t0, y0, args)

    def advance(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: CoupledState,
    ) -> tuple[Y, Y, DenseInfo, CoupledState, RESULTS]:
        z0 = solver_state.copy
        collect = lambda sides, row, evaluated: evaluated
        parts, evaluated = run(
            self._chain(t0, t1), terms, args, as_sums((y0, z0)), [], collect
        )
        y1, z1 = as_trees(parts)
        (_, (increment, stages)), _ = evaluated
        y_error = combine(self._tableau.b_error, stages)
        dense_info = self._dense_info(y0, z0, increment, stages)
        separation = solver_state.separation.judge(y1, z1, y_error)
        solver_state = CoupledState(z1, separation)
        return y1, y_error, dense_info, solver_state, RESULTS.successful

    def needs_restart(self, solver_state: CoupledState) -> BoolScalarLike:
        return solver_state.separation.restart

    def restart(
        self,
        terms: Terms,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: CoupledState,
    ) -> CoupledState:
        """`z <- y`."""
        del terms, t, args
        return CoupledState(y, solver_state.separation.restarted())

    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: CoupledState,
        y_end: Y,
        solver_state_end: CoupledState,
    ) -> tuple[Y, CoupledState]:
        """The scale of each copy is at least the size of one step's update."""
        del length, solver_state_end
        term = as_ode_term(self, terms)
        step = term.vf_prod(t0, y0, args, term.contr(t0, t1))
        scales = jtu.tree_map(larger, y0, step, y_end)
        state = eqx.filter(solver_state, eqx.is_inexact_array)
        return scales, with_copy(state, scales)

    def backward_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: CoupledState,
    ) -> tuple[Y, CoupledState]:
        parts = as_sums((y1, solver_state.copy))
        parts, _ = undo(self._chain(t0, t1), terms, args, parts)
        y0, z0 = as_trees(parts)
        return y0, with_copy(solver_state, z0)

    def with_other_derivatives(self, where: BoolScalarLike) -> "McCallumFoster | None":
        """Those of the embedded method."""
        weights = embedded_weights(self._tableau)
        # A subclass may make its steps in another way.
        if weights is None or type(self) is not McCallumFoster:
            return None
        weights = tuple(map(float, weights))
        return _OtherDerivatives(self.solver, self.coupling, where, weights)


McCallumFoster.__init__.__doc__ = """**Arguments:**

- `solver`: an explicit Runge–Kutta solver of Diffrax, such as `diffrax.Tsit5` or
    `diffrax.Dopri8`.
- `coupling`: the weight `λ` of `y` in a step; 0.999 is the choice of the paper.

**Raises:**

`ValueError` for other solvers, as those that override `step`, and couplings, and in the
solve for terms that are not integrated with respect to time.
"""


class _OtherDerivatives(McCallumFoster):
    """The same steps, whose derivatives are by other weights where this is wanted."""

    where: BoolScalarLike = False
    weights: tuple[float, ...] = eqx.field(static=True, default=())

    def _increment(self, stages: list[Y]) -> Y:
        increment = super()._increment(stages)
        weights = np.array(self.weights) - self._tableau.b_sol
        difference = combine(weights, stages)
        # Zero, with derivatives.
        difference = jtu.tree_map(lambda x: x - lax.stop_gradient(x), difference)
        return tree_axpy(jnp.where(self.where, 1, 0), difference, increment)
