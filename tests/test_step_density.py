"""`StepDensityController`: its steps, their reversal, energies and gradients."""

import functools
import math
from types import SimpleNamespace
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr
from diffrax_reversible._controller.step_density_state import StepDensityState
from diffrax_reversible._controller.time_scale import squared_time_scale
from diffrax_reversible._exact_sum import LowPart

from . import problems
from .problems import (
    as_terms,
    BITWISE,
    cases,
    FAMILIES,
    families,
    Network,
    network_args,
    sum_of_squares,
)


PERIOD = 2 * np.pi


def kepler(t, y, mass):
    q, p = y[:2], y[2:]
    return jnp.concatenate([p, -mass * q / jnp.sum(q**2) ** 1.5])


def perihelion(e):
    return jnp.array([1 - e, 0.0, 0.0, np.sqrt((1 + e) / (1 - e))])


def wish(t, y, args):
    """A step size proportional to the period of a circular orbit at that distance."""
    return 0.04 * jnp.sum(y[:2] ** 2) ** 0.75


def wished_rate(y):
    """`-d/dt log(wish)`, by hand."""
    return -1.5 * np.dot(y[:2], y[2:]) / np.sum(y[:2] ** 2)


def solve(adjoint, field, y0, args=None, *, solver=None, t0=0.0, t1=3.0, **kwargs):
    kwargs = dict(stepsize_controller=dr.StepDensityController(), dt0=None) | kwargs
    # Diffrax's default adjoint needs a bound.
    max_steps = None if isinstance(adjoint, dr.ReversibleAdjoint) else 512
    kwargs = dict(max_steps=max_steps) | kwargs
    solver = dr.ALF4() if solver is None else solver
    return dfx.diffeqsolve(
        as_terms(field),
        solver,
        t0,
        t1,
        y0=y0,
        args=args,
        adjoint=adjoint,
        **kwargs,
    )


# Steps follow the density, not an error estimate, and hardly round differently.
assert_same_gradient = functools.partial(problems.assert_same_gradient, rtol=1e-13)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver, dt0, t0, t1",
    cases(
        ((dr.ALF4(), None, 0.0, 3.0),),
        slow=((dr.ALF6(), -0.07, 3.0, -1.0), (BITWISE, None, 0.0, 3.0)),
    ),
)
def test_gradients(solver, dt0, t0, t1):
    """Without a bound on the number of steps, gradients equal those of the default adjoint
    with the same steps."""

    def loss(adjoint, y0, field, args):
        saveat = dfx.SaveAt(t0=True, t1=True, ts=jnp.linspace(t0, t1, 9))
        kwargs = dict(solver=solver, dt0=dt0, t0=t0, t1=t1, saveat=saveat)
        return sum_of_squares(solve(adjoint, field, y0, args, **kwargs).ys)

    assert_same_gradient(loss, jnp.array([1.0, 2.0, 0.5]), Network(), network_args())


@families
def test_families(family):
    solver, field, y0, _, _ = FAMILIES[family]
    # This solver records the start of the previous step, for every step.
    kwargs = dict(max_steps=200) if family == "LeapfrogMidpoint" else {}

    def loss(adjoint, y0, field, args):
        saveat = dfx.SaveAt(t1=True, ts=jnp.linspace(0, 3, 5))
        given = dict(solver=solver, saveat=saveat) | kwargs
        return sum_of_squares(solve(adjoint, field, y0, args, **given).ys)

    assert_same_gradient(loss, y0, field, network_args())


@pytest.mark.slow
def test_gradients_of_everything_saved():
    """Gradients are right for an event, ends of steps, dense output, a batch, and `t1`."""

    def loss(adjoint, y0, t1):
        saveat = dfx.SaveAt(steps=True, t1=True, dense=True)
        event = dfx.Event(
            lambda t, y, args, **kwargs: y[1] + 0.2, optx.Newton(1e-10, 1e-10)
        )
        sol = solve(
            adjoint, kepler, y0, 1.0, t1=t1, saveat=saveat, max_steps=400, event=event
        )
        return sum_of_squares((sol.ys, sol.evaluate(0.4), sol.derivative(1.1)))

    def batch(adjoint, y0, t1):
        return jnp.sum(jax.vmap(lambda y0: loss(adjoint, y0, t1))(y0))

    y0 = jnp.stack([perihelion(0.3), perihelion(0.6)])
    assert_same_gradient(batch, y0, jnp.array(5.0))


