"""The pull-back of compositions of kicks and drifts."""

import functools as ft
from typing import ClassVar

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp

from .._custom_types import Combine, DenseInfo, Params, RealScalarLike, Y
from .._tree import any_nonzero, tree_add, tree_scale, tree_zeros_like
from .chain_pullback import undo_and_pull
from .cotangent import Cotangent
from .pullback import HasPullbackFromStart, StepStart
from .splitting_chain import AbstractSplittingChain, Stage
from .splitting_state import split_sums, SplittingState, sums_of, with_force


class AbstractSplittingPullback(
    AbstractSplittingChain, HasPullbackFromStart[SplittingState]
):
    """Pulls cotangents back through the steps of an `AbstractSplitting` as it undoes
    them."""

    differentiates_control: ClassVar[bool] = False

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: SplittingState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, SplittingState, Cotangent, tuple[Y, SplittingState]]:
        """One evaluation and one pull-back for each evaluation of a step, and an evaluation
        of the force at its start."""
        terms, args = combine(params)
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)
        if dense_cotangent is not None:
            end = t1, (t0, t1), y1, solver_state, cotangent, dense_cotangent, 1
            cotangent = self._pull_derivatives(combine, params, *end)

        def sides_bar(stage: Stage):
            """Only the last force of a step is kept in the solver state."""
            force_bar = tree_scale(stage.is_last, cotangent.solver_state.force)
            return None, (force_bar, None)

        after_first_kick = ft.partial(self._after_first_kick, h_p)
        pulled = undo_and_pull(
            self._chain(h_q, h_p, t0, t1),
            combine,
            params,
            sums_of(y1, solver_state),
            cotangent.y,
            cotangent.params,
            sides_bar,
            start and start.of_chain(after_first_kick),
        )
        (q, p), (q_bar, p_bar) = pulled.parts, pulled.bars
        force = self._evaluate(term_p, t0, q.high, args)
        p = p.minus(tree_scale(h_p * self.tableau.kicks[0], force))
        force_bar = tree_scale(h_p * self.tableau.kicks[0], p_bar)
        y0, low = split_sums(q, p)
        solver_state = SplittingState(force, low, jnp.array(False))
        state_bar = with_force(cotangent.solver_state, force_bar)
        cotangent = Cotangent((q_bar, p_bar), state_bar, pulled.params_bar)
        if dense_cotangent is not None:
            end = t0, (t0, t1), y0, solver_state, cotangent, dense_cotangent, 0
            cotangent = self._pull_derivatives(combine, params, *end)
        # The force follows from the state.
        off = with_force(cotangent.solver_state, tree_zeros_like(force))
        return y0, solver_state, cotangent, (pulled.off, off)

    def _after_first_kick(self, h_p: RealScalarLike, y0: Y, state0: SplittingState):
        """The position and the momentum after the first kick of a step."""
        q, p = sums_of(y0, state0)
        return q, p.plus(tree_scale(h_p * self.tableau.kicks[0], state0.force))

    def _pull_derivatives(
        self,
        combine: Combine,
        params: Params,
        t: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike],
        y: Y,
        solver_state: SplittingState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        end: int,
    ) -> Cotangent:
        """Pull the interpolation data at one `end` of the step back, if they were read."""
        y_bar = dense_cotangent[f"y{end}"]
        derivatives_bar = dense_cotangent[f"k{end}"], dense_cotangent[f"higher{end}"]

        def derivatives(y, force, params):
            terms, args = combine(params)
            term_q, term_p = self._terms(terms)
            h_q, h_p = term_q.contr(*step), term_p.contr(*step)
            k = tree_scale(h_q, term_q.vf(t, y[1], args)), tree_scale(h_p, force)
            return k, self._higher_derivatives(terms, t, step, y, args)

        def pull():
            _, pull = jax.vjp(derivatives, y, solver_state.force, params)
            return pull(derivatives_bar)

        like = (y, solver_state.force, params)
        more_y_bar, force_bar, params_bar = lax.cond(
            eqxi.unvmap_any(any_nonzero(derivatives_bar)),
            pull,
            lambda: tree_zeros_like(like),
        )
        y_bar = tree_add(tree_add(cotangent.y, y_bar), more_y_bar)
        force_bar = tree_add(cotangent.solver_state.force, force_bar)
        state_bar = with_force(cotangent.solver_state, force_bar)
        return Cotangent(y_bar, state_bar, tree_add(cotangent.params, params_bar))
