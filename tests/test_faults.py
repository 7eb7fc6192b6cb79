"""A solve fails as it does in Diffrax, and does not affect other elements of a batch."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import BITWISE, cases, PID, relative_error


FIXED = dfx.ConstantStepSize()
T1 = 2.0
TS = jnp.linspace(0.0, T1, 5)
SOLVERS = (dr.ALF4(), BITWISE)
DEFAULT = dfx.RecursiveCheckpointAdjoint()


def field(t, y, args):
    """Equals `fault` within a window of time, unless `fault` is zero."""
    rate, fault = args
    healthy = rate * jnp.sin(y) + jnp.cos(t)
    return jnp.where((fault != 0) & (t > 1) & (t < 1.2), fault, healthy)


def solve(args, adjoint, solver, controller, field=field, max_steps=200, throw=False):
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        T1,
        jnp.array(0.05),
        jnp.array([1.0, 0.3]),
        args,
        saveat=dfx.SaveAt(ts=TS, t1=True),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )


def value_and_grad(args, adjoint, solver, controller, **kwargs):
    return values_and_grads([args], adjoint, solver, controller, **kwargs)[0]


def values_and_grads(many, adjoint, solver, controller, **kwargs):
    """Outputs, and gradients of the sum of squares of the saved states with respect to the
    rate, for several `args`."""

    @jax.jit
    @jax.vmap
    def run(args):
        def loss(rate):
            sol = solve((rate, args[1]), adjoint, solver, controller, **kwargs)
            saved = jnp.where(jnp.isinf(sol.ts)[:, None], 0, sol.ys)
            return jnp.sum(saved**2), (sol.ts, sol.ys, sol.stats, sol.result)

        return jax.value_and_grad(loss, has_aux=True)(args[0])

    results = map(run, many)
    return [(outputs, grad) for (_, outputs), grad in results]


def assert_forward_as_default(ours, default):
    ts, ys, stats, result = ours
    default_ts, default_ys, default_stats, default_result = default
    np.testing.assert_array_equal(ts, default_ts)
    np.testing.assert_array_equal(ys, default_ys)
    assert np.array_equal(stats["num_steps"], default_stats["num_steps"])
    assert np.array_equal(result._value, default_result._value)


RATES = jnp.array([0.5, 1.0, -0.7])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, solver, controller",
    (
        (jnp.nan, SOLVERS[0], PID),
        (jnp.nan, SOLVERS[1], PID),
        (jnp.inf, SOLVERS[0], FIXED),
    ),
)
def test_not_finite(fault, solver, controller):
    """A fault in the second of three batch elements does not change the other gradients."""
    arguments = dr.ReversibleAdjoint(), solver, controller
    args = RATES, jnp.array([0.0, fault, 0.0])
    many = args, (RATES, jnp.zeros(3))
    (outputs, grad), (_, alone) = values_and_grads(many, *arguments)
    expected, _ = value_and_grad(args, DEFAULT, solver, controller)
    assert_forward_as_default(outputs, expected)
    _, _, _, result = outputs
    healthy = np.array([0, 2])
    assert np.all(result._value[healthy] == dfx.RESULTS.successful._value)
    # No step crosses the window: adaptive steps shrink before it until they run out.
    if controller is PID:
        assert result._value[1] == dfx.RESULTS.max_steps_reached._value
    else:
        assert np.isnan(grad[1])
    np.testing.assert_allclose(grad[healthy], alone[healthy], rtol=1e-13)


@pytest.mark.slow
def test_not_finite_raises():
    """Only the gradient raises: Diffrax does not check the states that it saves."""

    def loss(rate):
        sol = solve((rate, jnp.nan), dr.ReversibleAdjoint(), dr.ALF4(), FIXED, throw=True)
        return jnp.sum(sol.ys)

    assert np.isnan(loss(jnp.array(1.0)))
    with pytest.raises(RuntimeError, match="not finite"):
        eqx.filter_jit(jax.grad(loss))(jnp.array(1.0))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("solver", SOLVERS[:1], ids=repr)
def test_steps_run_out(solver):
    """The second of three batch elements runs out of steps. Its gradient is that of the
    outputs saved before."""

    def oscillating(t, y, args):
        rate, scale = args
        return rate * jnp.sin(y) + scale * jnp.sin(20 * t) * y

    args = RATES, jnp.array([0.0, 60.0, 0.0])

    def run(adjoint):
        return value_and_grad(args, adjoint, solver, PID, field=oscillating, max_steps=100)

    outputs, grad = run(dr.ReversibleAdjoint(checkpoints=50))
    expected, expected_grad = run(DEFAULT)
    assert_forward_as_default(outputs, expected)
    _, _, _, result = outputs
    reached = result._value == dfx.RESULTS.max_steps_reached._value
    assert np.array_equal(reached, [False, True, False])
    assert relative_error(grad, expected_grad) < 1e-9


def test_steps_run_out_raises():
    """The error is raised even if only the gradient is used."""

    def loss(rate):
        adjoint = dr.ReversibleAdjoint()
        sol = solve((rate, 0.0), adjoint, dr.ALF4(), FIXED, max_steps=10, throw=True)
        return jnp.sum(sol.ys)

    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        eqx.filter_jit(jax.grad(loss))(jnp.array(1.0))


@pytest.mark.parametrize("solver", cases((), slow=SOLVERS[1:]), ids=repr)
def test_step_size_underflows(solver):
    """The field of the last of three batch elements has a pole."""
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6, dtmin=1e-4, force_dtmin=False)

    def pole(t, y, args):
        rate, at = args
        return rate * y / jnp.abs(t - at) ** 1.5

    args = RATES, jnp.array([5.0, 4.0, 1.3])

    def run(adjoint):
        return value_and_grad(args, adjoint, solver, controller, field=pole, max_steps=2000)

    outputs, grad = run(dr.ReversibleAdjoint(checkpoints=50))
    expected, expected_grad = run(DEFAULT)
    assert_forward_as_default(outputs, expected)
    _, _, _, result = outputs
    underflow = result._value == dfx.RESULTS.dt_min_reached._value
    assert np.array_equal(underflow, [False, False, True])
    assert relative_error(grad, expected_grad) < 1e-9


@pytest.mark.parametrize(
    "solver, never",
    cases(
        ((dr.ALF4(), jnp.inf),),
        more=(
            (dr.McCallumFoster(dfx.Tsit5(), coupling=1.0), jnp.inf),
            (dr.ALF4(), jnp.nan),
            (dr.ALF8(), jnp.inf),
            (dr.McCallumFoster(dfx.Tsit5()), jnp.inf),
        ),
    ),
)
def test_infinite_bounds(solver, never):
    """An entry that is infinite, or padded with NaN, changes nothing else. A gradient is
    refused in words."""
    bound = jnp.arange(3) == 2

    def loss(y0, value):
        norm = lambda error: jnp.max(jnp.abs(jnp.where(bound, 0, error)))
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.where(bound, 0, -(y**2))),
            solver,
            *(0.0, T1, 0.02, jnp.where(bound, value, y0)),
            saveat=dfx.SaveAt(ts=TS),
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-8, norm=norm),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys[:, :2] ** 2), sol.ys

    y0 = jnp.array([1.0, 3.0, 0.0])
    _, ys = jax.jit(loss)(y0, never)
    _, expected = jax.jit(loss)(y0, 0.0)
    np.testing.assert_array_equal(ys[:, :2], expected[:, :2])
    np.testing.assert_array_equal(ys[:, 2], never)
    with pytest.raises(RuntimeError, match="infinite bounds"):
        eqx.filter_jit(jax.grad(lambda y0: loss(y0, never)[0]))(y0)


def test_infinite_bounds_of_splittings():
    """So it is with positions and momenta."""
    zero_there = lambda t, x, args: jnp.where(jnp.isinf(x), 0, -x)
    terms = dfx.ODETerm(lambda t, p, args: p), dfx.ODETerm(zero_there)

    def outputs(bound):
        y0 = jnp.array([1.0, bound]), jnp.array([0.2, 0.0])
        sol = dfx.diffeqsolve(
            *(terms, dr.KahanLi8(), 0.0, T1, 0.3, y0), saveat=dfx.SaveAt(ts=TS)
        )
        return sol.ys[0]

    qs = outputs(jnp.inf)
    np.testing.assert_array_equal(qs[:, 0], outputs(0.0)[:, 0])
    np.testing.assert_array_equal(qs[:, 1], jnp.inf)


def test_infinite_state_is_recovered_from():
    """Steps that overflow are rejected. Diffrax divides the error by the state, and would
    divide infinity by infinity."""

    def blowing_up(t, y, args):
        return y**2 - jnp.exp(t) * y**5

    sol = dfx.diffeqsolve(
        dfx.ODETerm(blowing_up),
        dr.ALF6(),
        0.0,
        1.0,
        # Far too long a first step: `y` overflows in it.
        jnp.array(1.0),
        jnp.array([30.0, 1.0]),
        stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
        max_steps=2000,
    )
    assert sol.stats["num_rejected_steps"] > 0
    assert np.all(np.isfinite(sol.ys))
