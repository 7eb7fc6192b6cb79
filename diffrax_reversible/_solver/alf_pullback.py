"""The pull-back of compositions of asynchronous leapfrog."""

import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractTerm
from jaxtyping import Array

from .._custom_types import Args, Combine, DenseInfo, Params, RealScalarLike, VF, Y
from .._tree import read_row, sum_of_magnitudes, tree_add, tree_axpy, tree_scale
from .alf_chain import SubStep
from .alf_dense_pullback import AbstractALFDensePullback
from .alf_state import ALFState, split_sums, sums_of, with_v
from .chain import Chain
from .chain_pullback import Pulled, undo_and_pull
from .cotangent import Cotangent, Probe
from .ode_term import as_ode_term
from .probe import Departure, HasProbe
from .pullback import HasPullbackFromStart, StepStart


class AbstractALFPullback(
    AbstractALFDensePullback, HasPullbackFromStart[ALFState], HasProbe[ALFState]
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

    def slope(
        self,
        terms: AbstractTerm,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: ALFState,
    ) -> VF:
        del terms, t, y, args
        return solver_state.v

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
