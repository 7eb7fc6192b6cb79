"""Asynchronous leapfrog and its compositions."""

from typing import ClassVar, NamedTuple, TYPE_CHECKING

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import Array

from .._coefficients.alf import alf2, alf4, alf6, alf8
from .._coefficients.tableau import ALFTableau
from .._custom_types import (
    Args,
    Bind,
    BoolScalarLike,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    VF,
    Y,
)
from .._tree import largest, tree_add, tree_axpy, tree_scale
from .base import AbstractReversibleSolver, Cotangent
from .deviation import Deviation, DeviationWatch, watch_weights
from .exact_sum import LowPart, Sum
from .interpolation import HermiteInterpolation
from .ode_term import as_ode_term


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class _SubStep(NamedTuple):
    """One sub-step's share of the tableau; stacked along the first axis for a step."""

    length: Array
    midpoint: Array
    # The weight of the evaluation in each of the linear functionals of a step, and in
    # those that watch the deviation.
    weights: dict[str, Array]
    watch: Array | None


class ALFState(eqx.Module):
    """Solver state: `v`, what is known of its deviation, the low parts of `z` and `v` if
    sub-steps are compensated, and whether `v` was evaluated where the state is.

    Of a cotangent, all but `v` is `None`.
    """

    v: VF
    deviation: Deviation | None
    low: tuple[LowPart, LowPart] | None
    fresh: BoolScalarLike | None


