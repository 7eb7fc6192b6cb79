"""Explicit Runge–Kutta methods, made reversible by coupling two copies of the state."""

from typing import Any, ClassVar

import equinox as eqx
import jax
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
from .._isolated import unfused
from .._tree import (
    larger,
    sum_of_magnitudes,
    tree_add,
    tree_axpy,
    tree_scale,
    tree_zeros_like,
)
from .capabilities import CanRestart, HasErrorScales, KeepsStateAtJumps
from .chain import as_sums, as_trees, Chain, run, undo, Update
from .chain_pullback import Pulled, undo_and_pull
from .coupled_interpolation import MakeCoupled
from .coupled_state import copy_is_lost, CoupledState, Separation, with_copy
from .ode_term import as_ode_term
from .overrides import overrides
from .pullback import (
    Cotangent,
    Departure,
    HasProbe,
    HasPullbackFromStart,
    Probe,
    StepStart,
)


class McCallumFoster(
    CanRestart[CoupledState],
    KeepsStateAtJumps[CoupledState],
    HasErrorScales[CoupledState],
    HasPullbackFromStart[CoupledState],
    HasProbe[CoupledState],
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
    def _tableau(self) -> ButcherTableau:
        assert isinstance(self.solver.tableau, ButcherTableau)
        return self.solver.tableau

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

    def _first_stage(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> Y:
        term = as_ode_term(self, terms)
        return self._evaluate(term, t0, y, args, term.contr(t0, t1))

    def _evaluate(
        self,
        term: AbstractTerm,
        t: RealScalarLike,
        y: Y,
        args: Args,
        control: RealScalarLike,
    ) -> Y:
        """The derivative of one stage, times the control.

        If XLA fused the evaluations of a step, it would repeat the earlier ones for each
        entry of a later one. Where a field takes the mean of sines, gradients would take
        hundreds of times as long.
        """
        return unfused(t, term.vf_prod(t, y, args, control))

    def _stages(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        first: Y,
    ) -> list[Y]:
        """The stage derivatives times `t1 - t0`, from `y` at `t0`; the `first` is given.

        The loop is unrolled, over a dozen stages at most: Diffrax's own either cannot be
        differentiated in reverse mode, or evaluates the stages again.
        """
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)
        tableau = self._tableau
        stages = [first]
        for c, row in zip(tableau.c, tableau.a_lower, strict=True):
            stage = y
            for a, k in zip(row, stages, strict=True):
                stage = stage if a == 0 else tree_axpy(float(a), k, stage)
            t = t1 if c == 1 else t0 + float(c) * (t1 - t0)
            stages.append(self._evaluate(term, t, stage, args, control))
        return stages

    def _increment(self, stages: list[Y]) -> Y:
        """`Ψ`, from its stages."""
        return _combine(self._tableau.b_sol, stages)

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

            def forth(z, tap=None):
                first = z if tap is None else tree_add(z, tap[0])
                first = self._first_stage(terms, t0, t1, first, args)
                first = first if tap is None else tree_add(first, tap[1])
                stages = self._stages(terms, t0, t1, z, args, first)
                increment = self._increment(stages)
                return tree_axpy(1 - self.coupling, z, increment), (increment, stages)

            def back(y):
                first = self._first_stage(terms, t1, back_to, y, args)
                stages = self._stages(terms, t1, back_to, y, args, first)
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
        y_error = _combine(self._tableau.b_error, stages)
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

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: CoupledState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, CoupledState, Cotangent, tuple[Y, CoupledState]]:
        """One evaluation and one pull-back for each evaluation of a step, except for unused
        stages."""
        sides_bar, dense_bars = None, tree_zeros_like((y1, y1))
        if dense_cotangent is not None:
            # `_dense_info` is linear: its pull-back is the same at every point.
            stages = [y1] * (len(self._tableau.c) + 1)
            _, pull = jax.vjp(self._dense_info, y1, y1, y1, stages)
            *dense_bars, increment_bar, stages_bar = pull(dense_cotangent)
            aux_bar = increment_bar, stages_bar
            sides_bar = lambda row: ((tree_zeros_like(y1), aux_bar), None)

        tap = tree_zeros_like(y1), tree_zeros_like(y1)
        lost = copy_is_lost(y1, solver_state.copy)
        pulled = undo_and_pull(
            self._chain(t0, t1, tap, lost),
            combine,
            params,
            as_sums((y1, solver_state.copy)),
            (cotangent.y, cotangent.solver_state.copy),
            cotangent.params,
            sides_bar,
            start and start.of_chain(lambda y, state: as_sums((y, state.copy))),
        )
        y0, z0 = as_trees(pulled.parts)
        y_off, z_off = pulled.off
        # Undo the scaling by the first update, which is the last to be undone.
        y1_bar = tree_scale(1 / self.coupling, pulled.bars[0])
        y0_bar, z0_bar = map(tree_add, pulled.bars, dense_bars)
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)
        outputs = _outputs(y1_bar, dense_cotangent)
        probe = self._probe_first(control, pulled, y0_bar, z0_bar, outputs)
        state_bar = with_copy(cotangent.solver_state, z0_bar)
        cotangent = Cotangent(y0_bar, state_bar, pulled.params_bar, probe)
        off = y_off, with_copy(state_bar, z_off)
        return y0, with_copy(solver_state, z0), cotangent, off

    def _probe_first(
        self, control: RealScalarLike, pulled: Pulled, y0_bar: Y, z0_bar: Y, outputs: Y
    ) -> Probe:
        """The probe of the first stage, the last to be undone."""
        passed, _ = pulled.first
        assert passed is not None
        _, (passed, k_bar) = passed
        # A stage is the vector field times the length of the step.
        vf_bar = tree_scale(control, k_bar)
        y_bar = tree_add(y0_bar, z0_bar)
        passed = self._if_large(passed, y_bar)
        return Probe(vf_bar, passed, control, y_bar, outputs, y_bar, y0_bar)

    def _if_large(self, passed: Y, y_bar: Y) -> Y:
        """The cotangent `passed` through the first stage, with zeros for entries that
        cannot belong to a fast mode.

        The first stage passes on the cotangent of one copy at the start of the step, and
        `y_bar` is the sum of both copies'. As these take turns, the former may stay next to
        zero over many steps of a harmless oscillation, while the sum grows. The quotient of
        `passed` and that cotangent may then have any size. In a growing mode, `h λ < -1`,
        the copy's cotangent is at least as large as the sum. `passed` is `h λ` times it,
        and times the weight of the stage.
        """
        weight = abs(float(self._tableau.b_sol[0]))

        def choose(passed, y_bar):
            return jnp.where(jnp.abs(passed) < weight * jnp.abs(y_bar), 0, passed)

        return jtu.tree_map(choose, passed, y_bar)

    @property
    def departure(self) -> Departure:
        """By the stability function `R`: on `y' = λ y` two equal copies differ after a step
        by `R(h λ) R(-h λ) - 1`."""
        rows = [[], *self._tableau.a_lower]
        a = np.array([[*row, *[0] * (len(rows) - len(row))] for row in rows])
        ones = np.ones(len(rows))

        def amplify(z):
            stages = np.linalg.solve(np.eye(len(rows)) - z * a, ones)
            return 1 + z * np.dot(self._tableau.b_sol, stages)

        distance = amplify(2.0) * amplify(-2.0) - 1
        power = (self.solver.order(None) or 1) + 1
        return Departure.of(distance, power, np.vectorize(amplify))

    def with_other_derivatives(self, where: BoolScalarLike) -> "McCallumFoster | None":
        """Those of the embedded method."""
        weights = _embedded(self._tableau)
        # A subclass may make its steps in another way.
        if weights is None or type(self) is not McCallumFoster:
            return None
        weights = tuple(map(float, weights))
        return _OtherDerivatives(self.solver, self.coupling, where, weights)

    def probe(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> Probe:
        """A probe by the cotangent of the state. Costs an evaluation and a pull-back."""

        terms, args = combine(params)
        term = as_ode_term(self, terms)
        y_bar = tree_add(cotangent.y, cotangent.solver_state.copy)
        _, pull = jax.vjp(lambda y: term.vf(t0, y, args), y0)
        (pulled,) = pull(y_bar)
        outputs = _outputs(y_bar, dense_cotangent)
        control = term.contr(t0, t1)
        return Probe(y_bar, pulled, control, y_bar, outputs, y_bar, cotangent.y)


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
        difference = _combine(weights, stages)
        # Zero, with derivatives.
        difference = jtu.tree_map(lambda x: x - lax.stop_gradient(x), difference)
        return tree_axpy(jnp.where(self.where, 1, 0), difference, increment)


def _embedded(tableau: ButcherTableau) -> np.ndarray | None:
    """The weights of the embedded method, without the last stages if the solution does not
    use them, so that they need not be evaluated, and scaled to a sum of one.

    `None` if that is not possible, or if they hardly differ from those of the solution.
    """
    weights = np.array(tableau.b_sol - tableau.b_error)
    weights[np.max(np.flatnonzero(tableau.b_sol)) + 1 :] = 0
    if abs(total := np.sum(weights)) < 0.1:
        return None
    weights = weights / total
    return weights if np.max(np.abs(weights - tableau.b_sol)) > 0.01 else None


def _outputs(y_bar: Y, dense_cotangent: DenseInfo | None) -> Y:
    """The cotangents of a `dense_info`, summed in magnitude."""
    if dense_cotangent is None:
        return sum_of_magnitudes(y_bar, [])
    inner = dense_cotangent["inner"]
    offsets = dense_cotangent["offset0"], dense_cotangent["offset1"]
    stages = jtu.tree_map(lambda k: jnp.sum(jnp.abs(k), axis=0), inner["k"])
    return sum_of_magnitudes(y_bar, [inner["y0"], inner["y1"], *offsets, stages])


def _combine(weights: Any, stages: list[Y]) -> Y:
    """The sum of stages with these weights."""
    total = tree_zeros_like(stages[0])
    for weight, stage in zip(weights, stages, strict=True):
        total = total if weight == 0 else tree_axpy(float(weight), stage, total)
    return total