@pytest.mark.slow
def test_continued():
    """Gradients are right where a solve continues another with its controller state, and
    has a first step size of its own."""

    def loss(adjoint, y0):
        saveat = dfx.SaveAt(t1=True, controller_state=True, solver_state=True)
        first = solve(adjoint, kepler, y0, 1.0, t1=2.0, saveat=saveat)
        second = solve(
            adjoint,
            kepler,
            first.ys[0],
            1.0,
            t0=2.0,
            t1=6.0,
            dt0=0.01,
            controller_state=first.controller_state,
            solver_state=first.solver_state,
        )
        return sum_of_squares(second.ys)

    assert_same_gradient(loss, perihelion(0.5))


@pytest.mark.optimised
@pytest.mark.slow
def test_memory_is_flat():
    """Memory is the same to the byte for any length of the solve and any `max_steps`."""

    def temporary_bytes(t1, max_steps):
        def loss(y0):
            sol = solve(dr.ReversibleAdjoint(), kepler, y0, 1.0, t1=t1, max_steps=max_steps)
            return sum_of_squares(sol.ys)

        compiled = jax.jit(jax.grad(loss)).lower(perihelion(0.5)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few = temporary_bytes(1.0, 1_000_000)
    assert few == temporary_bytes(1e4, 10_000_000)
    # Without a bound the program differs, and takes a few bytes less.
    assert few - 256 <= temporary_bytes(1e4, None) <= few


def test_steps_are_those_of_the_recurrence():
    """The density follows `ρ += G(y_n)` from `1/s + G/2`, with `G` by hand."""
    y0 = perihelion(0.6)
    saveat = dfx.SaveAt(t0=True, steps=True)
    controller = dr.StepDensityController(wish)
    sol = solve(
        dr.ReversibleAdjoint(),
        kepler,
        y0,
        1.0,
        t1=PERIOD,
        saveat=saveat,
        max_steps=300,
        stepsize_controller=controller,
    )
    count = int(sol.stats["num_accepted_steps"])
    assert count == sol.stats["num_steps"] > 150
    ts, ys = np.asarray(sol.ts[: count + 1]), np.asarray(sol.ys[: count + 1])
    rates = np.array([wished_rate(y) for y in ys])
    density = 1 / wish(0.0, y0, None) + rates[0] / 2 + np.cumsum([0.0, *rates[1:]])
    # Except for the last step, which ends at `t1`.
    np.testing.assert_allclose(np.diff(ts)[:-1], 1 / density[: count - 1], rtol=1e-12)
    wished = np.array([wish(0.0, y, None) for y in ys])
    assert np.max(np.abs(np.log(np.diff(ts)[:-1] / wished[: count - 1]))) < 0.3


def test_time_scale():
    """The time scale equals closed forms, is proportional to the unit of time, and does not
    depend on the unit or the origin of the state."""

    def at(field, t, y, start, longest=1e3):
        squared = squared_time_scale(field, jnp.array(0.0), start, longest)
        return np.sqrt(squared(field, jnp.array(t), y))

    rotation = lambda t, y: 5 * jnp.array([-y[1], y[0]])
    # The square of `τ` is 0.6 times that of the time scale.
    y, factor = jnp.array([1.0, 2.0]), np.sqrt(1 + 0.36 / 1600)
    np.testing.assert_allclose(at(rotation, 0.0, y, -y), factor / 5, rtol=1e-6)
    decay = lambda t, y: -3 * y
    np.testing.assert_allclose(at(decay, 1.0, y / 9, y), factor / 3, rtol=1e-6)
    # A solve without an end does not bound it.
    slow = lambda t, y: decay(t, y) / 1e6
    np.testing.assert_allclose(at(slow, 0.0, y, y, np.inf), 1e6 * factor / 3, rtol=1e-6)
    constant = lambda t, y: jnp.ones_like(y)
    np.testing.assert_allclose(at(constant, 0.0, y, y, 7.0), 7)
    # Nor does an end that is far off, with which powers of derivatives would overflow.
    np.testing.assert_allclose(at(decay, 0.0, y, y, 1e90), factor / 3, rtol=1e-6)
    # Neither zero nor infinite where a derivative vanishes.
    wave = lambda t, y: jnp.cos(t) * jnp.ones_like(y)
    scales = [at(wave, t, y, y) for t in np.linspace(0, PERIOD, 50)]
    assert 0.7 < np.min(scales) <= np.max(scales) < 1.5

    @jax.jit
    def of_kepler(length, time, origin):
        """`T²` of Kepler's problem in other units."""

        def field(t, z):
            return kepler(t, (z - origin) / length, 1.0) * length / time

        start = perihelion(0.8) * length + origin
        y = jnp.array([0.3, 0.9, -0.7, 0.2]) * length + origin
        squared = squared_time_scale(field, jnp.array(0.0), start, 1e3)
        return squared(field, jnp.array(0.0), y)

    np.testing.assert_allclose(of_kepler(5.0, 1.0, 3.0), of_kepler(1.0, 1.0, 0.0))
    np.testing.assert_allclose(
        of_kepler(1.0, 7.0, 0.0), 49 * of_kepler(1.0, 1.0, 0.0), rtol=1e-4
    )


@pytest.mark.parametrize("start", (1.0, 0.999, 0.0))
def test_steps_of_a_solution_that_starts_at_rest(start):
    """Where the field and its derivative vanish at first, or nearly, and later the field
    alone, steps stay about as long as elsewhere, in all units, in single precision too."""
    single = jnp.float32

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def steps(rate, size):
        def field(t, y, args):
            two = jnp.asarray(2, single)
            return -rate * (y - size * jnp.cos(two * rate * t))

        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            *(jnp.zeros((), single), 10 / rate, None),
            jnp.asarray(start, single) * size * jnp.ones(2, single),
            stepsize_controller=dr.StepDensityController(),
            adjoint=dr.ReversibleAdjoint(),
            max_steps=1000,
        )
        return sol.stats["num_steps"]

    rates = jnp.array([1e-9, 1.0, 1e9], single)
    counts = np.array([steps(rates, jnp.asarray(s, single)) for s in (1e-15, 1, 1e15)])
    assert 150 < np.min(counts) <= np.max(counts) < 600, counts
    # At rest, what the field is first is a matter of rounding.
    assert start != 0 or np.ptp(counts) <= 3, counts


