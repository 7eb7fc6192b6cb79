"""Measured orders of the solution, of `v`, and of the interpolation between steps."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import cases, kepler, lorenz, reference, SOLVERS


some_solvers = pytest.mark.parametrize(
    "solver", cases(SOLVERS[1:3], more=(SOLVERS[0], SOLVERS[3])), ids=repr
)


def forced(t, y, args):
    """Not autonomous, not Hamiltonian, neither expanding nor contracting throughout."""
    del args
    a, b = y
    return jnp.stack([b * jnp.cos(t) - 0.1 * a, -jnp.sin(a) + a * b * jnp.sin(2 * t) / 2])


Y0 = jnp.array([1.0, 0.5])

# Numbers of steps over [0, 3]: enough for the leading term of the error to dominate, and
# few enough to stay above the rounding floor.
STEPS = {2: (64, 128, 256), 4: (24, 48, 96), 6: (10, 20, 40), 8: (12, 24)}


@eqx.filter_jit
def solve(solver, dt0, saveat, t0=0.0, t1=3.0, y0=Y0, field=forced):
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, t0, t1, dt0, y0, saveat=saveat, max_steps=4096
    )


def slopes(error_of, steps):
    errors = [error_of(jnp.array(3.0 / n)) for n in steps]
    assert min(errors) > 1e-13, "below the rounding floor; slopes mean nothing"
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("backwards", cases((False,), slow=(True,)))
def test_solution_and_v(solver, backwards):
    order = solver.order(None)
    t0, t1 = (3.0, 0.0) if backwards else (0.0, 3.0)
    exact = reference(forced, Y0, t0, t1)
    exact_v = forced(jnp.array(t1), exact, None)
    saveat = dfx.SaveAt(t1=True, solver_state=True)

    def errors(dt0):
        sol = solve(solver, -dt0 if backwards else dt0, saveat, t0, t1)
        return sol.ys[0] - exact, sol.solver_state.v - exact_v

    solution = slopes(lambda dt0: np.max(np.abs(errors(dt0)[0])), STEPS[order])
    assert np.all(solution > order - 0.4), solution
    assert solution[-1] < order + 0.4, solution
    v = slopes(lambda dt0: np.max(np.abs(errors(dt0)[1])), STEPS[order])
    assert np.all(v > order - 0.4), v


@some_solvers
def test_between_the_steps(solver):
    """Dense output and its derivative have their order at times that no step hits."""
    order = solver.tableau.continuous_extension.order
    ts = jnp.linspace(0.0, 3.0, 97)[1:-1]
    exact = dfx.diffeqsolve(
        dfx.ODETerm(forced),
        dfx.Dopri8(),
        0.0,
        3.0,
        None,
        Y0,
        saveat=dfx.SaveAt(ts=ts),
        stepsize_controller=dfx.StepTo(jnp.linspace(0.0, 3.0, 97 * 8 - 7)),
        max_steps=4096,
    ).ys
    exact_derivative = jax.vmap(forced, in_axes=(0, 0, None))(ts, exact, None)
    steps = {2: (64, 128), 4: (13, 26, 52), 6: (5, 10, 20), 7: (10, 20)}[order]

    def error(dt0):
        return np.max(np.abs(solve(solver, dt0, dfx.SaveAt(ts=ts)).ys - exact))

    def derivative_error(dt0):
        sol = solve(solver, dt0, dfx.SaveAt(dense=True))
        return np.max(np.abs(jax.vmap(sol.derivative)(ts) - exact_derivative))

    # Slopes exceed the order where the next term of the error is the larger one.
    measured = slopes(error, steps)
    assert np.all(measured > order - 0.4), measured
    measured = slopes(derivative_error, steps)
    assert np.all(measured > order - 1.4), measured


@some_solvers
def test_ends_of_steps_are_exact(solver):
    """An output at the end of a step is the state there, to the bit."""
    steps = jnp.linspace(0.0, 3.0, 8)
    controller = dfx.StepTo(steps)
    saveat = dfx.SaveAt(subs=[dfx.SubSaveAt(ts=steps[1:]), dfx.SubSaveAt(steps=1)])
    sol = dfx.diffeqsolve(
        dfx.ODETerm(forced),
        solver,
        0.0,
        3.0,
        None,
        Y0,
        saveat=saveat,
        stepsize_controller=controller,
        max_steps=7,
    )
    assert np.array_equal(sol.ys[0], sol.ys[1])


@pytest.mark.parametrize("solver, bound", ((dr.ALF4(), 1.5e-6), (dr.ALF6(), 1e-7)))
def test_lorenz(solver, bound):
    """The error is below `bound` with 800 evaluations, and one at the start."""
    y0 = jnp.array([1.0, 2.0, 20.0])
    exact = reference(lorenz, y0, 0.0, 1.0)
    dt0 = jnp.array(solver.tableau.stages / 800)
    sol = solve(solver, dt0, dfx.SaveAt(t1=True), 0.0, 1.0, y0, lorenz)
    assert sol.stats["num_steps"] * solver.tableau.stages == 800
    assert np.max(np.abs(sol.ys[0] - exact)) < bound


@pytest.mark.parametrize("solver", cases(SOLVERS[1:2], more=SOLVERS[2:]), ids=repr)
def test_tolerance(solver):
    """The error on a Kepler orbit is between 0.1 and 300 times the tolerance."""
    y0 = (jnp.array([0.4, 0.0]), jnp.array([0.0, 2.0]))
    period = 2 * np.pi
    errors = []
    for tol in (1e-5, 1e-7, 1e-9):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(kepler),
            solver,
            0.0,
            period,
            None,
            y0,
            stepsize_controller=dfx.PIDController(rtol=tol, atol=tol),
        )
        errors.append(np.max(np.abs(sol.ys[0][0] - y0[0])) / tol)
    assert max(errors) < 300, errors
    assert min(errors) > 0.1, errors


def test_float32():
    """Solves in float32 are accurate to its rounding, and return float32 throughout."""
    y0 = Y0.astype(jnp.float32)
    for solver in SOLVERS[1:]:
        sol = dfx.diffeqsolve(
            dfx.ODETerm(forced),
            solver,
            jnp.float32(0),
            jnp.float32(3),
            jnp.float32(0.1),
            y0,
            saveat=dfx.SaveAt(t1=True, solver_state=True),
        )
        assert sol.ys.dtype == sol.solver_state.v.dtype == jnp.float32
        exact = reference(forced, Y0, 0.0, 3.0)
        assert np.max(np.abs(sol.ys[0].astype(jnp.float64) - exact)) < 1e-5
