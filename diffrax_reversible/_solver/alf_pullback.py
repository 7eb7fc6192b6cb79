"""The pull-back of compositions of asynchronous leapfrog."""

import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._custom_types import (
    Args,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    VF,
    Y,
)
from .._tree import (
    read_row,
    sum_of_magnitudes,
    tree_add,
    tree_axpy,
    tree_scale,
    tree_select,
    tree_zeros_like,
)
from .alf_chain import AbstractALFChain, add_weighted, SubStep
from .alf_state import add_to_state, ALFState, split_sums, sums_of, with_v
from .chain import Chain, run
from .chain_pullback import Pulled, undo_and_pull
from .interpolation import with_slopes
from .ode_term import as_ode_term
from .pullback import (
    Cotangent,
    Departure,
    HasProbe,
    HasPullbackFromStart,
    Probe,
    StepStart,
)


class AbstractALFPullback(
    AbstractALFChain, HasPullbackFromStart[ALFState], HasProbe[ALFState]
):
    """Pulls cotangents back through the steps of an `AbstractALF` as it undoes them."""

    differentiates_control: ClassVar[bool] = False

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
        sides_bar = ft.partial(_sides_bar, sums_cotangent) if functionals else None
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
            sides_bar,
            start and start.of_chain(sums_of),
        )
        y0, v0, low = split_sums(*pulled.parts)
        z_bar, v_bar = pulled.bars
        probe = self._probe_first(control, chain, pulled, sides_bar, outputs)
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
        """Pull the cotangent of the derivative at the mid-point back, if it is not zero."""
        t0, t1, y1, _ = step
        ct = dict(dense_cotangent)
        slope_bar = ct.pop("k_mid")
        middle = self._midpoint
        weights = self.tableau.continuous_extension.slope_weights[middle]
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)

        def mid_point():
            terms, args = combine(params)
            y0, inner = self._sum_to_midpoint(terms, args, control, step, start)
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

    def _sum_to_midpoint(
        self,
        terms: Terms,
        args: Args,
        control: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        start: StepStart | None,
    ) -> tuple[Y, VF]:
        """The state at the start of a step, and the weighted sum of evaluations from there
        to the mid-point.

        They are known only once the step is undone, or made again from its `start`, which
        is done here just for that.
        """
        t0, t1, y1, solver_state = step
        name = list(self._inner_functionals())[self._midpoint]
        functional = {name: self._inner_functionals()[name]}

        def undone():
            y0, _, sums = self._walk_back(terms, t0, t1, y1, args, solver_state, functional)
            return y0, sums[name]

        def made():
            assert start is not None
            y0, state0 = start.states()
            chain = self._chain(control, t0, t1, functional)
            zeros = {name: tree_zeros_like(y1)}
            _, sums = run(chain, terms, args, sums_of(y0, state0), zeros, add_weighted)
            return y0, tree_scale(control, sums[name])

        if start is None:
            return undone()
        either = lambda: tree_select(start.needs, made(), undone())
        return lax.cond(eqxi.unvmap_any(start.needs), either, undone)

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

    def _field_pullback(self, combine: Combine, t: RealScalarLike, k: Y, params: Params):
        """The pull-back of the vector field at `(t, k)`."""

        def field(k, params):
            terms, args = combine(params)
            return as_ode_term(self, terms).vf(t, k, args)

        _, pull = jax.vjp(field, k, params)
        return pull

    def _probe_first(
        self,
        control: RealScalarLike,
        chain: Chain,
        pulled: Pulled,
        sides_bar: Callable[[SubStep], Any] | None,
        outputs: Y,
    ) -> Probe | None:
        """The probe of the first sub-step, the last to be undone, where `sides_bar` is as
        for `undo_and_pull`. See `probe`."""
        if self.tableau.deviation_weights is None:
            return None
        z_bar, v_bar = pulled.bars
        first_drift = control * float(self.tableau.drifts[0])
        # Before `v_bar` is reflected.
        vf_bar = tree_axpy(first_drift, z_bar, tree_scale(-1, v_bar))
        if sides_bar is not None:
            _, (side_bar, _) = sides_bar(read_row(chain.rows, 0))
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
        amplify = lambda z: np.abs(self.tableau.linear_response(z).solution)
        return Departure.of(self.tableau.departure, self.tableau.order + 1, amplify)

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


def _sides_bar(sums_cotangent: dict[str, VF], sub: SubStep) -> tuple[None, tuple[VF, None]]:
    """The cotangent of the evaluation of a sub-step, from those of the weighted sums of
    evaluations."""
    scaled = [tree_scale(w, sums_cotangent[name]) for name, w in sub.weights.items()]
    return None, (ft.reduce(tree_add, scaled), None)


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
