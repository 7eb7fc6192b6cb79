"""Problems on which explicit reversible methods blow up, forwards or backwards."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import cases, kepler, lorenz, PID, reference, relative_error


FIXED = dfx.ConstantStepSize()


def relaxation(t, y, rate):
    a, b = y
    return jnp.stack([-rate * (a - jnp.cos(t)) + 0.3 * b, jnp.sin(a) - 0.1 * b])


def scaled_lorenz(t, y, scale):
    return scale * lorenz(t, y, None)


def van_der_pol(t, y, mu):
    q, p = y
    return jnp.stack([p, mu * (1 - q**2) * p - q])


def lotka_volterra(t, y, scale):
    a, b = y
    return scale * jnp.stack([a * (1.5 - b), b * (a - 3)])


def pendulum(t, y, scale):
    q, p = y
    return jnp.stack([p, -scale * jnp.sin(q)])


def scaled_kepler(t, y, scale):
    q, p = kepler(t, (y[:2], y[2:]), None)
    return jnp.concatenate([q, scale * p])


def pid(tol):
    return dfx.PIDController(rtol=tol, atol=tol)


# field, y0, parameter, t1
RELAXATION = relaxation, jnp.array([1.0, 0.5]), 10.0, 20.0
FAST_RELAXATION = relaxation, jnp.array([1.0, 0.5]), 40.0, 20.0
LORENZ = scaled_lorenz, jnp.array([1.0, 2.0, 20.0]), 1.0, 10.0
VAN_DER_POL = van_der_pol, jnp.array([2.0, 0.0]), 5.0, 20.0
LOTKA_VOLTERRA = lotka_volterra, jnp.array([1.0, 1.0]), 1.0, 10.0
PENDULUM = pendulum, jnp.array([1.0, 0.0]), 1.0, 20.0
KEPLER = scaled_kepler, jnp.array([0.4, 0.0, 0.0, 2.0]), 1.0, 10 * np.pi


def solve(problem, solver, controller, steps, adjoint, y0, parameter):
    field, _, _, t1 = problem
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        t1,
        jnp.array(t1 / steps),
        y0,
        parameter,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=8192,
    )


def value_and_grad(problem, solver, controller, steps, adjoint):
    _, y0, parameter, _ = problem

    @jax.jit
    def run(y0, parameter):
        def final(y0, parameter):
            sol = solve(problem, solver, controller, steps, adjoint, y0, parameter)
            return jnp.sum(sol.ys), (sol.ys[0], sol.stats)

        return jax.value_and_grad(final, argnums=(0, 1), has_aux=True)(y0, parameter)

    return run(y0, jnp.array(parameter))


# problem, solver, controller, steps, bounds on the error and on the restarts
HARD = cases(
    (),
    more=((LORENZ, dr.ALF6(), pid(1e-9), 1000, 1e-4, 20),),
    slow=(
        (FAST_RELAXATION, dr.ALF6(), FIXED, 1600, 1e-10, 80),
        (FAST_RELAXATION, dr.ALF6(), pid(1e-4), 1600, 1e-4, 80),
        (VAN_DER_POL, dr.ALF4(), pid(1e-5), 400, 1e-4, 40),
        (RELAXATION, dr.ALF6(), FIXED, 400, 1e-9, 25),
        (RELAXATION, dr.ALF6(), pid(1e-6), 400, 1e-6, 25),
        (RELAXATION, dr.ALF4(), pid(1e-6), 400, 1e-5, 40),
        (LORENZ, dr.ALF6(), FIXED, 1000, 1e-6, 12),
        (VAN_DER_POL, dr.ALF8(), pid(1e-5), 400, 1e-5, 30),
    ),
)


@pytest.mark.parametrize("problem, solver, controller, steps, error, restarts", HARD)
def test_hard_problems(problem, solver, controller, steps, error, restarts):
    field, y0, parameter, t1 = problem
    arguments = problem, solver, controller, steps
    # The default tolerance would refuse the gradients that are off by more than 1e-8.
    ours = dr.ReversibleAdjoint(checkpoints=restarts, drift_tol=1e-6)
    (_, (y1, stats)), grad = value_and_grad(*arguments, ours)
    assert np.max(np.abs(y1 - reference(field, y0, 0.0, t1, parameter))) < error
    assert 0 < stats["num_restarts"] <= restarts
    _, expected = value_and_grad(*arguments, dfx.RecursiveCheckpointAdjoint())
    assert relative_error(grad, expected) < 1e-6


def _doses(t, y, args):
    """An infusion, which is absorbed and eliminated."""
    gut, blood, tissue = y
    absorbed, returned = gut - args, blood / 5 - tissue / 20
    return jnp.stack([-absorbed, gut - returned, 3 * blood / 40 - tissue / 20])


def _damped(t, y, args):
    return jnp.stack([y[1], -y[0] - 0.3 * y[1] + args])


@pytest.mark.parametrize(
    "solver, field, y0, t1",
    cases(
        ((dr.ALF4(), _doses, (100.0, 0.0, 0.0), 12.0),),
        more=(
            (dr.ALF6(), _doses, (100.0, 0.0, 0.0), 12.0),
            (dr.ALF4(), _damped, (100.0, 0.0), 60.0),
            (dr.ALF6(), _damped, (100.0, 0.0), 60.0),
        ),
    ),
)
def test_entries_that_have_decayed(solver, field, y0, t1):
    """They take as many steps in single precision as in double precision, although `v` was
    rounded when they were large. In single precision their gradient is right."""
    steps = dfx.PIDController(rtol=1e-5, atol=1e-7)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(y0, force):
        dtype = y0.dtype
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver, jnp.zeros((), dtype), jnp.asarray(t1, dtype)),
            *(None, y0, force),
            stepsize_controller=steps,
            saveat=dfx.SaveAt(ts=jnp.linspace(t1 / 2, t1, 5, dtype=dtype)),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.sum(jnp.tanh(sol.ys)), sol.stats

    def of(dtype):
        return run(jnp.array(y0, dtype), jnp.zeros((), dtype))

    (value, stats), grad = of(jnp.float32)
    (expected, double), expected_grad = of(jnp.float64)
    assert stats["num_steps"] <= 1.3 * double["num_steps"]
    assert stats["num_restarts"] <= double["num_restarts"] + 3
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert relative_error(grad, expected_grad) < 1e-3


def test_van_der_pol_evaluations():
    adjoint = dfx.RecursiveCheckpointAdjoint()
    sol = solve(VAN_DER_POL, dr.ALF4(), pid(1e-5), 400, adjoint, *VAN_DER_POL[1:3])
    # Including the evaluations at the start and at restarts.
    assert 5 * sol.stats["num_steps"] + 1 + 40 <= 1500


@pytest.mark.parametrize("problem", (KEPLER, LOTKA_VOLTERRA, PENDULUM))
@pytest.mark.parametrize(
    "solver, steps", cases(((dr.ALF4(), 4000),), slow=((dr.ALF6(), 1000),))
)
@pytest.mark.parametrize("controller, restarts", ((FIXED, 0), (PID, 5)))
def test_conservative(problem, solver, steps, controller, restarts):
    adjoint = dr.ReversibleAdjoint()
    sol = solve(problem, solver, controller, steps, adjoint, *problem[1:3])
    assert sol.stats["num_restarts"] <= restarts


def test_deviation_that_changes_its_sign():
    """The estimate of a deviation may vanish by chance, in one entry after one step. The
    next step is not rejected for that until it is tiny."""
    spiral = jnp.array([[-0.2, 0.4], [-0.4, -0.2]])
    controller = dfx.PIDController(rtol=1e-3, atol=1e-6)

    @jax.vmap
    def rejected(angle):
        y0 = 1.5 * jnp.array([jnp.cos(angle), jnp.sin(angle)])
        problem = (lambda t, y, spiral: spiral @ y), y0, spiral, 20.0
        adjoint = dfx.RecursiveCheckpointAdjoint()
        sol = solve(problem, dr.ALF4(), controller, 200, adjoint, y0, spiral)
        return sol.stats["num_rejected_steps"]

    # Of 17 or 18 steps.
    assert np.max(rejected(jnp.linspace(0.0, 3.0, 64))) <= 5


@pytest.mark.slow
def test_batch():
    """Each element of a batch restarts at its own steps."""

    def final(rate, adjoint):
        problem = relaxation, *RELAXATION[1:3], 5.0
        y0 = jnp.array([1.0, 0.5])
        sol = solve(problem, dr.ALF4(), PID, 50, adjoint, y0, rate)
        return jnp.sum(sol.ys**2)

    rates = jnp.array([0.5, 12.0, 5.0])
    batched = jax.vmap(jax.grad(lambda r: final(r, dr.ReversibleAdjoint(20))))(rates)
    alone = [jax.grad(final)(rate, dfx.RecursiveCheckpointAdjoint()) for rate in rates]
    assert relative_error(batched, jnp.stack(alone)) < 1e-9


@pytest.mark.long
def test_one_of_many_entries():
    """Of many entries the only one that contracts is noticed, and has a right gradient."""
    rates = jnp.full(5000, 0.1).at[3].set(15.0)
    y0 = jnp.linspace(0.5, 1.0, len(rates))

    def gradient(adjoint):
        @jax.jit
        def run(rates):
            def final(rates):
                sol = dfx.diffeqsolve(
                    dfx.ODETerm(lambda t, y, rates: -rates * (y - jnp.cos(t))),
                    dr.ALF4(),
                    0.0,
                    2.0,
                    jnp.array(0.02),
                    y0,
                    rates,
                    adjoint=adjoint,
                )
                return jnp.sum(sol.ys**2), sol.stats.get("num_restarts")

            return jax.grad(final, has_aux=True)(rates)

        return run(rates)

    grad, restarts = gradient(dr.ReversibleAdjoint(checkpoints=12))
    assert 0 < restarts <= 12
    expected, _ = gradient(dfx.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(grad, expected, rtol=1e-8)
