"""The pull-back of a step that couples two copies of the state."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._custom_types import Combine, DenseInfo, Params, RealScalarLike, Y
from .._tree import sum_of_magnitudes, tree_add, tree_scale, tree_zeros_like
from .chain import as_sums, as_trees
from .chain_pullback import Pulled, undo_and_pull
from .cotangent import Cotangent, Probe
from .coupled_state import copy_is_lost, CoupledState, with_copy
from .mccallum_foster_chain import AbstractMcCallumFosterChain
from .ode_term import as_ode_term
from .probe import Departure, HasProbe
from .pullback import HasPullbackFromStart, StepStart
from .runge_kutta import stability_function


class AbstractMcCallumFosterPullback(
    AbstractMcCallumFosterChain,
    HasPullbackFromStart[CoupledState],
    HasProbe[CoupledState],
):
    """Pulls cotangents back through the steps of a `McCallumFoster` as it undoes them."""

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
        amplify = ft.partial(stability_function, self._tableau)
        distance = amplify(2.0) * amplify(-2.0) - 1
        power = (self.solver.order(None) or 1) + 1
        return Departure.of(distance, power, np.vectorize(amplify))

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


def _outputs(y_bar: Y, dense_cotangent: DenseInfo | None) -> Y:
    """The cotangents of a `dense_info`, summed in magnitude."""
    if dense_cotangent is None:
        return sum_of_magnitudes(y_bar, [])
    inner = dense_cotangent["inner"]
    offsets = dense_cotangent["offset0"], dense_cotangent["offset1"]
    stages = jtu.tree_map(lambda k: jnp.sum(jnp.abs(k), axis=0), inner["k"])
    return sum_of_magnitudes(y_bar, [inner["y0"], inner["y1"], *offsets, stages])
