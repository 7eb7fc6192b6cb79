"""Compositions of asynchronous leapfrog, with any coefficients."""

from typing import ClassVar

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS

from .._branches import may_be_singular, may_branch
from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Terms, VF, Y
from .._exact_sum import LowPart
from .._precision import as_floats, eps
from .._tree import larger, largest, tree_add, tree_outer, tree_scale
from .alf_chain import SubStep
from .alf_pullback import AbstractALFPullback
from .alf_state import ALFState, split_sums, sums_of
from .base import check_flags
from .capabilities import CanCrossJumps
from .chain import run
from .deviation import Deviation
from .error_estimate import combine_errors, nan_if_infinite, raise_error
from .error_scales import HasErrorScales
from .interpolation import MakeInterpolation, with_slopes
from .interrupted_solver import CanRestart, HasExtraDenseInfo
from .ode_term import as_ode_term


# Both ends of a step, the time of a jump, and that of a stage are rounded: steps of so many
# floats do not tell where in them a jump is.
_floats = 4


class AbstractALF(
    AbstractALFPullback,
    CanRestart[ALFState],
    CanCrossJumps[ALFState],
    HasExtraDenseInfo[ALFState],
    HasErrorScales[ALFState],
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

        def collect(sums, sub: SubStep, evaluated):
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
        y1 = jtu.tree_map(nan_if_infinite, y1, y0)
        k0, k1 = tree_scale(control, v0), tree_scale(control, v1)
        step = control, _resolution(t0, t1), y1, v1, k0, k1
        missed = self._deviation_at_end(term, t1, y1, v1, args)
        y_error, deviation = self._judge(*step, sums["errors"], solver_state, missed)
        inner = tree_scale(control, sums.get("inner", []))
        inner = _rows(inner, len(self.tableau.continuous_extension.weights))
        dense_info = dict(y0=y0, y1=y1, inner=inner)
        if not self._evaluates_slopes:
            dense_info |= dict(k0=k0, k1=k1)
        solver_state = ALFState(v1, deviation, low, jnp.array(False))
        return y1, y_error, dense_info, solver_state, RESULTS.successful

    def _deviation_at_end(
        self, term: AbstractTerm, t1: RealScalarLike, y1: Y, v1: VF, args: Args
    ) -> VF | None:
        """The deviation of `v` at the end of a step, if the vector field may have jumps or
        kinks, or be singular in time. A jump after the last evaluation, at `midpoints[-1]`,
        shows only there; so does a singularity at the end of the solve."""
        if self.tableau.deviation_weights is None:
            return None
        field = lambda t, y: self._field(term, t, y, args)
        t = jnp.asarray(t1)
        if not (may_branch(field, t, y1) or may_be_singular(lambda t: field(t, y1), t)):
            return None
        return jtu.tree_map(jnp.subtract, v1, field(t1, y1))

    def _judge(
        self,
        control: RealScalarLike,
        resolution: RealScalarLike,
        y1: Y,
        v1: VF,
        k0: Y,
        k1: Y,
        sums: VF,
        solver_state: ALFState,
        missed: VF | None,
    ) -> tuple[Y, Deviation | None]:
        """The error estimate of a step, and the known facts about the deviation after it,
        from the `sums` of its evaluations, and from the deviation `missed` by these."""
        names = self._error_functionals()
        errors = dict(zip(names, _rows(sums, len(names)), strict=True))
        y_error = tree_scale(control, errors["fine"])
        if "coarse" in errors:
            coarse = tree_scale(control, errors["coarse"])
            y_error = jtu.tree_map(combine_errors, y_error, coarse, k0, k1)
        if (deviation := solver_state.deviation) is None:
            return y_error, None
        assert solver_state.evaluated is not None
        step = control, resolution, solver_state.evaluated
        step = *step, y1, v1, errors["fine"], errors["deviation"]
        deviation, excess = deviation.after_step(self.tableau, *step, missed)
        if excess is not None:
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

    def _start_watch(self, y: Y, v: VF) -> Deviation | None:
        """`None` if the deviation cannot be estimated."""
        if self.tableau.deviation_weights is None:
            return None
        return Deviation.start(self.tableau, y, v)


def _resolution(t0: RealScalarLike, t1: RealScalarLike) -> RealScalarLike:
    """The length of a step of a few floats."""
    t0, t1 = as_floats(t0, t1)
    t = jnp.maximum(jnp.abs(t0), jnp.abs(t1))
    return lax.stop_gradient(_floats * eps(t) * t)


def _rows(x: VF, count: int) -> list[VF]:
    """Split `x`, whose arrays have `count` rows, along the first axis."""
    return [jtu.tree_map(lambda x, i=i: x[i], x) for i in range(count)]