class AbstractALF(AbstractReversibleSolver[ALFState], AbstractAdaptiveSolver[ALFState]):
    """Compositions of asynchronous-leapfrog sub-steps, for ODEs.

    The solver state holds `v`, a second approximation to the vector field `f(t, y)`, of
    the structure of the state. With it, a step is a chain of sub-steps

        k = z + h/2 v,    u = f(t + h/2, k),    v' = 2u - v,    z' = k + h/2 v'

    each of which is undone by one evaluation of `f` at the same point `k`. The same
    evaluation serves to pull cotangents back:

        v̄ <- v̄' + h/2 z̄',  k̄ = z̄' + (∂f/∂z)ᵀ 2v̄,  θ̄ += (∂f/∂θ)ᵀ 2v̄,  z̄ = k̄,  v̄ <- h/2 k̄ - v̄

    so that the backward pass costs one evaluation and one pull-back a sub-step.
    """

    tableau: AbstractVar[ALFTableau]
    compensated: AbstractVar[bool]
    bitwise: AbstractVar[bool]

    # Which terms these may be, `as_ode_term` checks.
    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar = HermiteInterpolation

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
        _check_state(self, y0)
        # Checkpointed, as otherwise a gradient would hold on to the activations of this
        # evaluation for the length of the solve.
        v = eqx.filter_checkpoint(self._field)(term, t0, y0, args)
        low = None
        if self.compensated or self.bitwise:
            first_increment = largest(tree_scale(term.contr(t0, t1), v))
            y_scale = jtu.tree_map(jnp.maximum, largest(y0), first_increment)
            low = LowPart.start(y0, y_scale), LowPart.start(v, largest(v))
        return ALFState(v, self._no_deviation(v), low, jnp.array(True))

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
        weights = watch_weights(self.tableau)

        def sub_step(carry, sub: _SubStep):
            z, v, sums, watch = carry
            half = control * sub.length / 2
            k = z.plus(tree_scale(half, v.high))
            u = self._field(term, t0 + sub.midpoint * (t1 - t0), k.high, args)
            new_v = v.reflect(u)
            z = k.plus(tree_scale(half, new_v.high))
            sums = {n: tree_axpy(sub.weights[n], u, total) for n, total in sums.items()}
            watch = None if watch is None else watch.add(sub.watch, u)
            return z, new_v, sums, watch

        functionals = self._functionals()
        sums = {name: tree_scale(w[0], v0) for name, w in functionals.items()}
        watch = None
        if weights is not None:
            watch = DeviationWatch.start(weights[0], v0)
        carry = (*_sums(y0, solver_state), sums, watch)
        z, v, sums, watch = self._chain(sub_step, carry, functionals, t0, weights)
        y1, v1, low = _split(z, v)
        # Diffrax's `PIDController` gets over NaN, but not over an infinite state, by which
        # it divides the error.
        y1 = jtu.tree_map(lambda y: jnp.where(jnp.isinf(y), jnp.nan, y), y1)
        sums = {name: tree_scale(control, total) for name, total in sums.items()}
        y_error = sums.pop("error")
        deviation = solver_state.deviation
        if watch is not None and deviation is not None:
            deviation = watch.judge(self.tableau, control, y1, v1, deviation)
        k0, k1 = tree_scale(control, v0), tree_scale(control, v1)
        dense_info = dict(y0=y0, y1=y1, k0=k0, k1=k1, **sums)
        solver_state = ALFState(v1, deviation, low, jnp.array(False))
        return y1, y_error, dense_info, solver_state, RESULTS.successful

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
        return ALFState(v, self._no_deviation(v), low, jnp.array(True))

    def cross_jump(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[ALFState, BoolScalarLike]:
        """`v <- v - f(t0, y) + f(t1, y)`, unless it was evaluated at `t1`.

        The deviation of `v` is carried over, and so is its order.
        """
        term = as_ode_term(self, terms)
        z, v = _sums(y, solver_state)
        v = v.minus(self._field(term, t0, y, args)).plus(self._field(term, t1, y, args))
        _, v, low = _split(z, v)
        crossed = ALFState(v, solver_state.deviation, low, solver_state.fresh)
        assert solver_state.fresh is not None
        return crossed, jnp.logical_not(solver_state.fresh)

    def error_scales(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        solver_state: ALFState,
    ) -> tuple[Y, ALFState]:
        """Of `y` no less than what the step adds to it, and of `v` no less than what moves
        `y` as far as its size in the length of the solve: a solve may start at zero, or at
        rest."""
        v_scale = largest(solver_state.v)
        step = jnp.abs(as_ode_term(self, terms).contr(t0, t1))
        y_scale = jtu.tree_map(jnp.maximum, largest(y0), tree_scale(step, v_scale))
        v_scale = jtu.tree_map(
            lambda v, y: jnp.maximum(v, y / jnp.asarray(jnp.abs(length), y.dtype)),
            v_scale,
            y_scale,
        )
        return y_scale, ALFState(v_scale, None, None, None)

    def inverse_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[Y, ALFState]:
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)

        def sub_step(carry, sub: _SubStep):
            z, v = carry
            half = control * sub.length / 2
            k = z.minus(tree_scale(half, v.high))
            u = self._field(term, t0 + sub.midpoint * (t1 - t0), k.high, args)
            v = v.reflect(u)
            return k.minus(tree_scale(half, v.high)), v

        carry = _sums(y1, solver_state)
        z, v = self._chain(sub_step, carry, {}, t0, reverse=True)
        y0, v0, low = _split(z, v)
        return y0, ALFState(v0, solver_state.deviation, low, jnp.array(False))

    def inverse_step_and_pullback(
        self,
        bind: Bind,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: ALFState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, ALFState, Cotangent]:
        control = as_ode_term(self, bind(params)[0]).contr(t0, t1)
        start, functionals, sums_cotangent = None, {}, {}
        if dense_cotangent is not None:
            start, end, sums_cotangent = _split_dense(dense_cotangent, control)
            cotangent = _add_state(cotangent, *end)
            functionals = {name: self._functionals()[name] for name in sums_cotangent}
            assert all(w[0] == 0 for w in functionals.values())

        def sub_step(carry, sub: _SubStep):
            z, v, (z_bar, v_bar, params_bar) = carry
            half = control * sub.length / 2
            k = z.minus(tree_scale(half, v.high))
            t = t0 + sub.midpoint * (t1 - t0)
            u, pull = self._linearise_field(bind, t, k.high, params)
            v = v.reflect(u)
            z = k.minus(tree_scale(half, v.high))
            v_bar = tree_axpy(half, z_bar, v_bar)
            u_bar = tree_scale(2, v_bar)
            for name, weight in sub.weights.items():
                u_bar = tree_axpy(weight, sums_cotangent[name], u_bar)
            k_bar, more_params_bar = pull(u_bar)
            z_bar = tree_add(z_bar, k_bar)
            v_bar = jtu.tree_map(jnp.subtract, tree_scale(half, z_bar), v_bar)
            return z, v, (z_bar, v_bar, tree_add(params_bar, more_params_bar))

        bars = (cotangent.y, cotangent.solver_state.v, cotangent.params)
        carry = (*_sums(y1, solver_state), bars)
        z, v, bars = self._chain(sub_step, carry, functionals, t0, reverse=True)
        y0, v0, low = _split(z, v)
        z_bar, v_bar, params_bar = bars
        cotangent = Cotangent(z_bar, _with_v(cotangent.solver_state, v_bar), params_bar)
        if start is not None:
            cotangent = _add_state(cotangent, *start)
        solver_state = ALFState(v0, solver_state.deviation, low, jnp.array(False))
        return y0, solver_state, cotangent

    def _field(self, term: AbstractTerm, t: RealScalarLike, y: Y, args: Args) -> VF:
        """The vector field, and if `bitwise` then in a computation of its own.

        That is a branch of a conditional of which the compiler does not know that it is
        always taken. It cannot mix it with what stands around, which in the walk back is
        something else, and so it rounds alike.
        """
        if not self.bitwise:
            return term.vf(t, y, args)
        # The same for all elements of a batch, or both branches would be evaluated.
        always = eqxi.unvmap_any(t == t)
        return lax.cond(
            always, lambda y: term.vf(t, y, args), lambda y: tree_scale(jnp.nan, y), y
        )

    def _linearise_field(self, bind: Bind, t: RealScalarLike, k: Y, params: Params):
        """The vector field at `(t, k)` and its pull-back.

        From one evaluation, but if `bitwise` from two.
        """

        def field(k, params):
            terms, args = bind(params)
            return as_ode_term(self, terms).vf(t, k, args)

        u, pull = jax.vjp(field, k, params)
        if self.bitwise:
            terms, args = bind(params)
            u = self._field(as_ode_term(self, terms), t, k, args)
        return u, pull

    def _no_deviation(self, v: VF) -> Deviation | None:
        """As just after a restart. `None` if it cannot be told."""
        return None if watch_weights(self.tableau) is None else Deviation.none(v)

    def _functionals(self) -> dict[str, np.ndarray]:
        """Weights of `u_0 = v_0, u_1, ..., u_s` in what a step returns besides `(z, v)`."""
        functionals = {"error": self.tableau.error_weights}
        if self.tableau.midpoint_weights is not None:
            functionals["y_mid"], functionals["k_mid"] = self.tableau.midpoint_weights
        return functionals

    def _chain(
        self, sub_step, carry, functionals, t0, watch_weights=None, reverse: bool = False
    ):
        """Scan `sub_step` over the sub-steps (compiles faster than unrolling them)."""
        dtype = jnp.result_type(t0)
        sub_steps = _SubStep(
            jnp.asarray(self.tableau.sub_steps, dtype),
            jnp.asarray(self.tableau.midpoints, dtype),
            {name: jnp.asarray(w[1:], dtype) for name, w in functionals.items()},
            None if watch_weights is None else jnp.asarray(watch_weights[1:], dtype),
        )
        if self.tableau.stages == 1:
            return sub_step(carry, jtu.tree_map(lambda x: x[0], sub_steps))
        carry, _ = lax.scan(
            lambda carry, sub: (sub_step(carry, sub), None),
            carry,
            sub_steps,
            reverse=reverse,
        )
        return carry