@pytest.mark.parametrize("bound, wished", ((3.0, 0.0), (300.0, 0.0), (3.0, 60.0)))
def test_density_comes_back(bound, wished):
    """`cross_back` restores the density to the last bit, even where the ratio of successive
    steps reaches its limit. Where steps are shortened because they are much longer than
    desired, it does so to rounding."""
    start = jnp.array(30.0)
    low = LowPart.start(start, start)
    rates = np.random.default_rng(0).uniform(-bound, bound, 100)

    def at(state, rate):
        values = [jnp.array(wished), jnp.array(rate)]
        wish: Any = SimpleNamespace(evaluate=lambda t, y, args: values)
        return StepDensityState(state.density, state.low, jnp.array(1e-16), wish)

    state = StepDensityState(start, low, None, None)
    before, after = [], []
    for rate in rates:
        before.append(float(state.density))
        state, _ = at(state, rate).cross(0.0, None, None)
    for rate in rates[::-1]:
        state = at(state, rate).cross_back(0.0, None, None)
        after.append(float(state.density))
    assert np.min(before) > 0
    ratios = np.array(before[1:]) / np.array(before[:-1])
    assert np.any(np.isclose(ratios, 4)) == (bound > 100)
    if wished == 0:
        assert before == after[::-1]
    else:
        assert np.min(before) < wished / 2
        np.testing.assert_allclose(after[::-1], before, rtol=1e-9)


@pytest.mark.slow
def test_walk_back_is_exact():
    """With a bitwise solver the backward pass is exact over many steps and periods."""

    def loss(y0):
        kwargs = dict(solver=BITWISE, t1=200 * PERIOD)
        return sum_of_squares(
            solve(dr.ReversibleAdjoint(drift_tol=0.0), kepler, y0, 1.0, **kwargs).ys
        )

    assert np.all(np.isfinite(jax.jit(jax.grad(loss))(perihelion(0.6))))


@pytest.mark.slow
def test_wrong_inverse_is_noticed():
    class Forgetful(dr.StepDensityController):
        def inverse(self, t1, y1, args, controller_state):
            t0, state = super().inverse(t1, y1, args, controller_state)
            return t0 + 1e-6 * (t1 - t0), state

        def wrap(self, direction):
            return self

    def loss(y0):
        sol = solve(
            dr.ReversibleAdjoint(),
            kepler,
            y0,
            1.0,
            stepsize_controller=Forgetful(),
            throw=False,
        )
        return sum_of_squares(sol.ys)

    assert np.all(np.isnan(jax.jit(jax.grad(loss))(perihelion(0.3))))


