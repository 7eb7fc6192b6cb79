"""Diffrax's own reversible solvers."""

import functools as ft
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractTerm, LeapfrogMidpoint, ReversibleHeun, SemiImplicitEuler

from .._custom_types import Args, Combine, DenseInfo, Params, RealScalarLike, VF, Y
from .._exact_sum import Sum
from .._members import value_and_pullback
from .._tree import larger, tree_add, tree_zeros_like
from .adapter import AbstractReversibleAdapter, as_reversible
from .capabilities import HasRecord, KeepsStateAtJumps
from .chain import as_sums, as_trees, Chain, undo, Update
from .chain_pullback import undo_and_pull
from .cotangent import Cotangent
from .coupling_solver import AbstractCouplingSolver
from .couplings import Coupling
from .error_scales import HasErrorScales
from .pullback import HasPullback, HasPullbackFromStart, StepStart


# The start of the step before, and the state there.
_LeapfrogState: TypeAlias = tuple[RealScalarLike, Y]


def _leapfrog_parts(y1: Y, solver_state: _LeapfrogState) -> tuple[Sum, ...]:
    """The parts after a step: the younger state, the older state, and its time."""
    tm1, y0 = solver_state
    return as_sums((y1, y0, jnp.asarray(tm1)))


class _ReversibleHeun(
    AbstractReversibleAdapter[tuple[Y, VF]],
    HasErrorScales[tuple[Y, VF]],
    HasPullback[tuple[Y, VF]],
):
    """`ŷ1 = 2 y0 - ŷ0 + f(ŷ0) X` and `y1 = y0 + (f(ŷ0) + f(ŷ1)) X / 2`, which imply
    `2 y1 = ŷ0 + ŷ1 + f(ŷ1) X`.

    Undoing a step takes one evaluation. Pulling a cotangent back as well takes two, and one
    pull-back, as with the default adjoint: the vector field in the solver state is
    evaluated at both ends. The control is evaluated once, as an evaluation of a Brownian
    path may take longer than one of the vector field. At a jump Diffrax evaluates the
    vector field at `y`, which cannot be undone afterwards.

    Reference: Kidger, Foster, Li & Lyons (2021), arXiv:2105.13493.
    """

    def backward_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: tuple[Y, VF],
    ) -> tuple[Y, tuple[Y, VF]]:
        return _undo_heun(terms, t0, terms.contr(t0, t1), y1, args, solver_state)

    def backward_step_and_pullback(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: tuple[Y, VF],
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, tuple[Y, VF], Cotangent]:
        """The transpose of the step. With `p_i = f_i X`, which have the cotangents
        `p̄1 = ȳ1 / 2` and `p̄0 = ȳ1 / 2 + ŷ̄1`, that is:

            f̄1 += X^T p̄1,    ŷ̄1 += (∂f1/∂ŷ1)ᵀ f̄1,
            ȳ0 = ȳ1 + 2 ŷ̄1,    ŷ̄0 = -ŷ̄1,    f̄0 = X^T p̄0.
        """
        terms, args = combine(params)
        yhat1, vf1 = solver_state
        y_bar, (yhat_bar, vf_bar) = cotangent.y, cotangent.solver_state
        if dense_cotangent is not None:
            y_bar = tree_add(y_bar, dense_cotangent["y1"])
        control, pull_control = jax.vjp(lambda p: combine(p)[0].contr(t0, t1), params)
        y0, state0 = _undo_heun(terms, t0, control, y1, args, solver_state)

        def pull_product(vf, bar):
            product = lambda p, vf, control: combine(p)[0].prod(vf, control)
            _, pull = jax.vjp(product, params, vf, control)
            return pull(bar)

        def field(p, y):
            terms, args = combine(p)
            return terms.vf(t1, y, args)

        half = jtu.tree_map(lambda y: 0.5 * y, y_bar)
        params1, more, control1 = pull_product(vf1, half)
        vf_bar = tree_add(vf_bar, more)
        _, (params_bar, more) = value_and_pullback(field, (params, yhat1), vf_bar)
        yhat_bar = tree_add(yhat_bar, more)
        params0, vf_bar, control0 = pull_product(state0[1], tree_add(half, yhat_bar))
        (of_control,) = pull_control(tree_add(control0, control1))
        params_bar = ft.reduce(
            tree_add, (cotangent.params, params1, params_bar, params0, of_control)
        )
        y_bar = jtu.tree_map(lambda y, z: y + 2 * z, y_bar, yhat_bar)
        if dense_cotangent is not None:
            y_bar = tree_add(y_bar, dense_cotangent["y0"])
        state_bar = jtu.tree_map(jnp.negative, yhat_bar), vf_bar
        return y0, state0, Cotangent(y_bar, state_bar, params_bar)

    def error_scales(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: tuple[Y, VF],
        y_end: Y,
        solver_state_end: tuple[Y, VF],
    ) -> tuple[Y, tuple[Y, VF]]:
        """The scales of `y` and `ŷ` are at least the size of one step's update. The vector
        field is not compared: both passes evaluate it at `ŷ`, and where it is close to
        zero, as in a state of rest, its rounding errors are as large as itself."""
        del length, args
        yhat0, vf0 = solver_state
        step = terms.prod(vf0, terms.contr(t0, t1))
        y, yhat = (
            jtu.tree_map(larger, *ys)
            for ys in ((y0, step, y_end), (yhat0, step, solver_state_end[0]))
        )
        unbounded = lambda x: jnp.full(x.shape, jnp.inf, jnp.abs(x).dtype)
        return y, (yhat, jtu.tree_map(unbounded, vf0))


