"""Coupled Runge–Kutta methods: order, evaluations, adjoints, many steps."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .counter import Counter
from .problems import cases, PID, reference, relative_error


Y0 = jnp.array([0.7, -0.4])
TS = jnp.linspace(0.0, 3.0, 97)[1:-1]


def field(t, y, args):
    """Neither autonomous nor Hamiltonian."""
    a, b = y
    return jnp.stack([b + 0.3 * a * b * jnp.cos(t), jnp.sin(a) - 0.5 * b])


def test_reads_like_the_inner_solver():
    terms = dfx.ODETerm(field)
    for solver in (dfx.Heun(), dfx.Bosh3(), dfx.Dopri8()):
        coupled = dr.McCallumFoster(solver)
        assert coupled.order(terms) == solver.order(terms)
        assert coupled.error_order(terms) == solver.error_order(terms)


# The orders at the end and between steps, there those of Diffrax's interpolation.
@pytest.mark.parametrize(
    "solver, order, between, steps",
    cases(
        (
            (dr.McCallumFoster(dfx.Heun()), 2, 2, 64),
            (dr.McCallumFoster(dfx.Tsit5()), 5, 5, 16),
        ),
        more=(
            (dr.McCallumFoster(dfx.Ralston()), 2, 2, 64),
            (dr.McCallumFoster(dfx.Bosh3()), 3, 3, 64),
            (dr.McCallumFoster(dfx.Tsit5(), coupling=0.9), 5, 5, 16),
            (dr.McCallumFoster(dfx.Dopri5()), 5, 5, 16),
            (dr.McCallumFoster(dfx.Dopri8()), 8, 6, 4),
        ),
    ),
    ids=repr,
)
def test_order(solver, order, between, steps):
    """At the end and between steps, the order is that of the inner solver."""
    exact = reference(field, Y0, 0.0, 3.0)
    exact_between = dfx.diffeqsolve(
        dfx.ODETerm(field),
        dfx.Dopri8(),
        0.0,
        3.0,
        None,
        Y0,
        saveat=dfx.SaveAt(ts=TS),
        # Steps end at all of these times.
        stepsize_controller=dfx.StepTo(jnp.linspace(0.0, 3.0, 97 * 8 - 7)),
    ).ys

    @jax.jit
    def solve(dt0):
        saveat = dfx.SaveAt(ts=TS, t1=True)
        terms = dfx.ODETerm(field)
        return dfx.diffeqsolve(terms, solver, 0.0, 3.0, dt0, Y0, saveat=saveat).ys

    def errors(n):
        ys = solve(jnp.array(3.0 / n))
        pairs = (ys[-1], exact), (ys[:-1], exact_between)
        return np.array([np.max(np.abs(x - y)) for x, y in pairs])

    coarse, fine = errors(steps), errors(2 * steps)
    assert np.min(fine) > 1e-13, "below the rounding floor; slopes mean nothing"
    slopes = np.log2(coarse / fine)
    assert np.all(slopes > np.array([order, between]) - 0.4), slopes


# The numbers of stages that the error estimate needs, and that `y1` needs.
@pytest.mark.long
@pytest.mark.parametrize(
    "solver, stages, needed",
    cases(
        ((dfx.Tsit5(), 7, 6),),
        slow=((dfx.Heun(), 2, 2), (dfx.Bosh3(), 4, 3), (dfx.Dopri8(), 13, 13)),
    ),
    ids=repr,
)
@pytest.mark.parametrize("adaptive", cases((True,), slow=(False,)))
def test_evaluations(solver, stages, needed, adaptive):
    counter = Counter()

    def final(y0, scale):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(counter),
            dr.McCallumFoster(solver),
            0.0,
            3.0,
            jnp.array(0.5),
            y0,
            scale,
            adjoint=dr.ReversibleAdjoint(checkpoints=0),
            stepsize_controller=PID if adaptive else dfx.ConstantStepSize(),
        )
        return jnp.sum(sol.ys), sol.stats

    y0, scale = jnp.array([1.0, 2.0]), jnp.array(0.3)
    forward, (_, stats) = counter.during(jax.jit(final), y0, scale)
    steps, accepted = stats["num_steps"], stats["num_accepted_steps"]
    # With any controller, the error estimate shows whether the copies have drifted apart.
    assert forward == (needed + stages) * steps
    gradient = jax.jit(jax.value_and_grad(final, argnums=(0, 1), has_aux=True))
    both, _ = counter.during(gradient, y0, scale)
    # Each stage that `y1` needs once, and two evaluations at the start: to measure the
    # error of the reconstruction, and the fast modes of the gradient.
    assert both - forward == 2 * needed * accepted + 2


def one_step(solver, matrix, y0):
    """A step of length one of `y' = matrix @ y`, from two equal copies."""
    terms = dfx.ODETerm(lambda t, y, args: matrix @ y)
    state = solver.init(terms, 0.0, 1.0, y0, None)
    return solver.advance(terms, 0.0, 1.0, y0, None, state)[0]


@pytest.mark.parametrize("inner", (dfx.Tsit5(), dfx.Bosh3(), dfx.Dopri8()))
def test_other_derivatives(inner):
    """The step stays the same. Its derivatives are those of the embedded method, without
    the last stages that the solution does not use, or its own."""
    solver, tableau = dr.McCallumFoster(inner), inner.tableau
    matrix, y0 = jnp.array([[-0.9, 0.4], [0.2, -0.3]]), jnp.array([1.0, -0.5])
    stages = len(tableau.b_sol)
    a = np.zeros((stages, stages))
    for i, row in enumerate(tableau.a_lower, start=1):
        a[i, : len(row)] = row
    used = np.arange(stages) <= np.max(np.flatnonzero(tableau.b_sol))
    embedded = np.where(used, tableau.b_sol - tableau.b_error, 0)
    for where, weights in ((True, embedded / np.sum(embedded)), (False, tableau.b_sol)):
        other = solver.with_other_derivatives(jnp.array(where))
        step = lambda y0, other=other: one_step(other, matrix, y0)
        np.testing.assert_array_equal(step(y0), one_step(solver, matrix, y0))
        # For all stages at once, `k = matrix (y0 + a k)`.
        inverse = np.linalg.inv(np.eye(2 * stages) - np.kron(a, matrix))
        k = inverse @ np.kron(np.ones((stages, 1)), matrix)
        want = np.eye(2) + np.kron(weights, np.eye(2)) @ k
        assert relative_error(jax.jacrev(step)(y0), want) < 1e-12


class OwnSteps(dr.McCallumFoster):
    """A subclass, which may make its steps in another way."""


class NoEstimate(dfx.Bosh3):
    tableau = dfx.ButcherTableau(
        c=dfx.Bosh3.tableau.c,
        b_sol=dfx.Bosh3.tableau.b_sol,
        b_error=np.zeros(4),
        a_lower=dfx.Bosh3.tableau.a_lower,
    )


@pytest.mark.parametrize(
    "solver", (OwnSteps(dfx.Tsit5()), dr.McCallumFoster(NoEstimate())), ids=repr
)
def test_no_other_derivatives(solver):
    assert solver.with_other_derivatives(True) is None


@pytest.mark.long
def test_right_gradient_that_seems_to_grow():
    """Upwind advection, in 19 steps. There is a pass by derivatives of the embedded method,
    and then another one, with which it agrees. As both might have grown by as much, a pass
    that divides steps confirms them, before the gradient is that of the last one again."""
    speed = jnp.array([1.3, 1.9, 17.0, 3.3, 0.92, 0.86])
    y0 = jnp.array([0.68, -0.63, 1.1, 0.54, 0.83, -0.6])
    weights = jnp.array([-0.65, -0.39, 0.31, -1.8, 0.12, -0.47])

    def inflow(t, y, speed):
        return -speed * (y - jnp.roll(y, 1).at[0].set(jnp.sin(t)))

    def gradient(solver, adjoint, tol=1e-3):
        def loss(y0, speed):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(inflow),
                solver,
                *(0.0, 3.0, None, y0, speed),
                adjoint=adjoint,
                stepsize_controller=dfx.PIDController(tol, tol / 100),
            )
            return jnp.vdot(weights, sol.ys[0]), sol.stats["num_accepted_steps"]

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(y0, speed)

    solver, reports = dr.McCallumFoster(dfx.Tsit5()), []
    got, steps = gradient(solver, dr.ReversibleAdjoint(report=reports.append))
    jax.effects_barrier()
    assert reports[-1]["undone_steps"] == 5 * steps
    stored, exact = (
        gradient(*of)[0]
        for of in (
            (solver, dfx.RecursiveCheckpointAdjoint()),
            (dfx.Dopri8(), dfx.RecursiveCheckpointAdjoint(), 1e-9),
        )
    )
    assert relative_error(got, stored) < 1e-10
    assert relative_error(got, exact) < 0.03


@pytest.mark.slow
def test_adjoints():
    """Gradients equal those of Diffrax's adjoints."""

    def gradient(adjoint):
        def loss(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dr.McCallumFoster(dfx.Tsit5()),
                0.0,
                3.0,
                0.3,
                y0,
                adjoint=adjoint,
                max_steps=20,
            )
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.grad(loss))(Y0)

    ours = gradient(dr.ReversibleAdjoint())
    for adjoint in (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint()):
        assert relative_error(ours, gradient(adjoint)) < 1e-13


