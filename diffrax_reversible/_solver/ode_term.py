"""The terms that solvers for ordinary differential equations accept."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, AbstractTerm, ControlTerm, MultiTerm, ODETerm

from .._custom_types import Args, RealScalarLike, Terms, VF, Y
from .._diffrax import WrapTerm
from .._tree import tree_add, tree_scale


class _SumTerm(AbstractTerm):
    """The sum of vector fields that are all integrated with respect to time."""

    terms: tuple[AbstractTerm, ...]

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        first, *others = self.terms
        total = first.vf(t, y, args)
        for term in others:
            total = tree_add(total, term.vf(t, y, args))
        return total

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs) -> RealScalarLike:
        return self.terms[0].contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: RealScalarLike) -> Y:
        return self.terms[0].prod(vf, control)


class _ProductTerm(AbstractTerm):
    """A term whose `prod` is more than a product with a scalar control, but linear in it:
    for example one that solves a system with a mass matrix."""

    term: AbstractTerm

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.term.vf_prod(t, y, args, jnp.ones((), jnp.result_type(t)))

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs) -> RealScalarLike:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: RealScalarLike) -> Y:
        return tree_scale(control, vf)


def as_ode_term(solver: AbstractSolver, terms: Terms) -> AbstractTerm:
    """A single term whose vector field is that of the equation.

    **Raises:**

    `ValueError` for terms that are not integrated with respect to time.
    """
    call = f"`diffeqsolve(..., solver={type(solver).__name__}())`"
    ode = f"{call} solves ordinary differential equations and got"
    if isinstance(terms, MultiTerm):
        parts = tuple(as_ode_term(solver, term) for term in terms.terms)
        if not all(isinstance(_unwrap(part), ODETerm | _SumTerm) for part in parts):
            raise ValueError(
                f"{ode} a `MultiTerm` of terms that are not all `ODETerm`s. Write them as "
                "the sum of vector fields in a single `ODETerm`."
            )
        return _SumTerm(parts)
    if isinstance(_unwrap(terms), ControlTerm):
        raise ValueError(
            f"{ode} a `ControlTerm`. If the control is differentiable, use "
            "`ControlTerm(...).to_ode()`: the order of the solver needs its derivative "
            "within a step. If it is noise, use for example `diffrax.ReversibleHeun()`: "
            "with noise this solver need not converge."
        )
    if not _has_scalar_control(terms):
        raise ValueError(
            f"{ode} a `{type(_unwrap(terms)).__name__}` whose control is not the scalar "
            "`t1 - t0`. Write it as an `ODETerm`."
        )
    return terms if _is_plain(terms) else _ProductTerm(terms)


def _has_scalar_control(term: AbstractTerm) -> bool:
    if type(_unwrap(term)).contr is ODETerm.contr:
        return True
    time = jnp.asarray(0.0)
    control = eqx.filter_eval_shape(term.contr, time, time)
    is_leaf = jtu.tree_structure(control) == jtu.tree_structure(0)
    return is_leaf and getattr(control, "shape", ()) == ()


def _is_plain(term: AbstractTerm) -> bool:
    kind = type(_unwrap(term))
    if issubclass(kind, _SumTerm | _ProductTerm):
        return True
    return kind.prod is ODETerm.prod and kind.vf_prod is ODETerm.vf_prod


def _unwrap(term: AbstractTerm) -> AbstractTerm:
    while isinstance(term, WrapTerm):
        term = term.term
    return term