def _sums(y: Y, solver_state: ALFState) -> tuple[Sum, Sum]:
    """`z` and `v`, as they are added to."""
    low_y, low_v = (None, None) if solver_state.low is None else solver_state.low
    return LowPart.join(y, low_y), LowPart.join(solver_state.v, low_v)


def _split(z: Sum, v: Sum) -> tuple[Y, VF, tuple[LowPart, LowPart] | None]:
    """The state, and what of the solver state is made of `z` and `v`."""
    (y, low_y), (v_high, low_v) = LowPart.split(z), LowPart.split(v)
    low = None if low_y is None or low_v is None else (low_y, low_v)
    return y, v_high, low


def _with_v(state: ALFState, v: VF) -> ALFState:
    return ALFState(v, state.deviation, state.low, state.fresh)


def _split_dense(dense_cotangent: DenseInfo, control: RealScalarLike):
    """Cotangents of `(y0, v0)`, of `(y1, v1)` and of the sums `Σ w_i u_i`."""
    ct = dict(dense_cotangent)
    start = ct.pop("y0"), tree_scale(control, ct.pop("k0"))
    end = ct.pop("y1"), tree_scale(control, ct.pop("k1"))
    return start, end, {name: tree_scale(control, leaf) for name, leaf in ct.items()}