@pytest.mark.long
def test_walk_goes_on_from_known_states():
    """Otherwise 4,000 steps would multiply errors by `0.99 ** -4000`."""

    def loss(y0, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.McCallumFoster(dfx.Heun(), coupling=0.99),
            0.0,
            4.0,
            1e-3,
            y0,
            adjoint=adjoint,
            max_steps=4096,
        )
        return jnp.sum(sol.ys**2)

    ours, theirs = (
        jax.jit(lambda y0, adjoint=adjoint: jax.grad(loss)(y0, adjoint))(Y0)
        for adjoint in (
            dr.ReversibleAdjoint(),
            dfx.RecursiveCheckpointAdjoint(checkpoints=4096),
        )
    )
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    "controller", (dfx.ConstantStepSize(), dfx.PIDController(1e-4, 1e-6))
)
def test_copy_that_is_lost(controller):
    """From zero, a step back of the copy leaves the domain of the square root."""
    solver = dr.McCallumFoster(dfx.Tsit5())

    def chain(t, y, rate):
        return jnp.stack([1 - y[0], rate * jnp.sqrt(y[0]) - y[1]])

    def solve(solver, controller, dt0=0.05):
        solve = dfx.ODETerm(chain), solver, 0.0, 5.0, dt0, jnp.zeros(2), jnp.array(0.5)
        return dfx.diffeqsolve(*solve, stepsize_controller=controller).ys[0]

    want = solve(dfx.Dopri8(), dfx.PIDController(1e-9, 1e-9))
    got = jax.jit(lambda: solve(solver, controller))()
    np.testing.assert_allclose(got, want, rtol=2e-3)


