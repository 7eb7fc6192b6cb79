"""Making what functions close over visible to differentiation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm
from jax.core import Tracer

from .._custom_types import Args, RealScalarLike, Terms, VF, Y


class _ClosedTerm(AbstractTerm):
    """A term of which the vector field holds all that it closes over as leaves."""

    term: AbstractTerm
    vector_field: Callable[[RealScalarLike, Y, Args], VF]

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.vector_field(t, y, args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs) -> Any:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: Any) -> Y:
        return self.term.prod(vf, control)


def close_terms(
    solver: AbstractSolver, terms: Terms, t: RealScalarLike, y: Y, args: Args
) -> Terms:
    """`terms`, but if a vector field closes over traced values then with those as leaves.

    A custom gradient cannot see a closed-over value, and would drop its cotangent.
    """
    closed = eqx.filter_closure_convert(
        lambda t, y, args: solver.func(terms, t, y, args), t, y, args
    )
    known = {id(leaf) for leaf in jtu.tree_leaves((terms, args))}
    captured = [
        leaf
        for leaf in jtu.tree_leaves(closed)
        if isinstance(leaf, Tracer) and id(leaf) not in known
    ]
    if len(captured) == 0:
        return terms
    if not isinstance(terms, AbstractTerm):
        raise NotImplementedError(
            "`diffeqsolve(..., adjoint=ReversibleAdjoint())`: with several terms a "
            "vector field may not close over traced values. Pass them through `args`, or "
            "as fields of an `equinox.Module`."
        )
    return _ClosedTerm(
        terms, eqx.filter_closure_convert(lambda *a: terms.vf(*a), t, y, args)
    )
