"""Third-party solvers under `ReversibleAdjoint`, by a registry."""

import inspect
import re
import textwrap

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import (
    as_terms,
    assert_same_gradient,
    cases,
    FAMILIES,
    families,
    Network,
    network_args,
    relative_error,
)


Y0 = jnp.array([1.0, 2.0, 0.5])


class Staggered(dfx.AbstractSolver):
    """`y1 = y0 + f(t0, z0) h` and `z1 = z0 + f(t1, y1) h`, with the interface of the
    `AbstractReversibleSolver` that was proposed for Diffrax in its pull request 727, at
    commit c09680a: `backward_step` takes `ts_state` before `solver_state`, and returns
    four values."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return y0

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        z0, control = solver_state, terms.contr(t0, t1)
        y1 = y0 + terms.vf_prod(t0, z0, args, control)
        z1 = z0 + terms.vf_prod(t1, y1, args, control)
        return y1, None, dict(y0=y0, y1=y1), z1, dfx.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        del ts_state, made_jump
        z1, control = solver_state, terms.contr(t0, t1)
        z0 = z1 - terms.vf_prod(t1, y1, args, control)
        y0 = y1 - terms.vf_prod(t0, z0, args, control)
        return y0, dict(y0=y0, y1=y1), z0, dfx.RESULTS.successful


# The docstring of `as_reversible` has the lines that register it.
LINES = re.findall("^    .*", inspect.getdoc(dr.as_reversible), re.M)
exec(textwrap.dedent("\n".join(LINES)), dict(MySolver=Staggered))


class Subclass(Staggered):
    pass


class Drifting(Staggered):
    """Overrides the step as well as its inverse, which the adapter calls."""

    def step(self, terms, t0, t1, *others):
        y1, error, info, *after = super().step(terms, t0, t1, *others)
        y1 = y1 + t1 - t0
        return y1, error, dict(info, y1=y1), *after

    def backward_step(self, terms, t0, t1, y1, *others, **kwargs):
        return super().backward_step(terms, t0, t1, y1 - t1 + t0, *others, **kwargs)


def loss(adjoint, y0, field, solver, **kwargs):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        3.0,
        0.1,
        y0,
        network_args(),
        saveat=dfx.SaveAt(ts=jnp.array([0.33, 1.0, 2.5])),
        adjoint=adjoint,
        max_steps=64,
        **kwargs,
    )
    return jnp.sum(sol.ys**2)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver", cases((Staggered(), Drifting()), slow=(Subclass(),)), ids=repr
)
def test_backward_step(solver):
    """A few lines register a solver and its subclasses."""
    loss_of = lambda adjoint, y0: loss(adjoint, y0, Network(), solver)
    assert_same_gradient(loss_of, Y0, tol=1e-12)


class Symmetric(dr.AbstractReversibleSolver):
    """Steps that are undone by steps backwards in time; a subclass defines them."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def backward_step(self, terms, t0, t1, y1, args, solver_state):
        y0, *_ = self.step(terms, t1, t0, y1, args, solver_state, made_jump=False)
        return y0, solver_state


class Cayley(Symmetric):
    """The trapezoidal rule for `y' = a y`."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        half = terms.contr(t0, t1) * args / 2
        y1 = y0 * (1 + half) / (1 - half)
        return y1, None, dict(y0=y0, y1=y1), solver_state, dfx.RESULTS.successful


@pytest.mark.more
def test_step_of_a_subclass():
    """A base class may define how steps are undone, and leave the step to subclasses."""

    def loss(adjoint, rate):
        term = dfx.ODETerm(lambda t, y, a: a * y)
        sol = dfx.diffeqsolve(term, Cayley(), 0.0, 2.0, 0.1, Y0, rate, adjoint=adjoint)
        return jnp.sum(sol.ys**2)

    assert_same_gradient(loss, jnp.array(-0.7), tol=1e-12)


def test_not_registered():
    with pytest.raises(ValueError, match=r"`Euler` is not.*as_reversible\.register"):
        loss(dr.ReversibleAdjoint(), Y0, Network(), dfx.Euler())


def test_jumps_are_refused():
    """An adapter cannot know how a jump changes the solver state."""
    message = r"solver=Staggered\(\).*End the solve at"
    with pytest.raises(NotImplementedError, match=message):
        loss(dr.ReversibleAdjoint(), Y0, Network(), Staggered(), made_jump=True)


def test_ours_stay_as_they_are():
    for solver in (dr.ALF4(), dr.BlanesMoan4(), dr.McCallumFoster(dfx.Tsit5())):
        assert dr.as_reversible(solver) is solver


@families
def test_reads_like_the_solver(family):
    """The adapter is a solver with the orders and the solutions of the one it wraps."""
    solver, field, y0, controller, dt0 = FAMILIES[family]
    adapter, terms = dr.as_reversible(solver), as_terms(field)
    assert adapter.order(terms) == solver.order(terms)
    if isinstance(solver, dfx.AbstractAdaptiveSolver):
        assert adapter.error_order(terms) == solver.error_order(terms)
    args = network_args()
    given = dict(saveat=dfx.SaveAt(ts=[0.7, 2.0]), stepsize_controller=controller)
    ys, expected = (
        dfx.diffeqsolve(terms, s, 0.0, 2.0, dt0, y0, args, **given).ys
        for s in (adapter, solver)
    )
    for y, reference in zip(jax.tree.leaves(ys), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(y, reference)


class AlwaysRestarts(dr.ALF4):
    """A solver whose restart does not clear the need for one."""

    def needs_restart(self, solver_state):
        return jnp.array(True)

    def restart(self, terms, t, y, args, solver_state):
        return solver_state


@pytest.mark.slow
def test_a_restart_that_changes_nothing_does_not_hang():
    """There is exactly one restart before each step."""

    def final(y0, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(Network()),
            AlwaysRestarts(),
            *(0.0, 1.0, 0.1, y0, network_args()),
            adjoint=adjoint,
            max_steps=16,
        )
        return jnp.sum(sol.ys**2), sol.stats

    ours, stats = jax.grad(final, has_aux=True)(Y0, dr.ReversibleAdjoint(checkpoints=16))
    assert stats["num_restarts"] == stats["num_steps"]
    want, _ = jax.grad(final, has_aux=True)(Y0, dfx.RecursiveCheckpointAdjoint())
    assert relative_error(ours, want) < 1e-10