@pytest.mark.parametrize(
    "save", cases((None,), more=(jnp.sqrt,)), ids=("states", "functions")
)
def test_gradient_where_the_copy_is_lost(save):
    """Gompertz' growth, `y = exp(exp(-r t) log(y0))`, in a batch: the stages of a step back
    are below zero, and nothing depends on them."""
    times = jnp.array([1.0, 5.0])
    starts = jnp.array([1e-4, 0.3])
    fn = {} if save is None else dict(fn=lambda t, y, args: save(y))

    def loss(rate):
        def final(y0):
            return dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, rate: -rate * y * jnp.log(y)),
                dr.McCallumFoster(dfx.Tsit5()),
                *(0.0, 5.0, None, y0, rate),
                saveat=dfx.SaveAt(ts=times, **fn),
                stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6),
                adjoint=dr.ReversibleAdjoint(),
            ).ys

        return jnp.sum(jax.vmap(final)(starts))

    def exact(rate):
        ys = jnp.exp(jnp.outer(jnp.log(starts), jnp.exp(-rate * times)))
        return jnp.sum(ys if save is None else save(ys))

    rate = jnp.array(0.7)
    got, want = jax.jit(jax.grad(loss))(rate), jax.grad(exact)(rate)
    np.testing.assert_allclose(got, want, rtol=3e-3)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "adjoint", (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
)
def test_stages_are_not_computed_again(adjoint):
    """The program of a gradient has a few sines for each stage. With stages that were fused
    it had more than 700, evaluated for each of the 30 entries anew."""

    def field(t, y, k):
        cos, sin = jnp.cos(y), jnp.sin(y)
        return k * (jnp.mean(sin) * cos - jnp.mean(cos) * sin)

    def loss(k):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.McCallumFoster(dfx.Tsit5()),
            *(0.0, 1.0, 0.1, jnp.linspace(0.0, 1.0, 30), k),
            adjoint=adjoint,
        )
        return jnp.sum(sol.ys)

    program = jax.jit(jax.grad(loss)).lower(1.0).compile().as_text()
    assert 10 < program.count(" sine(") < 400
