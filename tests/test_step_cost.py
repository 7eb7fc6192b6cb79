"""Undoing a step takes as many evaluations as its solver's docstring says. They are counted
in the traced program, which need not be compiled."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import diffrax_reversible as dr
from diffrax_reversible import as_reversible

from .problems import as_terms


def _field(t, y, args):
    return -args * y * t


def _count(jaxpr):
    """The calls of `_field` in a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == _field.__name__:
            total += 1
            continue
        inside = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
        inside = [_count(p) for p in inside if hasattr(p, "eqns")]
        # Of a conditional, the branch that takes most.
        branches = eqn.params.get("branches", ())
        inside += [max((_count(b.jaxpr) for b in branches), default=0)]
        # The loops of a step have a known number of rounds.
        assert eqn.primitive.name != "while" or sum(inside) == 0
        total += sum(inside) * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize(
    "solver, evaluations",
    (
        (dr.ALF2(), 1),
        (dr.ALF4(), 5),
        (dr.ALF6(), 20),
        (dr.ALF8(), 34),
        (dr.ALF4(compensated=True), 5),
        (dr.StormerVerlet(), 2 * 1 + 1),
        (dr.BlanesMoan4(), 2 * 6 + 1),
        (dr.BlanesMoan4(nystrom=True), 6 + 1),
        (dr.BlanesMoan6(), 2 * 10 + 1),
        (dr.BlanesMoan6(nystrom=True), 11 + 1),
        (dr.KahanLi8(), 2 * 17 + 1),
        (dr.McCallumFoster(dfx.Tsit5()), 2 * 6),
        (dr.McCallumFoster(dfx.Bosh3()), 2 * 3),
        (dfx.ReversibleHeun(), 1),
        (dfx.LeapfrogMidpoint(), 1),
        (dfx.SemiImplicitEuler(), 2),
    ),
)
def test_backward_step(solver, evaluations):
    solver, y = as_reversible(solver), jnp.array([1.0, 2.0])
    field = jax.jit(_field)
    separable = solver.term_structure is not dfx.AbstractTerm
    terms = as_terms((field, field) if separable else field)
    if getattr(solver, "nystrom", False):
        # The drift has to be affine in the momentum. Only forces are counted.
        terms = dfx.ODETerm(lambda t, p, args: p), terms[1]
    y = (y, y) if separable else y
    args = jnp.array(0.3)
    state = jax.eval_shape(lambda y: solver.init(terms, 0.0, 0.1, y, args), y)
    undo = lambda y, state: solver.backward_step(terms, 0.0, 0.1, y, args, state)
    jaxpr = jax.make_jaxpr(undo)(y, state).jaxpr
    # Without what no result depends on.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert _count(jaxpr) == evaluations
