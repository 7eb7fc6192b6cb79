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
    # Each stage that `y1` needs once, and one evaluation at the start, to measure the error
    # of the reconstruction.
    assert both - forward == 2 * needed * accepted + 1


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