def energies(solver, controller, periods, adjoint):
    """The largest errors of the energy in the first and in the last tenth of a solve."""

    @jax.jit
    def run(y0):
        ends = jnp.array([0.0, 0.1, 0.9, 1.0]) * periods * PERIOD
        first, last = jnp.linspace(*ends[:2], 500), jnp.linspace(*ends[2:], 500)
        saveat = dfx.SaveAt(ts=jnp.concatenate([first, last]))
        sol = solve(
            adjoint,
            kepler,
            y0,
            1.0,
            solver=solver,
            t1=ends[3],
            saveat=saveat,
            stepsize_controller=controller,
            max_steps=None,
        )
        kinetic = jnp.sum(sol.ys[:, 2:] ** 2, axis=1) / 2
        energy = kinetic - 1 / jnp.linalg.norm(sol.ys[:, :2], axis=1)
        return jnp.max(jnp.abs(energy + 0.5).reshape(2, 500), axis=1), sol.stats

    (first, last), stats = run(perihelion(0.8))
    assert stats["num_steps"] > 50 * periods
    return first, last


@pytest.mark.long
def test_energy_does_not_drift():
    """Over 1,000 periods the energy does not drift with reversible steps, but it does under
    `PIDController`."""
    ours = (dr.ReversibleAdjoint(), 1000)
    first, last = energies(dr.ALF4(), dr.StepDensityController(wish), *ours[::-1])
    assert last < 1.2 * first < 1e-4
    pid = dfx.PIDController(rtol=1e-6, atol=1e-6)
    first, last = energies(dr.ALF4(), pid, *ours[::-1])
    assert last > 3 * first


@pytest.mark.parametrize(
    "solver",
    cases((dfx.Tsit5(),), slow=(dfx.Heun(), dr.ALF8())),
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize(
    "field, y0, t1",
    (
        (lambda t, y, args: jnp.cos(t) - y, 0.0, 20.0),
        (lambda t, y, args: jnp.ones_like(y), 0.0, 3.0),
        (lambda t, y, args: jnp.zeros_like(y), 1.0, 3.0),
        (lambda t, y, args: y * (1 - y), 1e-3, 20.0),
        # Relaxation oscillations, which the recurrence cannot follow by itself.
        (
            lambda t, y, args: jnp.array([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]]),
            [2.0, 0.0],
            20.0,
        ),
    ),
    ids=("relaxation", "constant", "rest", "logistic", "van der Pol"),
)
def test_any_solver_and_field(solver, field, y0, t1):
    """Solves are accurate with any solver, even where derivatives vanish."""

    def end(controller, solver, max_steps):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            *(solver, 0.0, t1, None, jnp.asarray(y0)),
            stepsize_controller=controller,
            max_steps=max_steps,
        )
        return sol.ys[0]

    expected = end(dfx.PIDController(rtol=1e-10, atol=1e-10), dfx.Tsit5(), 10_000)
    found = end(dr.StepDensityController(fraction=0.02), solver, 5_000)
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_refusals():
    def run(controller, terms=None, y0=1.0, **kwargs):
        terms = dfx.ODETerm(lambda t, y, args: -y) if terms is None else terms
        solver = kwargs.pop("solver", dfx.Heun())
        dfx.diffeqsolve(
            terms,
            *(solver, 0.0, 1.0, None, jnp.asarray(y0)),
            stepsize_controller=controller,
            **kwargs,
        )

    with pytest.raises(ValueError, match="must be a function"):
        dr.StepDensityController(0.1)
    with pytest.raises(ValueError, match="must be positive"):
        dr.StepDensityController(fraction=-0.1)
    with pytest.raises(ValueError, match="has to return a scalar"):
        run(dr.StepDensityController(lambda t, y, args: jnp.ones(2)))
    with pytest.raises(RuntimeError, match="not a positive and finite number"):
        run(dr.StepDensityController(lambda t, y, args: -y))
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jax.random.key(0))
    noise = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(lambda t, y, args: y, path)
    )
    with pytest.raises(ValueError, match="for ordinary differential equations"):
        run(dr.StepDensityController(), noise)


def _spring(t, y, args):
    q, p = y
    return p, -args["k"] * q


def test_a_continued_solve_uses_its_own_args():
    """Step sizes follow the `args` of the second solve, not those of the first."""
    controller = dr.StepDensityController(lambda t, y, args: 0.1 / jnp.sqrt(args["k"]))

    def solve(k, y0, t0, t1, **kwargs):
        return dfx.diffeqsolve(
            dfx.ODETerm(_spring),
            dr.ALF4(),
            *(t0, t1, None, y0, {"k": k, "name": "spring"}),
            stepsize_controller=controller,
            saveat=dfx.SaveAt(t1=True, controller_state=True, solver_state=True),
            **kwargs,
        )

    y0 = (jnp.array(1.0), jnp.array(0.0))
    first = solve(jnp.array(0.01), y0, 0.0, 10.0)
    y1 = jax.tree.map(lambda y: y[-1], first.ys)
    old, new = (
        solve(k, y1, 10.0, 30.0, controller_state=first.controller_state).stats["num_steps"]
        for k in jnp.array([0.01, 1.0])
    )
    # Steps of length one are ten times longer than now desired. They are shortened to at
    # most four times the desired length.
    assert old == 20
    assert new > 40


