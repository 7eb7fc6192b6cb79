"""Those solvers of Diffrax that are reversible as they stand."""

from typing import ClassVar

import jax.tree_util as jtu
from diffrax import (
    AbstractTerm,
    LeapfrogMidpoint,
    ReversibleHeun,
    SemiImplicitEuler,
)
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, RealScalarLike, SolverState, VF, Y
from .._tree import tree_add
from .adapter import AbstractReversibleAdapter, as_reversible


def _subtract(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x - y, x, y)


class _ReversibleHeun(AbstractReversibleAdapter[tuple[Y, VF]]):
    """`ŷ1 = 2 y0 - ŷ0 + f(ŷ0) X` and `y1 = y0 + (f(ŷ0) + f(ŷ1)) X / 2`, of which the sum
    is `2 y1 = ŷ0 + ŷ1 + f(ŷ1) X`: Kidger, Foster, Li & Lyons (2021), arXiv:2105.13493.

    One evaluation to undo a step. At a jump Diffrax evaluates the vector field at `y`, and
    from then on that cannot be told.
    """

    def inverse_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: tuple[Y, VF],
    ) -> tuple[Y, tuple[Y, VF]]:
        yhat1, vf1 = solver_state
        control = terms.contr(t0, t1)
        forward = terms.prod(vf1, control)
        yhat0 = jtu.tree_map(lambda y, z, f: 2 * y - z - f, y1, yhat1, forward)
        vf0 = terms.vf(t0, yhat0, args)
        increment = terms.prod(tree_add(vf0, vf1), control)
        return jtu.tree_map(lambda y, i: y - 0.5 * i, y1, increment), (yhat0, vf0)


class _LeapfrogMidpoint(AbstractReversibleAdapter[tuple[RealScalarLike, Y]]):
    """`y2 = y0 + f(t1, y1) X` over two steps: one evaluation to undo a step. Where the
    first of the two began is recorded."""

    def inverse_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: tuple[RealScalarLike, Y],
    ) -> tuple[Y, tuple[RealScalarLike, Y]]:
        tm1, y0 = solver_state
        ym1 = _subtract(y1, terms.vf_prod(t0, y0, args, terms.contr(tm1, t1)))
        return y0, (tm1, ym1)

    def to_record(self, solver_state: tuple[RealScalarLike, Y]) -> RealScalarLike:
        return solver_state[0]

    def recall(
        self, solver_state: tuple[RealScalarLike, Y], recorded: RealScalarLike
    ) -> tuple[RealScalarLike, Y]:
        return recorded, solver_state[1]

    def cross_jump(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: tuple[RealScalarLike, Y],
    ) -> tuple[SolverState, BoolScalarLike]:
        """Of the vector field there is nothing in the solver state."""
        del terms, t0, t1, y, args
        return solver_state, False


class _SemiImplicitEuler(AbstractReversibleAdapter[None]):
    """`q1 = q0 + f(t0, p0) X` and `p1 = p0 + g(t0, q1) X`, undone in reverse order."""

    # It is symplectic.
    default_checkpoints: ClassVar[int] = 0

    def inverse_step(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: None,
    ) -> tuple[Y, None]:
        (term_q, term_p), (q1, p1) = terms, y1
        p0 = _subtract(p1, term_p.vf_prod(t0, q1, args, term_p.contr(t0, t1)))
        q0 = _subtract(q1, term_q.vf_prod(t0, p0, args, term_q.contr(t0, t1)))
        return (q0, p0), None


as_reversible.register(ReversibleHeun, _ReversibleHeun)
as_reversible.register(LeapfrogMidpoint, _LeapfrogMidpoint)
as_reversible.register(SemiImplicitEuler, _SemiImplicitEuler)
