"""Gradients with respect to times that the controller steps to."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr

from .problems import assert_same_gradient, cases, Network, network_args, Y0


PID = dfx.PIDController(rtol=1e-9, atol=1e-9)
SWITCHES, END = jnp.array([0.6, 1.7]), 3.0


def switched(t, y, switches):
    """A decay, driven between two times."""
    on, off = switches
    return jnp.where((t >= on) & (t < off), 1.0, 0.0) - y


def final(switches, y0, solver, name, adjoint=None, t1=END):
    """The state at the end, of a solve that steps to the times of its switches."""
    back = t1 < 0
    field = (lambda t, y, s: -switched(-t, y, s)) if back else switched
    times = {name: -switches if back else switches}
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        *(0.0, t1, None, y0, switches),
        saveat=dfx.SaveAt(ts=jnp.array([0.5 * t1, t1])),
        stepsize_controller=dfx.ClipStepSizeController(PID, **times),
        adjoint=dr.ReversibleAdjoint() if adjoint is None else adjoint,
    )
    return sol.ys[-1]


def slopes(switches):
    """The derivative of the end by each switch, of the exact solution."""
    return jnp.exp(switches - END) * jnp.array([-1.0, 1.0])


COUPLED = dr.McCallumFoster(dfx.Tsit5())
CASES = cases(
    ((dr.ALF4(), "jump_ts"),),
    more=(
        *((dr.ALF4(), "step_ts"), (dr.Gauss4(), "jump_ts")),
        *((COUPLED, "jump_ts"), (COUPLED, "step_ts")),
    ),
)


@pytest.mark.parametrize("solver, name", CASES)
def test_switches(solver, name):
    """A vector field that jumps at given times moves with these."""
    gradient = jax.jit(jax.grad(lambda s: final(s, jnp.array(0.5), solver, name)))
    np.testing.assert_allclose(gradient(SWITCHES), slopes(SWITCHES), rtol=1e-6)


@pytest.mark.more
def test_just_after_the_start():
    """A solve may begin at the float before a jump, as where another one ended there."""

    def end(switches):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(switched),
            dr.ALF4(),
            *(jnp.nextafter(SWITCHES[0], 0), END, 0.01, jnp.array(0.5), switches),
            stepsize_controller=dfx.ClipStepSizeController(PID, jump_ts=switches),
            adjoint=dr.ReversibleAdjoint(),
        )
        return sol.ys[-1]

    gradient = jax.jit(jax.grad(end))(SWITCHES)
    np.testing.assert_allclose(gradient, slopes(SWITCHES), rtol=1e-6)


@pytest.mark.more
@pytest.mark.parametrize("aside", (0, 1))
def test_constant_times_at_the_same_place(aside):
    """A time that is given twice moves if one of both is differentiated."""

    def end(switches, steps):
        inner = dfx.ClipStepSizeController(PID, jump_ts=switches)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(switched),
            dr.ALF4(),
            *(0.0, END, None, jnp.array(0.5), switches),
            stepsize_controller=dfx.ClipStepSizeController(inner, step_ts=steps),
            adjoint=dr.ReversibleAdjoint(),
        )
        return sol.ys[-1]

    steps = jnp.array([SWITCHES[0], 1.0])
    for _ in range(aside):
        steps = jnp.nextafter(steps, END)
    gradient = jax.jit(jax.grad(end))(SWITCHES, steps)
    np.testing.assert_allclose(gradient, slopes(SWITCHES), rtol=1e-5)


@pytest.mark.more
@pytest.mark.parametrize("t1", (END, -END))
def test_batch(t1):
    """Every member has times of its own, forwards and backwards in time."""
    switches = jnp.array([[0.6, 1.7], [0.8, 1.9], [0.1, 1.2]])
    y0 = jnp.array([0.5, 0.1, 0.0])

    def total(switches):
        end = lambda s, y0: final(s, y0, dr.ALF4(), "jump_ts", t1=t1)
        return jnp.sum(jax.vmap(end)(switches, y0))

    want = jax.vmap(slopes)(switches)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(switches), want, rtol=1e-5)


@pytest.mark.more
def test_until_an_event():
    """The time of an event moves with the times before it, also in a solve without end."""

    def stop(switches):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(switched),
            dr.ALF4(),
            *(0.0, jnp.inf, 0.1, jnp.array(0.0), switches),
            stepsize_controller=dfx.ClipStepSizeController(PID, jump_ts=switches),
            event=dfx.Event(lambda t, y, args, **_: y - 0.5, optx.Newton(1e-9, 1e-9)),
            adjoint=dr.ReversibleAdjoint(),
            max_steps=None,
        )
        return sol.ts[-1]

    # `1 - exp(on - t) = 0.5`, before the second switch.
    time, slope = jax.jit(jax.value_and_grad(stop))(SWITCHES)
    np.testing.assert_allclose(time, SWITCHES[0] + jnp.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, [1, 0], atol=1e-5)


@pytest.mark.long
def test_step_to():
    """If all steps are given, the gradient is exact, also of outputs at their ends."""

    def loss(adjoint, ts):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(Network()),
            dr.ALF4(),
            *(ts[0], ts[-1], None, Y0, network_args()),
            saveat=dfx.SaveAt(steps=True, ts=jnp.array([0.33, 2.0])),
            stepsize_controller=dfx.StepTo(ts),
            adjoint=adjoint,
            max_steps=32,
        )
        written = jnp.isfinite(sol.ts)
        ys, ts = (jnp.where(written, x.T, 0) for x in (sol.ys, sol.ts))
        return jnp.sum(ys**2) + jnp.sum(jnp.sin(ts))

    ts = 3 * jnp.linspace(0, 1, 31) ** 1.5
    assert_same_gradient(loss, ts, tol=1e-10)
