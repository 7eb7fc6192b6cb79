"""Gradients with respect to the ends and the output times of a solve."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import (
    as_terms,
    BITWISE,
    cases,
    FAMILIES,
    families,
    Network,
    network_args,
    relative_error,
    sum_of_squares,
    Y0,
)


NETWORK = Network()
T0, T1 = jnp.array(0.2), jnp.array(3.0)
# The last is the end of the solve, which has a gradient of its own.
TS = jnp.array([0.3, 1.1, 1.15, 2.7, 3.0])
FIXED = dfx.ConstantStepSize()
PID = dfx.PIDController(rtol=1e-7, atol=1e-7)
STEP_TO = dfx.StepTo(jnp.concatenate([T0[None], jnp.linspace(0.4, 2.7, 40), T1[None]]))
JUMPS = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.8, 1.9]))


def moments(t, y, args):
    return {"t": t, "moment": jax.tree.map(lambda y: jnp.sin(t) * y**2, y)}


SAVEATS = {
    "ends": lambda ts: dfx.SaveAt(t0=True, t1=True),
    "ts": lambda ts: dfx.SaveAt(ts=ts),
    "fn": lambda ts: dfx.SaveAt(t0=True, t1=True, ts=ts, fn=moments),
    "subs": lambda ts: dfx.SaveAt(
        subs=[dfx.SubSaveAt(ts=ts[:3]), dfx.SubSaveAt(t1=True, ts=ts, fn=moments)]
    ),
    "steps": lambda ts: dfx.SaveAt(ts=ts, steps=2, t1=True),
    "dense": lambda ts: dfx.SaveAt(dense=True, t1=True, solver_state=True),
}


def loss(adjoint, controller, saveat, solver, t0, t1, ts, y0=Y0, field=NETWORK):
    sol = dfx.diffeqsolve(
        as_terms(field),
        solver,
        t0,
        t1,
        None if isinstance(controller, dfx.StepTo) else jnp.array(0.04),
        y0,
        network_args(),
        saveat=SAVEATS[saveat](ts),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=1000,
    )
    times = [jnp.sin(t) for t in jax.tree.leaves(sol.ts)]
    total = sum_of_squares(sol.ys) + sum_of_squares(times)
    if saveat == "dense":
        # Times in the first and in the last step are among them.
        at = jnp.array([0.21, 0.5, 1.1, 2.3, 2.99])
        total += sum_of_squares((jax.vmap(sol.evaluate)(at), jax.vmap(sol.derivative)(at)))
        total += sum_of_squares(sol.solver_state.v)
    return total


def gradients(controller, saveat, solver, argnums, **kwargs):
    @eqx.filter_jit
    def gradient(adjoint):
        def of(*times):
            return loss(adjoint, controller, saveat, solver, *times, **kwargs)

        return jax.grad(of, argnums)(T0, T1, TS)

    return gradient(dr.ReversibleAdjoint()), gradient(dfx.RecursiveCheckpointAdjoint())


CASES = cases(
    ((JUMPS, "fn"),),
    slow=((PID, "dense"), (FIXED, "subs"), (PID, "ts"), (STEP_TO, "subs")),
)


@pytest.mark.long
@pytest.mark.parametrize("controller, saveat", CASES)
def test_against_default(controller, saveat):
    """Gradients equal those of the default adjoint where step locations do not depend on
    the times, and otherwise agree to the accuracy of the solve."""
    ours, default = gradients(controller, saveat, dr.ALF4(), (0, 1, 2))
    scale = max(float(jnp.max(jnp.abs(g))) for g in default)
    moving = {"t0": controller is not STEP_TO, "t1": controller is FIXED, "ts": False}
    for g, e, name in zip(ours, default, moving, strict=True):
        # The default adjoint itself has such errors in this solve, see below.
        tol = 5e-4 if moving[name] else 1e-10
        assert np.max(np.abs(g - e)) < tol * scale, name
    # No gradient is zero where the default one is not.
    assert all(jnp.any(g != 0) for g, e in zip(ours, default, strict=True) if jnp.any(e))


@pytest.mark.parametrize("controller", cases((), slow=(PID, FIXED)))
def test_against_true_solution(controller):
    """Gradients with fixed step locations are as accurate as those of the default adjoint,
    which moves the steps."""

    def gradient(adjoint, solver, controller):
        @jax.jit
        def run(t0, t1):
            def of(t0, t1):
                return loss(adjoint, controller, "fn", solver, t0, t1, TS)

            return jnp.stack(jax.grad(of, (0, 1))(t0, t1))

        return run(T0, T1)

    default = dfx.RecursiveCheckpointAdjoint()
    tight = dfx.PIDController(rtol=1e-11, atol=1e-11)
    true = gradient(default, dr.ALF8(), tight)
    errors = (
        np.abs(gradient(adjoint, dr.ALF4(), controller) - true)
        for adjoint in (dr.ReversibleAdjoint(), default)
    )
    ours, theirs = (np.max(e) / np.max(np.abs(true)) for e in errors)
    assert ours < max(2 * theirs, 1e-8)
    assert ours < 5e-6


@pytest.mark.parametrize("solver", cases((), slow=(dr.ALF6(), BITWISE)), ids=repr)
def test_solvers(solver):
    ours, default = gradients(STEP_TO, "subs", solver, (0, 1, 2))
    assert relative_error(ours, default) < 1e-10


@families
def test_families(family):
    solver, field, y0, _, _ = FAMILIES[family]
    kwargs = dict(field=field, y0=y0)
    ours, default = gradients(STEP_TO, "subs", solver, (0, 1, 2), **kwargs)
    assert relative_error(ours, default) < 1e-10


@pytest.mark.parametrize("argnums", cases((), slow=(((0,),), ((1,),))))
def test_one_at_a_time(argnums):
    ours, default = gradients(STEP_TO, "fn", dr.ALF4(), argnums)
    assert relative_error(ours, default) < 1e-10


@pytest.mark.parametrize(
    "controller, argnums", cases((), slow=((STEP_TO, (0, 1, 2)), (PID, (1, 2))))
)
def test_ends_of_steps_that_do_not_move(controller, argnums):
    ours, default = gradients(controller, "steps", dr.ALF4(), argnums)
    assert relative_error(ours, default) < 1e-10


@pytest.mark.parametrize("controller", cases((PID,), more=(FIXED,)), ids=repr)
def test_first_step_that_follows_the_end(controller):
    """`dt0` may be computed from what is differentiated, and is held fixed as other steps
    are."""

    def final(t1, detach):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.cos(t) * y),
            dr.ALF6(),
            *(0.3, t1, detach(t1 - 0.3) / 40, jnp.array(1.0)),
            stepsize_controller=controller,
            adjoint=dr.ReversibleAdjoint(),
        )
        return sol.ys[0]

    t1 = jnp.array(2.0)
    gradient = jax.grad(lambda t1: final(t1, lambda x: x))(t1)
    held_fixed = jax.grad(lambda t1: final(t1, jax.lax.stop_gradient))(t1)
    np.testing.assert_array_equal(gradient, held_fixed)
    exact = np.exp(np.sin(2.0) - np.sin(0.3)) * np.cos(2.0)
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)


@pytest.mark.slow
def test_closed_form():
    """For `y' = cos(t) y`, gradients equal the closed form, in both directions of time."""

    @jax.jit
    def run(t0, t1):
        def final(t0, t1):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: jnp.cos(t) * y),
                dr.ALF6(),
                t0,
                t1,
                jnp.sign(jax.lax.stop_gradient(t1 - t0)) * 0.05,
                jnp.array(1.0),
                adjoint=dr.ReversibleAdjoint(),
            )
            return sol.ys[0]

        return final(t0, t1), *jax.grad(final, (0, 1))(t0, t1)

    for t0, t1 in ((0.3, 2.0), (2.0, 0.3)):
        y1, t0_bar, t1_bar = run(jnp.array(t0), jnp.array(t1))
        assert abs(y1 - np.exp(np.sin(t1) - np.sin(t0))) < 1e-9
        assert abs(t0_bar + y1 * np.cos(t0)) < 1e-8
        assert abs(t1_bar - y1 * np.cos(t1)) < 1e-8


@pytest.mark.more
def test_batch():
    """A batch of solves of different, differentiated lengths has the gradients of each."""

    @jax.jit
    def run(t1s):
        def final(t1):
            adjoint = dr.ReversibleAdjoint()
            return loss(adjoint, PID, "ends", dr.ALF4(), T0, t1, TS)

        return jax.vmap(jax.grad(final))(t1s), jnp.stack([jax.grad(final)(t) for t in t1s])

    batched, alone = run(jnp.array([0.5, 1.0, 2.5]))
    assert relative_error(batched, alone) < 1e-12


@pytest.mark.slow
def test_no_steps():
    """If `t0 == t1`, gradients equal those of the default adjoint."""

    def gradient(adjoint):
        def of(t0, t1, ts):
            return loss(adjoint, FIXED, "ts", dr.ALF4(), t0, t1, ts)

        return jax.grad(of, (0, 1, 2))(T1, T1, jnp.array([3.0, 3.0]))

    ours, default = (
        gradient(adjoint)
        for adjoint in (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    for g, e in zip(ours, default, strict=True):
        assert np.allclose(g, e)


def test_leapfrog_midpoint():
    """Its gradients with respect to `t0` and `t1` converge with order one."""

    def gradient(solver, steps):
        def loss(ends):
            t0, t1 = ends
            term = dfx.ODETerm(lambda t, y, args: jnp.sin(y + t))
            dt0 = jnp.asarray(1.5 / steps)
            solve = term, solver, t0, t1, dt0, jnp.array([0.3, 1.0])
            return jnp.sum(dfx.diffeqsolve(*solve, adjoint=dr.ReversibleAdjoint()).ys ** 2)

        return jax.grad(loss)(jnp.array([0.25, 1.75]))

    exact = gradient(dr.ALF6(), 64)
    coarse, fine = (gradient(dfx.LeapfrogMidpoint(), n) - exact for n in (64, 256))
    assert np.all(np.abs(np.log(np.abs(coarse / fine)) / np.log(4) - 1) < 0.2)