@pytest.mark.parametrize(
    "step_size", (None, lambda t, y, args: 0.1), ids=("by the field", "given")
)
@pytest.mark.parametrize("dtype, far", ((jnp.float32, 1e9), (jnp.float64, 1e18)))
def test_end_that_is_far_off(step_size, dtype, far):
    """Steps and gradients of a solve that an event ends do not depend on `t1`."""

    def field(t, y, args):
        q, p = y
        return jnp.stack([p, -jnp.sin(q) * jnp.cos(t)])

    @jax.jit
    @jax.value_and_grad
    def of_end(y0, t1):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            *(jnp.zeros((), dtype), t1, None, y0),
            stepsize_controller=dr.StepDensityController(step_size),
            event=dfx.Event(lambda t, y, args, **kwargs: y[0] < -1),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys**2)

    y0 = jnp.array([1.0, 0.2], dtype)
    near, expected = of_end(y0, jnp.asarray(30.0, dtype))
    for t1 in (far, jnp.inf):
        value, grad = of_end(y0, jnp.asarray(t1, dtype))
        np.testing.assert_allclose(value, near, rtol=0.02)
        np.testing.assert_allclose(grad, expected, rtol=0.05)


@pytest.mark.parametrize("dt0", (None, 0.1))
def test_solve_of_no_length(dt0):
    """So may be a member of a batch."""

    @jax.vmap
    def solve(t1):
        controller = dr.StepDensityController()
        settings = dict(stepsize_controller=controller, saveat=dfx.SaveAt(t1=True))
        term = dfx.ODETerm(lambda t, y, args: -y)
        return dfx.diffeqsolve(term, dr.ALF4(), 1.0, t1, dt0, jnp.ones(()), **settings).ys

    ys = solve(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(ys[:, 0], np.exp([0.0, -2.0]), rtol=1e-3)


def test_numbers_that_decide():
    """A field may branch on a Python number in `args`."""

    def field(t, y, args):
        rate, _ = args
        return -math.sin(rate) * y if rate > 0.2 else y

    term, y0 = dfx.ODETerm(field), jnp.ones(())
    controller, settings = dr.StepDensityController(), (0.5, "name")
    sol = dfx.diffeqsolve(
        *(term, dr.ALF4(), 0.0, 1.0, None, y0, settings), stepsize_controller=controller
    )
    np.testing.assert_allclose(sol.ys, np.exp(-np.sin(0.5)), rtol=1e-4)


def test_weights_in_args_are_not_carried():
    """The controller state has no copy of `args`, which `vmap` would repeat for every
    member of the batch."""
    weights = jnp.ones((50, 50)) / 50
    field = lambda t, y, w: -jnp.tanh(w @ y)

    def state(args, field):
        controller = dr.StepDensityController(lambda t, y, args: 0.1)
        term = dfx.ODETerm(field)
        func = lambda terms, t, y, args: terms.vf(t, y, args)
        return controller.init(term, 0.0, 1.0, jnp.ones(50), None, args, func, None)[1]

    size = lambda state: sum(x.size for x in jax.tree.leaves(state))
    assert size(state(weights, field)) < 100
    assert size(state(None, lambda t, y, _: field(t, y, weights))) > 2500


@pytest.mark.slow
@pytest.mark.optimised
def test_weights_in_terms_are_not_held():
    """Checkpoints copy neither weights that the terms close over nor other constant parts
    of the controller state."""
    size = 200

    def memory(checkpoints):
        def final(y0, weights):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, _: -jnp.tanh(weights @ y)),
                *(dr.ALF4(), 0.0, 1.0, None, y0),
                stepsize_controller=dr.StepDensityController(lambda t, y, args: 0.1),
                adjoint=dr.ReversibleAdjoint(checkpoints),
            )
            return jnp.sum(sol.ys)

        inputs = (jax.ShapeDtypeStruct(s, jnp.float64) for s in ((size,), (size, size)))
        gradient = jax.jit(jax.grad(final, argnums=(0, 1)))
        compiled = gradient.lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(17) - memory(1) < 2 * 8 * size**2
