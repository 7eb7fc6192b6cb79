"""Compositions of asynchronous leapfrog, with any coefficients."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple, TYPE_CHECKING

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import Array

from .._coefficients.tableau import ALFTableau
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
from .._exact_sum import LowPart
from .._isolated import isolated
from .._tree import (
    larger,
    largest,
    read_row,
    sum_of_magnitudes,
    tree_add,
    tree_axpy,
    tree_outer,
    tree_scale,
    tree_zeros_like,
)
from .alf_state import add_to_state, ALFState, split_sums, sums_of, with_v
from .base import check_flags
from .capabilities import (
    CanCrossJumps,
    CanRestart,
    HasErrorScales,
    HasExtraDenseInfo,
)
from .chain import Chain, run, undo, Update
from .chain_pullback import Pulled, undo_and_pull
from .deviation import Deviation, has_third_estimate
from .error_estimate import combine_errors, raise_error
from .interpolation import MakeInterpolation, with_slopes
from .ode_term import as_ode_term
from .pullback import (
    Cotangent,
    Departure,
    HasProbe,
    HasPullbackFromStart,
    Probe,
    StepStart,
)


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class _SubStep(NamedTuple):
    """The coefficients of one sub-step; stacked along the first axis for a step."""

    # From the last evaluation, or the start of the step, to this evaluation.
    drift: Array
    midpoint: Array
    # The weights of the evaluation in the linear functionals of a step.
    weights: dict[str, Array]


class AbstractALF(
    CanRestart[ALFState],
    CanCrossJumps[ALFState],
    HasExtraDenseInfo[ALFState],
    HasErrorScales[ALFState],
    HasPullbackFromStart[ALFState],
    HasProbe[ALFState],
    AbstractAdaptiveSolver[ALFState],
):
    """Compositions of asynchronous-leapfrog sub-steps, for ODEs.

    The solver state holds `v`, a second approximation to the vector field `f(t, y)`, with
    the structure of the state. A step is a chain of sub-steps

        k = z + h/2 v,    u = f(t + h/2, k),    v' = 2u - v,    z' = k + h/2 v'

    The second drift of a sub-step is merged with the first of the next, which leaves two
    updates per sub-step:

        k <- k + d v,    u = f(t, k),    v <- 2u - v

    where `d` leads from one evaluation to the next. A sub-step is undone by one evaluation
    of `f` at the same point `k`, which also pulls cotangents back,

        k̄ <- k̄ + (∂f/∂k)ᵀ 2v̄,    θ̄ <- θ̄ + (∂f/∂θ)ᵀ 2v̄,    v̄ <- d k̄ - v̄

    so the backward pass costs one evaluation and one pull-back per sub-step.
    """

    tableau: AbstractVar[ALFTableau]
    compensated: AbstractVar[bool]
    bitwise: AbstractVar[bool]

    def __check_init__(self):
        check_flags(self, "compensated", "bitwise")

    # `as_ode_term` checks which terms are supported.
    term_structure: ClassVar = AbstractTerm

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return MakeInterpolation(self.tableau)

    def order(self, terms: Terms) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Terms) -> int:
        del terms
        assert self.tableau.embedded_order is not None
        return self.tableau.embedded_order + 1

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> ALFState:
        term = as_ode_term(self, terms)
        v = self._field(term, t0, y0, args)
        low = None
        if self.compensated or self.bitwise:
            first_increment = largest(tree_scale(term.contr(t0, t1), v))
            y_scale = jtu.tree_map(jnp.maximum, largest(y0), first_increment)
            low = LowPart.start(y0, y_scale), LowPart.start(v, largest(v))
        return ALFState(v, self._start_watch(y0, v), low, jnp.array(True))

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return as_ode_term(self, terms).vf(t0, y0, args)

    def advance(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[Y, Y, DenseInfo, ALFState, RESULTS]:
        v0 = solver_state.v
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)

        def collect(sums, sub: _SubStep, evaluated):
            _, (u, _) = evaluated
            return {
                name: tree_add(total, tree_outer(sub.weights[name], u))
                for name, total in sums.items()
            }

        functionals = self._functionals()
        sums = {name: tree_outer(w[0], v0) for name, w in functionals.items()}
        chain = self._chain(control, t0, t1, functionals)
        parts = sums_of(y0, solver_state)
        (k, v), sums = run(chain, terms, args, parts, sums, collect)
        z = k.plus(tree_scale(control * float(self.tableau.drifts[-1]), v.high))
        y1, v1, low = split_sums(z, v)
        # `PIDController` rejects a NaN step but not an infinite one (inf/inf), so map inf
        # to NaN.
        y1 = jtu.tree_map(lambda y: jnp.where(jnp.isinf(y), jnp.nan, y), y1)
        k0, k1 = tree_scale(control, v0), tree_scale(control, v1)
        step = control, y1, k0, k1
        y_error, deviation = self._judge(*step, sums["errors"], solver_state)
        inner = tree_scale(control, sums.get("inner", []))
        inner = _rows(inner, len(self.tableau.continuous_extension.weights))
        dense_info = dict(y0=y0, y1=y1, inner=inner)
        if not self._evaluates_slopes:
            dense_info |= dict(k0=k0, k1=k1)
        solver_state = ALFState(v1, deviation, low, jnp.array(False))
        return y1, y_error, dense_info, solver_state, RESULTS.successful

    def _judge(
        self,
        control: RealScalarLike,
        y1: Y,
        k0: Y,
        k1: Y,
        sums: VF,
        solver_state: ALFState,
    ) -> tuple[Y, Deviation | None]:
        """The error estimate of a step, and the known facts about the deviation after it,
        from the `sums` of its evaluations."""
        names = self._error_functionals()
        errors = dict(zip(names, _rows(sums, len(names)), strict=True))
        y_error = tree_scale(control, errors["fine"])
        if "coarse" in errors:
            coarse = tree_scale(control, errors["coarse"])
            y_error = jtu.tree_map(combine_errors, y_error, coarse, k0, k1)
        if (deviation := solver_state.deviation) is None:
            return y_error, None
        assert solver_state.evaluated is not None
        step = control, solver_state.evaluated, y1, errors["fine"], errors["deviation"]
        deviation, excess = deviation.after_step(self.tableau, *step)
        if has_third_estimate(self.tableau):
            y_error = jtu.tree_map(raise_error, y_error, excess)
        return y_error, deviation

    def extra_dense_info(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
        dense_info: DenseInfo,
    ) -> DenseInfo:
        """The derivatives that the interpolation uses, evaluated rather than taken from
        `v`, whose deviation may be larger than all errors."""
        if not self._evaluates_slopes:
            return {}
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)

        def slope(t, y):
            return tree_scale(control, self._field(term, t, y, args))

        y0, inner = dense_info["y0"], dense_info["inner"]
        slopes = dict(k0=slope(t0, y0), k1=slope(t1, dense_info["y1"]))
        extension = self.tableau.continuous_extension
        if extension.evaluates_midpoint:
            middle = self._midpoint
            weights = extension.slope_weights[middle]
            y_mid = tree_add(y0, with_slopes(inner[middle], weights, slopes))
            slopes["k_mid"] = slope(t0 + (t1 - t0) / 2, y_mid)
        return slopes

    def needs_restart(self, solver_state: ALFState) -> BoolScalarLike:
        if solver_state.deviation is None:
            return False
        return solver_state.deviation.restart

    def restart(
        self,
        terms: AbstractTerm,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: ALFState,
    ) -> ALFState:
        v = self._field(as_ode_term(self, terms), t, y, args)
        low = solver_state.low
        if low is not None:
            low = low[0], LowPart.start(v, largest(v))
        deviation = solver_state.deviation
        if deviation is not None:
            deviation = deviation.restarted(self.tableau, v)
        return ALFState(v, deviation, low, jnp.array(True))

    def cross_jump(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[ALFState, BoolScalarLike]:
        """`v <- v - f(t0, y) + f(t1, y)`, unless `v` was evaluated at `t1`.

        This preserves the deviation of `v`, and the order of the method.
        """
        term = as_ode_term(self, terms)
        z, v = sums_of(y, solver_state)
        v = v.minus(self._field(term, t0, y, args)).plus(self._field(term, t1, y, args))
        _, v, low = split_sums(z, v)
        deviation = solver_state.deviation
        if deviation is not None:
            deviation = deviation.across_jump(v)
        crossed = ALFState(v, deviation, low, solver_state.evaluated)
        assert solver_state.evaluated is not None
        return crossed, jnp.logical_not(solver_state.evaluated)

    def error_scales(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: ALFState,
        y_end: Y,
        solver_state_end: ALFState,
    ) -> tuple[Y, ALFState]:
        """The scale of `y` is at least the size of one step's update. The scale of `v` is
        at least the size that moves `y` by its own size within `length`. So a solve may
        start at zero, or at rest."""
        # The `v` at the end is not used, so that it need not stay in memory.
        del args, solver_state_end
        step = tree_scale(as_ode_term(self, terms).contr(t0, t1), solver_state.v)
        y_scale = jtu.tree_map(larger, y0, step, y_end)
        # XLA recomputes a product rather than keep it in memory.
        frequency = 1 / length
        v_scale = jtu.tree_map(
            lambda v, y: larger(v, y * jnp.asarray(frequency, y.dtype)),
            solver_state.v,
            y_scale,
        )
        return y_scale, ALFState(v_scale, None, None, None)

    def backward_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[Y, ALFState]:
        y0, solver_state, _ = self._walk_back(terms, t0, t1, y1, args, solver_state, {})
        return y0, solver_state

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
        (z, v), sums = undo(chain, terms, args, (k, v), zeros, _add_weighted)
        y0, v0, low = split_sums(z, v)
        sums = tree_scale(control, sums)
        return y0, ALFState(v0, solver_state.deviation, low, jnp.array(False)), sums

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: ALFState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, ALFState, Cotangent, tuple[Y, ALFState]]:
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)
        dense, functionals, sums_cotangent = None, {}, {}
        outputs = _outputs(cotangent.y, dense_cotangent)
        if dense_cotangent is not None:
            step, functionals = (t0, t1, y1, solver_state), self._inner_functionals()
            dense, cotangent, sums_cotangent = self._pull_outputs(
                combine, params, control, step, cotangent, dense_cotangent, start
            )

        def sides_bar(sub: _SubStep):
            u_bar = tree_zeros_like(y1)
            for name, weight in sub.weights.items():
                u_bar = tree_axpy(weight, sums_cotangent[name], u_bar)
            return None, (u_bar, None)

        last_drift = control * float(self.tableau.drifts[-1])
        z, v = sums_of(y1, solver_state)
        k = z.minus(tree_scale(last_drift, v.high))
        v_bar = tree_axpy(last_drift, cotangent.y, cotangent.solver_state.v)
        chain = self._chain(control, t0, t1, functionals)
        pulled = undo_and_pull(
            chain,
            combine,
            params,
            (k, v),
            (cotangent.y, v_bar),
            cotangent.params,
            sides_bar if functionals else None,
            start and start.of_chain(sums_of),
        )
        y0, v0, low = split_sums(*pulled.parts)
        z_bar, v_bar = pulled.bars
        probe = None
        if self.tableau.deviation_weights is not None:
            side_bar = None
            if functionals:
                _, (side_bar, _) = sides_bar(read_row(chain.rows, 0))
            probe = self._probe_first(control, pulled, side_bar, outputs)
        state_bar = with_v(cotangent.solver_state, v_bar)
        cotangent = Cotangent(z_bar, state_bar, pulled.params_bar, probe)
        if dense is not None:
            cotangent = self._pull_end(
                combine, params, control, t0, y0, cotangent, dense["y0"], dense["k0"]
            )
        k_off, v_off = pulled.off
        z_off = tree_axpy(last_drift, v_off, k_off)
        solver_state = ALFState(v0, solver_state.deviation, low, jnp.array(False))
        return y0, solver_state, cotangent, (z_off, with_v(state_bar, v_off))

    def _pull_outputs(
        self,
        combine: Combine,
        params: Params,
        control: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        start: StepStart | None,
    ) -> tuple[DenseInfo, Cotangent, dict[str, VF]]:
        """Pull the `dense_info` of a step back through the evaluations at its mid-point and
        its end. Returns what is left of its cotangent, the cotangent at the end, and that
        of the sums of evaluations, by functional."""
        _, t1, y1, _ = step
        dense = dict(dense_cotangent)
        if "k_mid" in dense:
            dense, cotangent = self._pull_midpoint(
                combine, params, step, cotangent, dense, start
            )
        cotangent = self._pull_end(
            combine, params, control, t1, y1, cotangent, dense["y1"], dense["k1"]
        )
        functionals = self._inner_functionals()
        # `u_0` is not an evaluation of this step.
        assert all(w[0] == 0 for w in functionals.values())
        inner = zip(functionals, dense["inner"], strict=True)
        return dense, cotangent, {name: tree_scale(control, bar) for name, bar in inner}

    def _probe_first(
        self, control: RealScalarLike, pulled: Pulled, side_bar: VF | None, outputs: Y
    ) -> Probe:
        """The probe of the first sub-step, the last to be undone, where `side_bar` is the
        cotangent of its evaluation from the outputs between steps."""
        z_bar, v_bar = pulled.bars
        first_drift = control * float(self.tableau.drifts[0])
        # Before `v_bar` is reflected.
        vf_bar = tree_axpy(first_drift, z_bar, tree_scale(-1, v_bar))
        if side_bar is not None:
            vf_bar = tree_axpy(0.5, side_bar, vf_bar)
        _, passed = pulled.first
        assert passed is not None
        passed = tree_scale(0.5, passed[0])
        y_bar = jtu.tree_map(jnp.subtract, z_bar, passed)
        first = jtu.tree_map(_at_start, y_bar, z_bar, v_bar, vf_bar, passed)
        second = _per_unit_of(control, v_bar)
        return Probe(vf_bar, passed, control, y_bar, outputs, first, second)

    @property
    def departure(self) -> Departure | None:
        if self.tableau.deviation_weights is None:
            return None
        return Departure.of(self.tableau.departure, self.tableau.order + 1)

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
        """A probe by the cotangent of `v`. Costs an evaluation and a pull-back.

        `None` if the solver does not restart: reconstruction errors then show growth."""
        if self.tableau.deviation_weights is None:
            return None
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)
        pull = self._field_pullback(combine, t0, y0, params)
        v_bar = cotangent.solver_state.v
        pulled, _ = pull(v_bar)
        y_bar = tree_add(cotangent.y, pulled)
        return Probe(
            v_bar,
            pulled,
            control,
            y_bar,
            _outputs(cotangent.y, dense_cotangent),
            y_bar,
            _per_unit_of(control, v_bar),
        )

    def _pull_end(
        self,
        combine: Combine,
        params: Params,
        control: RealScalarLike,
        t: RealScalarLike,
        y: Y,
        cotangent: Cotangent,
        y_bar: Y,
        slope_bar: VF,
    ) -> Cotangent:
        """Pull the cotangents of the interpolation data at one end of the step back to the
        state there: of the solution, and of its derivative times the length of the step."""
        slope_bar = tree_scale(control, slope_bar)
        if not self._evaluates_slopes:
            return add_to_state(cotangent, y_bar, slope_bar)
        more_y_bar, params_bar = self._pull_field(combine, params, t, y, slope_bar)
        y_bar = tree_add(y_bar, more_y_bar)
        return Cotangent(
            tree_add(cotangent.y, y_bar),
            cotangent.solver_state,
            tree_add(cotangent.params, params_bar),
            cotangent.probe,
        )

    def _pull_midpoint(
        self,
        combine: Combine,
        params: Params,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        start: StepStart | None,
    ) -> tuple[DenseInfo, Cotangent]:
        """Pull the cotangent of the derivative at the mid-point back, if it is not zero.

        The state at the mid-point is known only once the step is undone, or made again from
        its `start`, which is done here just for that.
        """
        t0, t1, y1, _ = step
        ct = dict(dense_cotangent)
        slope_bar = ct.pop("k_mid")
        middle = self._midpoint
        weights = self.tableau.continuous_extension.slope_weights[middle]
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)

        def mid_point():
            terms, args = combine(params)
            name = list(self._inner_functionals())[middle]
            functional = {name: self._inner_functionals()[name]}
            chain = self._chain(control, t0, t1, functional)

            def undone():
                y0, _, sums = self._walk_back(terms, *step[:3], args, step[3], functional)
                return y0, sums[name]

            def made():
                assert start is not None
                y0, state0 = start.states()
                zeros = {name: tree_zeros_like(y1)}
                parts = sums_of(y0, state0)
                _, sums = run(chain, terms, args, parts, zeros, _add_weighted)
                return y0, tree_scale(control, sums[name])

            if start is None:
                y0, inner = undone()
            else:
                y0, inner = lax.cond(eqxi.unvmap_any(start.needs), made, undone)
            term, ends = as_ode_term(self, terms), dict(k0=(t0, y0), k1=(t1, y1))
            slopes = {
                name: tree_scale(control, self._field(term, t, y, args))
                for name, (t, y) in ends.items()
            }
            return tree_add(y0, with_slopes(inner, weights, slopes))

        slope_bar = tree_scale(control, slope_bar)
        y_bar, params_bar = self._pull_field(
            combine, params, t0 + (t1 - t0) / 2, mid_point, slope_bar
        )
        inner = list(ct["inner"])
        inner[middle] = tree_add(inner[middle], y_bar)
        ct |= dict(y0=tree_add(ct["y0"], y_bar), inner=inner)
        for name, weight in zip(("k0", "k1"), weights, strict=False):
            ct[name] = tree_axpy(float(weight), y_bar, ct[name])
        params_bar = tree_add(cotangent.params, params_bar)
        return ct, Cotangent(cotangent.y, cotangent.solver_state, params_bar)

    def _pull_field(
        self,
        combine: Combine,
        params: Params,
        t: RealScalarLike,
        y: Y | Callable[[], Y],
        vf_bar: VF,
    ) -> tuple[Y, Params]:
        """Pull the cotangent of the vector field at `(t, y)` back, if it is not zero."""

        def pull():
            point = y() if callable(y) else y
            pull = self._field_pullback(combine, t, point, params)
            return pull(vf_bar)

        some = sum(jnp.sum(leaf != 0) for leaf in jtu.tree_leaves(vf_bar))
        zeros = tree_zeros_like((vf_bar, params))
        return lax.cond(eqxi.unvmap_any(some != 0), pull, lambda: zeros)

    def _field(self, term: AbstractTerm, t: RealScalarLike, y: Y, args: Args) -> VF:
        """The vector field; if `bitwise`, it rounds alike wherever it is compiled."""
        if not self.bitwise:
            return term.vf(t, y, args)
        return isolated(lambda t, y: term.vf(t, y, args), t, y)

    def _field_pullback(self, combine: Combine, t: RealScalarLike, k: Y, params: Params):
        """The pull-back of the vector field at `(t, k)`."""

        def field(k, params):
            terms, args = combine(params)
            return as_ode_term(self, terms).vf(t, k, args)

        _, pull = jax.vjp(field, k, params)
        return pull

    def _start_watch(self, y: Y, v: VF) -> Deviation | None:
        """`None` if the deviation cannot be estimated."""
        if self.tableau.deviation_weights is None:
            return None
        return Deviation.start(self.tableau, y, v)

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

        def make_round(terms: AbstractTerm, args: Args, sub: _SubStep):
            term, t = as_ode_term(self, terms), t0 + sub.midpoint * (t1 - t0)
            evaluate = lambda k: (term.vf(t, k, args), None)
            alike = lambda k: (self._field(term, t, k, args), None)
            drift = Update(0, None, factor=control * sub.drift)
            alike = alike if self.bitwise else None
            return drift, Update(1, evaluate, scale=-1, factor=2, alike=alike)

        dtype = jnp.result_type(t0)
        sub_steps = _SubStep(
            jnp.asarray(self.tableau.drifts[:-1], dtype),
            jnp.asarray(self.tableau.midpoints, dtype),
            {name: jnp.asarray(w[1:], dtype) for name, w in functionals.items()},
        )
        return Chain(make_round, sub_steps)


def _outputs(y_bar: Y, dense_cotangent: DenseInfo | None) -> Y:
    """The cotangents of a `dense_info`, summed in magnitude."""
    ends = dict(dense_cotangent or {})
    inner = ends.pop("inner", [])
    return sum_of_magnitudes(y_bar, [*ends.values(), *inner])


def _at_start(
    there: Array, z_bar: Array, v_bar: Array, vf_bar: Array, pulled: Array
) -> Array:
    """The cotangent of the state at the start of a step, if `v` is evaluated there, from
    the one `there`, at the first stage, if `v` is evaluated there.

    They differ little, unless the cotangent of `v` prevails, as it does where the flow
    contracts. Entries that consist of one mode show its `λ`, and hence the one looked for.
    """
    ratio = pulled / jnp.where(vf_bar == 0, 1, vf_bar)
    here = z_bar + ratio * v_bar
    contracts = jnp.real(pulled * jnp.conj(vf_bar)) < 0
    return jnp.where(contracts & (jnp.abs(here) < jnp.abs(there)), here, there)


def _per_unit_of(control: RealScalarLike, v_bar: VF) -> VF:
    """The cotangent of `v` as one of `v` times the length of the step."""
    return tree_scale(1 / jnp.where(control == 0, jnp.inf, control), v_bar)


def _add_weighted(
    sums: dict[str, VF], sub: _SubStep, evaluated: list[tuple[VF, None]]
) -> dict[str, VF]:
    """The sums of evaluations, with another sub-step."""
    _, (u, _) = evaluated
    return {name: tree_axpy(sub.weights[name], u, total) for name, total in sums.items()}


def _rows(x: VF, count: int) -> list[VF]:
    """Split `x`, whose arrays have `count` rows, along the first axis."""
    return [jtu.tree_map(lambda x, i=i: x[i], x) for i in range(count)]
