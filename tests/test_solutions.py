"""Solutions are as accurate as their tolerances: in contracting flows, with entries of many
sizes, and between steps."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr

from .problems import cases, SOLVERS


COUPLED = dr.McCallumFoster(dfx.Tsit5())
with_restarts = pytest.mark.parametrize(
    "solver", cases((dr.ALF4(), COUPLED), more=SOLVERS[2:]), ids=repr
)


def pid(tol, atol=None):
    return dfx.PIDController(rtol=tol, atol=tol if atol is None else atol)


def relaxation(t, y, rate):
    return -rate * (y - jnp.cos(t))


def exact_relaxation(t, y0, rate):
    followed = (rate**2 * np.cos(t) + rate * np.sin(t)) / (1 + rate**2)
    return followed + (y0 - rate**2 / (1 + rate**2)) * np.exp(-rate * t)


@eqx.filter_jit
def at_steps(solver, rate, tol, y0, t1=6.0):
    saveat = dfx.SaveAt(steps=True)
    return dfx.diffeqsolve(
        dfx.ODETerm(relaxation),
        solver,
        jnp.zeros((), y0.dtype),
        jnp.asarray(t1, y0.dtype),
        None,
        y0,
        rate,
        saveat=saveat,
        stepsize_controller=pid(tol),
        max_steps=4096,
    )


@ft.cache
def largest_error(solver, rate, tol, dtype=jnp.float64):
    y0 = jnp.array([0.3], dtype)
    sol = at_steps(solver, jnp.asarray(rate, dtype), jnp.asarray(tol, dtype), y0)
    written = np.isfinite(sol.ts)
    exact = exact_relaxation(np.asarray(sol.ts, np.float64)[written], 0.3, rate)
    return np.max(np.abs(np.asarray(sol.ys)[written, 0] - exact))


@with_restarts
@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
def test_contracting(solver, dtype):
    for rate in (2.0, 10.0, 25.0, 50.0, 100.0, 200.0):
        for tol in (1e-1, 1e-2, 1e-3, 1e-4):
            error, beside = (
                largest_error(s, rate, tol, dtype) for s in (solver, dfx.Dopri5())
            )
            assert error < 10 * beside, (rate, tol, error, beside)


RATES = dict(one=jnp.full(5000, 0.3).at[1].set(20.0), all=jnp.linspace(1.0, 100.0, 5000))


@ft.cache
def at_rates(solver, contracting):
    """The largest error, and the number of steps."""
    rates = RATES[contracting]

    @eqx.filter_jit
    def solve():
        sol = dfx.diffeqsolve(
            dfx.ODETerm(relaxation),
            solver,
            *(0.0, 6.0, None),
            jnp.full_like(rates, 0.3),
            rates,
            stepsize_controller=pid(1e-3),
        )
        return sol.ys[0], sol.stats["num_steps"]

    y1, steps = solve()
    return np.max(np.abs(y1 - exact_relaxation(6.0, 0.3, np.asarray(rates)))), steps


@with_restarts
@pytest.mark.parametrize("contracting", cases(("one",), more=("all",)))
def test_many_entries(solver, contracting):
    """The solution is accurate where all of many entries contract, or just one of them,
    which hardly affects the norm of the errors."""
    error, steps = at_rates(solver, contracting)
    error_beside, steps_beside = at_rates(dfx.Dopri5(), contracting)
    assert error < 10 * error_beside
    assert steps < 3 * steps_beside


def oscillator_and_decay(t, y, rate):
    return jnp.stack([y[1], -y[0], -rate * y[2]])


@ft.cache
def errors_of_entries(solver, size):
    """The errors, relative to the size of each entry."""
    ts = jnp.linspace(0, 2, 21)

    @eqx.filter_jit
    def solve():
        sol = dfx.diffeqsolve(
            dfx.ODETerm(oscillator_and_decay),
            solver,
            *(0.0, 2.0, None),
            jnp.array([1.0, 0.0, size]),
            22.0,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=pid(1e-8, 1e-12 * jnp.array([1.0, 1.0, size])),
        )
        return sol.ys

    exact = np.stack([np.cos(ts), -np.sin(ts), size * np.exp(-22 * ts)], axis=1)
    return np.max(np.abs(solve() - exact), axis=0) / np.array([1, 1, size])


@with_restarts
@pytest.mark.parametrize("size", cases((1e-8,), more=(1e-10, 1e4)))
def test_entry_of_another_size(solver, size):
    """Entries of size 1 and of another size are accurate. A large one could hide the
    oscillation."""
    beside = errors_of_entries(dfx.Dopri5(), size)
    assert np.all(errors_of_entries(solver, size) < 30 * beside)


@pytest.mark.parametrize(
    "solver",
    cases((), slow=(dr.ALF4(), COUPLED, dr.ALF6(), dr.ALF8())),
    ids=repr,
)
def test_gradient_of_small_entry(solver):
    def gradient(adjoint):
        @jax.jit
        @jax.grad
        def run(inputs):
            y0, rate = inputs
            sol = dfx.diffeqsolve(
                dfx.ODETerm(oscillator_and_decay),
                solver,
                *(0.0, 2.0, 0.04),
                y0,
                rate,
                saveat=dfx.SaveAt(ts=jnp.linspace(0, 2, 21)),
                adjoint=adjoint,
            )
            return jnp.sum(sol.ys[:, 2]) / 1e-8 + jnp.sum(sol.ys[:, :2])

        return run((jnp.array([1.0, 0.0, 1e-8]), jnp.array(22.0)))

    ours = gradient(dr.ReversibleAdjoint(checkpoints=100))
    theirs = gradient(dfx.RecursiveCheckpointAdjoint())
    # Compare every entry by itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    ts = np.linspace(0, 2, 21)
    np.testing.assert_allclose(ours[1], np.sum(-ts * np.exp(-22 * ts)), rtol=3e-2)


@pytest.mark.parametrize(
    "solver", (dr.ALF2(), dfx.ReversibleHeun(), dfx.LeapfrogMidpoint()), ids=repr
)
def test_walk_back_is_measured_entry_by_entry(solver):
    """An error in a small entry is noticed beside a large entry that is right."""
    sizes = jnp.array([1.0, 1e-10])
    rates = jnp.array([0.1, 6.0])

    def final(y0, adjoint):
        term = dfx.ODETerm(lambda t, y, args: -rates * y)
        sol = dfx.diffeqsolve(term, solver, 0.0, 5.0, 0.01, y0, adjoint=adjoint)
        return jnp.sum(sol.ys[-1] / sizes)

    gradient = eqx.filter_jit(jax.grad(final))
    with pytest.raises(RuntimeError, match="missed a known state"):
        gradient(sizes, dr.ReversibleAdjoint(checkpoints=0))


@pytest.mark.more
@pytest.mark.parametrize(
    "solver",
    cases(
        (dr.BlanesMoan6(nystrom=True),),
        slow=(dr.ALF4(), dr.ALF6(), dr.ALF8(), COUPLED)
        + (dr.ALF2(), dfx.ReversibleHeun(), dfx.LeapfrogMidpoint()),
    ),
    ids=repr,
)
def test_entries_next_to_zero_are_not_refused(solver):
    """They are so at the start, at the end of a period, always, or at rest."""
    velocity = lambda t, p, args: p
    force = lambda t, q, args: jnp.array([-1.0, -1.0, -1.0, 0.0]) * q + args
    splits = isinstance(solver, dr.BlanesMoan6)
    if splits:
        terms = dfx.ODETerm(velocity), dfx.ODETerm(force)
    else:
        terms = dfx.ODETerm(lambda t, y, args: (y[1], force(t, y[0], args)))
    y0 = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([0.0, 1e-9, 0.0, 0.0])
    push = jnp.array([0.0, 0.0, 0.0, 1e-3])

    @eqx.filter_jit
    def gradient(adjoint):
        def final(inputs):
            y0, push = inputs
            sol = dfx.diffeqsolve(
                terms, solver, 0.0, 2 * np.pi, np.pi / 128, y0, push, adjoint=adjoint
            )
            return sum(jnp.sum(jnp.cos(y)) + jnp.sum(y) for y in sol.ys)

        return jax.grad(final)((y0, push))

    ours, theirs = map(gradient, (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), ours, theirs)


@pytest.mark.parametrize(
    "solver, error",
    ((dr.ALF2(), 1500), (dfx.ReversibleHeun(), 7), (dfx.LeapfrogMidpoint(), 2900)),
    ids=repr,
)
def test_solvers_that_do_not_restart(solver, error):
    """Their errors are those in `examples/benchmarks/README.md`."""
    sol = dfx.diffeqsolve(
        dfx.ODETerm(relaxation), solver, 0.0, 20.0, 0.1, jnp.array(1.0), 1.0
    )
    assert sol.result == dfx.RESULTS.successful
    assert abs(abs(sol.ys[0] - exact_relaxation(20.0, 1.0, 1.0)) / error - 1) < 0.05


# The interpolation of the method of order 8 has order 7.
@pytest.mark.parametrize("solver, ratio", ((dr.ALF4(), 5), (dr.ALF6(), 5), (dr.ALF8(), 7)))
def test_between_steps(solver, ratio):
    """The error is at most `ratio` times that at steps, up to the stability limit."""

    @eqx.filter_jit
    def errors(rate, dt0):
        steps, between = dfx.SubSaveAt(steps=True), jnp.linspace(0, 1, 321)[1:-1]
        sol = dfx.diffeqsolve(
            dfx.ODETerm(relaxation),
            solver,
            0.0,
            40 * dt0,
            dt0,
            jnp.array(0.3),
            rate,
            saveat=dfx.SaveAt(subs=[steps, dfx.SubSaveAt(ts=40 * dt0 * between)]),
            max_steps=41,
        )
        return [
            jnp.max(
                jnp.where(jnp.isfinite(t), jnp.abs(y - exact_relaxation_of(t, rate)), 0)
            )
            for t, y in zip(sol.ts, sol.ys, strict=True)
        ]

    def exact_relaxation_of(t, rate):
        followed = (rate**2 * jnp.cos(t) + rate * jnp.sin(t)) / (1 + rate**2)
        start = 0.3 - rate**2 / (1 + rate**2)
        return followed + start * jnp.exp(-rate * t)

    limit = {4: 3.5, 6: 5.0, 8: 3.0}[solver.order(None)]
    for rate in (2.0, 25.0, 200.0):
        for product in (0.01, 0.03, 0.1, 0.3, 1.0, 1.5, 2.0, 2.5, limit):
            at_ends, between = errors(jnp.array(rate), jnp.array(product / rate))
            assert between < ratio * at_ends + 1e-14, (rate, product, at_ends, between)


RATES_OF_OUTPUTS = 2.0, 25.0, 200.0


@ft.cache
def errors_of_outputs(solver):
    """The largest error between steps, at each rate."""
    ts = jnp.linspace(0, 6, 200)

    @eqx.filter_jit
    def solve(rate):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(relaxation),
            solver,
            *(0.0, 6.0, None),
            jnp.array(0.3),
            rate,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=pid(1e-4),
        )
        return sol.ys

    return np.array(
        [
            np.max(np.abs(solve(jnp.array(r)) - exact_relaxation(np.asarray(ts), 0.3, r)))
            for r in RATES_OF_OUTPUTS
        ]
    )


@with_restarts
def test_outputs_under_a_controller(solver):
    ours, tsit5 = errors_of_outputs(solver), errors_of_outputs(dfx.Tsit5())
    assert np.all(ours < 10 * tsit5), (RATES_OF_OUTPUTS, ours, tsit5)


@pytest.mark.parametrize("solver", cases(SOLVERS[1:2], slow=SOLVERS[2:]), ids=repr)
def test_derivative_and_newton(solver):
    """They are right even if the deviation of `v` exceeds the error, in long steps."""

    @jax.jit
    def solve(y0):
        saveat = dfx.SaveAt(dense=True)
        term = dfx.ODETerm(lambda t, y, args: -y)
        sol = dfx.diffeqsolve(term, solver, 0.0, 5.0, 1.0, y0, saveat=saveat)
        return jax.vmap(sol.derivative)(jnp.linspace(0.5, 5, 10))

    exact = -10 * np.exp(-np.linspace(0.5, 5, 10))
    np.testing.assert_allclose(solve(jnp.array(10.0)), exact, atol=0.1)

    @ft.partial(jax.jit, static_argnums=1)
    def time_of_event(y0, root_finder):
        event = dfx.Event(lambda t, y, args, **kwargs: y - 0.3, root_finder)
        term = dfx.ODETerm(lambda t, y, args: -y)
        return dfx.diffeqsolve(term, solver, 0.0, 20.0, 1.0, y0, event=event).ts[0]

    newton, bisection = (
        time_of_event(jnp.array(10.0), finder(1e-6, 1e-6))
        for finder in (optx.Newton, optx.Bisection)
    )
    assert abs(newton - bisection) < 1e-5
    assert abs(newton - np.log(10 / 0.3)) < 0.1