def _undo_heun(
    terms: AbstractTerm,
    t0: RealScalarLike,
    control: Any,
    y1: Y,
    args: Args,
    solver_state: tuple[Y, VF],
) -> tuple[Y, tuple[Y, VF]]:
    """The start of a step of reversible Heun, by one evaluation."""
    yhat1, vf1 = solver_state
    forward = terms.prod(vf1, control)
    yhat0 = jtu.tree_map(lambda y, z, f: 2 * y - z - f, y1, yhat1, forward)
    vf0 = terms.vf(t0, yhat0, args)
    increment = terms.prod(tree_add(vf0, vf1), control)
    return jtu.tree_map(lambda y, i: y - 0.5 * i, y1, increment), (yhat0, vf0)


class _LeapfrogMidpoint(
    AbstractReversibleAdapter[_LeapfrogState],
    KeepsStateAtJumps[_LeapfrogState],
    HasRecord[_LeapfrogState],
    HasPullbackFromStart[_LeapfrogState],
):
    """`y2 = y0 + f(t1, y1) X` over two steps. Undoing a step takes one evaluation, and the
    recorded start of the first of the two."""

    def backward_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _LeapfrogState,
    ) -> tuple[Y, _LeapfrogState]:
        parts = _leapfrog_parts(y1, solver_state)
        parts, _ = undo(self._chain(t0, t1), terms, args, parts)
        ym1, y0, tm1 = as_trees(parts)
        return y0, (tm1, ym1)

    def _chain(self, t0: RealScalarLike, t1: RealScalarLike) -> Chain:
        """The update of the older state by the younger state and the time of the older."""

        def make_round(terms: AbstractTerm, args: Args, row: None):
            del row

            def evaluate(y, tm1):
                return terms.vf_prod(t0, y, args, terms.contr(tm1, t1)), None

            return (Update(0, evaluate),)

        return Chain(make_round)

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _LeapfrogState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, _LeapfrogState, Cotangent, tuple[Y, _LeapfrogState]]:
        """One evaluation and one pull-back."""
        dense = dense_cotangent
        y1_bar = cotangent.y if dense is None else tree_add(cotangent.y, dense["y1"])
        parts = _leapfrog_parts(y1, solver_state)
        # The step discards the time of the older state, so its cotangent is zero.
        bars = y1_bar, cotangent.solver_state[1], tree_zeros_like(parts[2].high)
        before = lambda y0, state0: as_sums((state0[1], y0, jnp.asarray(state0[0])))
        pulled = undo_and_pull(
            *(self._chain(t0, t1), combine, params, parts, bars, cotangent.params),
            start=start and start.of_chain(before),
        )
        (ym1, y0, tm1), (ym1_bar, y0_bar, tm1_bar) = as_trees(pulled.parts), pulled.bars
        if dense is not None:
            y0_bar = tree_add(y0_bar, dense["y0"])
        cotangent = Cotangent(y0_bar, (tm1_bar, ym1_bar), pulled.params_bar)
        # The older state and its time are those at the start.
        y_off, *_ = pulled.off
        return y0, (tm1, ym1), cotangent, (y_off, tree_zeros_like((tm1, ym1)))

    def to_record(self, solver_state: _LeapfrogState) -> RealScalarLike:
        return solver_state[0]

    def recall(
        self, solver_state: _LeapfrogState, recorded: RealScalarLike
    ) -> _LeapfrogState:
        return recorded, solver_state[1]


class _SemiImplicitEuler(AbstractReversibleAdapter[None], AbstractCouplingSolver[None]):
    """`q1 = q0 + f(t0, p0) X` and `p1 = p0 + g(t0, q1) X`."""

    # It is symplectic, as the solvers of `splitting.py`.
    default_checkpoints: ClassVar[int] = 0

    def couplings(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
    ) -> tuple[Coupling, Coupling]:
        def kick(term: AbstractTerm):
            return lambda other: term.vf_prod(t0, other, args, term.contr(t0, t1))

        term_q, term_p = terms
        return Coupling(0, kick(term_q)), Coupling(1, kick(term_p))


as_reversible.register(ReversibleHeun, _ReversibleHeun)
as_reversible.register(LeapfrogMidpoint, _LeapfrogMidpoint)
as_reversible.register(SemiImplicitEuler, _SemiImplicitEuler)