def _add_state(cotangent: Cotangent, y: Y, v: VF) -> Cotangent:
    return Cotangent(
        tree_add(cotangent.y, y),
        _with_v(cotangent.solver_state, tree_add(cotangent.solver_state.v, v)),
        cotangent.params,
    )


def _check_state(solver: AbstractALF, y0: Y) -> None:
    for leaf in jtu.tree_leaves(y0):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"`diffeqsolve(..., solver={type(solver).__name__}(), y0=...)` needs a "
                f"state of real floating-point arrays, got {jnp.result_type(leaf)}. "
                "Split complex states into their real and imaginary parts."
            )


class ALF2(AbstractALF):
    """Asynchronous leapfrog.

    Order 2, embedded order 1, one evaluation a step (and one at the start), cubic Hermite
    interpolation of order 2.

    Algebraically reversible: a step is undone by one evaluation, up to rounding. The
    price is the second half of the state, `v`, of which the deviation from the vector
    field grows where the flow contracts. With a single sub-step it cannot be told from the
    local error, so that this solver does not restart as the others do: avoid it on
    dissipative problems.

    ??? cite "Reference"

        Mutze (2013), arXiv:1311.6602; Zhuang, Dvornek, Tatikonda & Duncan (2021), *MALI*,
        arXiv:2102.04668.
    """

    tableau: ClassVar[ALFTableau] = alf2
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF4(AbstractALF):
    """Fourth-order composition of asynchronous leapfrog.

    Order 4, embedded order 3, five evaluations a step (and one at the start), cubic
    Hermite interpolation of order 4. The one to start with at the tolerances of machine
    learning, 1e-3 to 1e-6.

    Algebraically reversible: a step is undone by five evaluations, up to rounding. Where
    the flow contracts, the deviation of `v` from the vector field grows, and `v` is
    restarted, at one evaluation, before it matters: about once for every `λ T = 10`.

    ??? cite "Reference"

        McLachlan & Atela (1992), doi:10.1088/0951-7715/5/2/011, for the splitting method
        that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf4
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF6(AbstractALF):
    """Sixth-order composition of asynchronous leapfrog.

    Order 6, embedded order 5, twenty evaluations a step (and one at the start), quintic
    interpolation of order 5. For tolerances of 1e-6 and below, and for long integrations.

    Algebraically reversible: a step is undone by twenty evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, method S10 of order 6,
        for the splitting method that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf6
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF8(AbstractALF):
    """Eighth-order composition of asynchronous leapfrog.

    Order 8, embedded order 7, thirty-four evaluations a step (and one at the start),
    quintic interpolation of order 6. For tolerances of 1e-10 and below.

    Algebraically reversible: a step is undone by thirty-four evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does.

    ??? cite "Reference"

        Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9, composition of 17 stages, on
        pairs of sub-steps.
    """

    tableau: ClassVar[ALFTableau] = alf8
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF(AbstractALF):
    """Asynchronous leapfrog composed with coefficients of your own.

    As [`diffrax_reversible.ALF4`][], with the order, embedded order, evaluations and
    interpolation of the tableau.
    """

    tableau: ALFTableau = eqx.field(static=True)
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


_rounding = """\
- `compensated`: whether sums are carried with twice the precision, and do not round. The
    walk back then differs from the forward pass by no more than the vector field does
    when it is evaluated again. For single precision, long solves, and chaotic ones.
    Costs the memory of up to five more states, seven where steps are rejected, and about
    forty operations for each entry of the state in a sub-step.
- `bitwise`: as `compensated`, and whether the vector field is compiled by itself, so that
    the walk back gives every state to the last bit. Costs one more evaluation a sub-step
    in the backward pass. Entries that are smaller than `2^(-3p/4)` of the largest of their
    array where the solve began, with `p` bits of precision, may differ by `2^(-7p/4)` of
    it; and states must not outgrow it by `2^(p/4 - 2)` (by 2,000 in float64, by 16 in
    float32), as then sums round after all.
"""

for _cls in (ALF2, ALF4, ALF6, ALF8):
    _cls.__init__.__doc__ = f"""**Arguments:**

{_rounding}"""

ALF.__init__.__doc__ = f"""**Arguments:**

- `tableau`: an [`diffrax_reversible.ALFTableau`][], which checks its coefficients.
{_rounding}"""
