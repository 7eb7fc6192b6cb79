"""Steps that are undone again, after the backward pass has missed a known state."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr
from diffrax_reversible._adjoint import steps
from diffrax_reversible._adjoint.drift import Drift
from diffrax_reversible._adjoint.walk import Walk

from .counter import Counter
from .problems import (
    as_terms,
    assert_same_gradient,
    cases,
    FAMILIES,
    kepler,
    Network,
    network_args,
    PID,
    relative_error,
    sum_of_squares,
    Y0,
)
from .test_replays import final_of, gradient, pid, relaxation, STORE


TS = jnp.linspace(0.0, 3.0, 9)


@pytest.fixture
def misses(monkeypatch):
    """Feign a miss of every known state more than three steps before the last one."""
    drifts = Walk.drifts

    def drifts_of_long_segments(self, position, *args):
        far = position.origin.step - position.step > 3
        add = lambda x: x + jnp.where(far, 1, 0).astype(x.dtype)
        return [Drift(*map(add, drift)) for drift in drifts(self, position, *args)]

    monkeypatch.setattr(Walk, "drifts", drifts_of_long_segments)


def loss_of(case, saveat, **kwargs):
    def loss(adjoint, y0, field, args):
        sol = dfx.diffeqsolve(
            as_terms(field),
            case.solver,
            *(0.0, kwargs.get("t1", 3.0), jnp.array(0.02), y0, args),
            saveat=saveat,
            stepsize_controller=case.controller,
            event=kwargs.get("event"),
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys) + sum_of_squares(sol.ts)

    return loss


def assert_same(loss, *args):
    adjoints = dr.ReversibleAdjoint(1), dr.ReversibleAdjoint(8)
    assert_same_gradient(loss, *args, adjoints=adjoints, reference=STORE)


EVERYTHING = dfx.SaveAt(
    subs=[
        dfx.SubSaveAt(t0=True, t1=True, ts=TS),
        dfx.SubSaveAt(steps=3, fn=lambda t, y, args: jax.tree.map(lambda y: t * y, y)),
    ]
)


@pytest.mark.parametrize(
    "family",
    cases(
        (),
        slow=(
            "coupling",
            "splitting",
            "LeapfrogMidpoint",
            "ReversibleHeun",
            "SemiImplicitEuler",
        ),
    ),
)
def test_families(family, misses):
    """Gradients are right with all forms of saving, whose cotangents are read again."""
    case = FAMILIES[family]
    assert_same(loss_of(case, EVERYTHING), case.y0, case.field, network_args())


@pytest.mark.slow
def test_event_and_jump(misses):
    """Gradients are right if both lie in steps that are undone twice."""
    controller = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.7, 1.3]))
    event = dfx.Event(
        lambda t, y, args, **kwargs: t - 2.1 + 0.01 * y[0], optx.Newton(1e-10, 1e-10)
    )
    case = FAMILIES["coupling"]._replace(solver=dr.ALF4(), controller=controller)
    loss = loss_of(case, dfx.SaveAt(t1=True, ts=TS), event=event)
    assert_same(loss, Y0, Network(), network_args())


@pytest.mark.slow
def test_times(misses):
    """Gradients with respect to the times of outputs and the end of the solve are right."""

    def loss(adjoint, ts, y0):
        sol = dfx.diffeqsolve(
            as_terms(Network()),
            dr.ALF4(),
            *(0.0, ts[-1], 0.02, y0, network_args()),
            saveat=dfx.SaveAt(ts=ts, t1=True),
            stepsize_controller=PID,
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys)

    assert_same(loss, TS, Y0)


@pytest.mark.more
def test_batch(misses):
    """Gradients are right in a batch of solves of different lengths, not all of which
    restart."""
    final = final_of(relaxation, 10.0, 0.05)
    rates = jnp.array([0.0, 3.0, 17.0])
    inputs = jnp.ones((3, 2)), rates
    run = jax.jit(
        jax.vmap(jax.grad(lambda y, r: final(y, r, dr.ReversibleAdjoint())[0], (0, 1)))
    )
    got = run(*inputs)
    expected = jax.vmap(lambda y, r: gradient(final, STORE)(y, r)[0])(*inputs)
    assert relative_error(got[1], expected[1]) < 1e-10
    np.testing.assert_allclose(got[0], expected[0], atol=1e-12)


@pytest.mark.slow
def test_steps_that_are_recomputed(misses):
    """Gradients are right if steps are recomputed and not recorded."""

    def loss(adjoint, y0):
        sol = dfx.diffeqsolve(
            as_terms(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])),
            dr.ALF4(),
            *(0.0, 6.0, None, y0),
            stepsize_controller=dr.StepDensityController(),
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys)

    assert_same(loss, jnp.array([1.0, 0.3]))


@pytest.mark.slow
def test_steps_that_are_forgotten(misses, monkeypatch):
    """Gradients are right if replays between known states overwrite the record."""
    monkeypatch.setattr(steps, "_most_rows", 0)
    case = FAMILIES["coupling"]._replace(
        solver=dr.ALF4(), controller=dfx.ConstantStepSize()
    )
    # Some eight hundred steps; the record has room for 256.
    loss = loss_of(case, EVERYTHING, t1=16.0)
    assert_same(loss, Y0, Network(), network_args())


@pytest.mark.more
@pytest.mark.parametrize("noisy", cases((False,), slow=(True,)))
def test_misses_below_the_tolerance(noisy, monkeypatch):
    """They repeat steps, but not along a Brownian path, where a replay may differ from the
    solve by as much."""
    drifts = Walk.drifts

    def half_the_tolerance(self, *args):
        most = lambda x: jnp.maximum(x, self.drift_tol / 2)
        return [Drift(*map(most, drift)) for drift in drifts(self, *args)]

    monkeypatch.setattr(Walk, "drifts", half_the_tolerance)
    field, path = Counter(), None
    if noisy:
        path = dfx.VirtualBrownianTree(0, 2, 1e-3, (2,), key=jax.random.key(0))

    def run(adjoint):
        @jax.jit
        @jax.grad
        def final(y0):
            terms = dfx.ODETerm(lambda t, y, args: field(t, y, 1.0) - y)
            if path is not None:
                noise = dfx.ControlTerm(lambda t, y, args: 0.1 * jnp.eye(2), path)
                terms = dfx.MultiTerm(terms, noise)
            sol = dfx.diffeqsolve(
                terms, dfx.ReversibleHeun(), 0.0, 2.0, 0.1, y0, adjoint=adjoint
            )
            return jnp.sum(sol.ys**2)

        count, _ = field.during(final, jnp.ones(2))
        return count

    once = run(dr.ReversibleAdjoint(drift_tol=float("inf")))
    assert (run(dr.ReversibleAdjoint()) == once) == noisy


@pytest.mark.parametrize("solver", (dfx.ReversibleHeun(), dr.ALF2()), ids=repr)
def test_single_precision_without_restarts(solver):
    """Known states are held before rounding errors have grown too large, although 60 steps
    are too many to undo at once for `ReversibleHeun`."""
    weights = jax.random.normal(jax.random.key(0), (4, 4), jnp.float32)
    reports = []

    @jax.jit
    @jax.grad
    def gradient(scale):
        def field(t, y, scale):
            return jnp.tanh(scale * weights @ y) - y / 2

        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver),
            *map(jnp.float32, (0, 15, 0.25)),
            *(jnp.ones(4, jnp.float32), scale),
            adjoint=dr.ReversibleAdjoint(report=reports.append),
        )
        return jnp.sum(sol.ys**2)

    gradient(jnp.float32(1))
    jax.effects_barrier()
    assert reports[0]["undone_steps"] == 60 and reports[0]["replayed_steps"] == 0


@pytest.mark.slow
def test_orbits_that_are_forgotten(monkeypatch):
    """Steps are undone again after misses that are no error. A replay rounds differently:
    in single precision the gradients of these orbits, with all steps stored, differ by up
    to half a per cent from one initial state to the next, and ours by some per cent."""
    monkeypatch.setattr(steps, "_most_rows", 0)
    field = Counter()

    def pair(t, y, mass):
        return jnp.concatenate(kepler(t, (y[:2], y[2:]), None)) * mass + 0 * field(
            t, y, mass
        )

    # With more known states, as by default, nothing misses.
    careless = dr.ReversibleAdjoint(checkpoints=8, drift_tol=float("inf"))

    def run(adjoint, dtype=jnp.float32):
        dt0, solver = jnp.asarray(0.03, dtype), dr.McCallumFoster(dfx.Tsit5())
        final = final_of(pair, 30.0, dt0, solver=solver)
        inputs = jnp.array([0.4, 0.0, 0.0, 2.0], dtype), jnp.asarray(1.0, dtype)
        return field.during(gradient(final, adjoint), *inputs)

    once, _ = run(careless)
    repeated, (grad, _) = run(dr.ReversibleAdjoint(checkpoints=8))
    _, (exact, _) = run(STORE, jnp.float64)
    assert relative_error(grad, exact) < 5e-2
    assert repeated > once


@pytest.mark.long
@pytest.mark.parametrize("rate, dt0", cases(((20.0, 0.05),), slow=((5.0, 0.1),)))
def test_contraction_in_single_precision(rate, dt0):
    """With default settings, steps that lose the digits of the state between restarts cost
    evaluations, but raise no error. Steps are equal, as separately compiled solves would
    choose different ones. Their number is a power of two, as the default adjoint multiplies
    by its inverse, which otherwise rounds."""
    field = Counter()

    def counted(t, y, size):
        force = size * jnp.cos(t).astype(y.dtype)
        return rate * (force - y - y**3 / 3) + 0 * field(t, y, size)

    final = final_of(counted, jnp.float32(12.8), jnp.float32(dt0))
    inputs = jnp.ones(2, jnp.float32), jnp.float32(1.0)

    def run(drift_tol):
        adjoint = dr.ReversibleAdjoint(drift_tol=drift_tol)
        return field.during(gradient(final, adjoint), *inputs)

    (repeated, (grad, _)), (once, _) = run(None), run(float("inf"))
    expected, _ = gradient(final, STORE)(*inputs)
    assert once < repeated < 2 * once
    assert relative_error(grad[1], expected[1]) < 1e-5


def test_nothing_helps():
    """Without checkpoints, a miss is an error."""
    final = final_of(relaxation, jnp.float32(10.0), stepsize_controller=pid(1e-4))
    inputs = jnp.ones(2, jnp.float32), jnp.float32(40.0)
    with pytest.raises(RuntimeError, match="missed a known state"):
        gradient(final, dr.ReversibleAdjoint(0))(*inputs)


def test_vector_field_that_cancels():
    """Close to its zero, its rounding errors are as large as itself, also in the copy that
    `ReversibleHeun` carries. Still no step is undone again."""
    reports = []

    def escape(t, y, rate):
        return rate * (y - 99.5)

    final = final_of(escape, jnp.float32(6.0), jnp.float32(0.02), dfx.ReversibleHeun())
    inputs = jnp.array([100.0, 99.0], jnp.float32), jnp.float32(0.01)
    adjoint = dr.ReversibleAdjoint(report=reports.append)
    grad, (_, count) = gradient(final, adjoint)(*inputs)
    expected, _ = gradient(final, STORE)(*inputs)
    jax.effects_barrier()
    counts = dict(undone_steps=int(count), replayed_steps=0, restarted_steps=0)
    assert reports == [counts]
    assert relative_error(grad, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, count", ((dr.McCallumFoster(dfx.Tsit5()), 300), (dr.ALF6(), 150)), ids=str
)
def test_heat_in_single_precision(solver, count):
    """Gradients are right close to the stability limit, where modes lose all digits within
    a few steps. The distance between the copies of a coupled method makes replays differ
    from the solve. A single step loses digits of `v`, which move the state by less than its
    own error."""

    def heat(t, y, conductivity):
        return conductivity * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1))

    final = final_of(heat, jnp.float32(100.0), jnp.float32(100 / count), solver)
    y0 = jnp.sin(jnp.arange(32, dtype=jnp.float32)) ** 3
    grad, _ = gradient(final, dr.ReversibleAdjoint())(y0, jnp.float32(1.0))
    expected, _ = gradient(final, STORE)(y0, jnp.float32(1.0))
    assert relative_error(grad, expected) < 1e-4


@pytest.mark.slow
def test_few_large_steps_in_single_precision():
    """No step is undone again, with a network at loose tolerances, in a batch whose members
    wait for each other."""
    reports = []
    mlp = eqx.nn.MLP(
        *(2, 2, 64, 2), jax.nn.softplus, dtype=jnp.float32, key=jax.random.key(0)
    )
    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    field = lambda t, y, params: eqx.combine(params, static)(y)
    kwargs = dict(stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6))
    final = final_of(field, jnp.float32(10.0), jnp.float32(0.1), **kwargs)
    y0s = jax.random.uniform(
        jax.random.key(1), (32, 2), jnp.float32, minval=-0.6, maxval=1.0
    )

    def run(adjoint):
        grad = jax.grad(lambda y0, p: final(y0, p, adjoint), argnums=(0, 1), has_aux=True)
        return jax.jit(jax.vmap(grad, in_axes=(0, None)))(y0s, params)

    grad, (_, counts) = run(dr.ReversibleAdjoint(report=reports.append))
    expected, _ = run(STORE)
    jax.effects_barrier()
    assert sum(r["undone_steps"] for r in reports) == jnp.sum(counts)
    assert relative_error(grad, expected) < 1e-6


@pytest.mark.slow
def test_many_entries_in_single_precision():
    """Among thousands of sums, some come close to zero, but round as the others do. Few
    segments are repeated, and the gradient is not refused."""
    reports = []
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32)
    y0 = rng.normal(size=(64, 64)) * (rng.uniform(size=(64, 64)) < 0.9)
    y0 = jnp.asarray(y0, jnp.float32)
    field = lambda t, y, weight: jnp.tanh(y @ weight) @ weight
    final = final_of(field, jnp.float32(1.0), jnp.float32(0.01), dr.ALF4())
    grad, _ = gradient(final, dr.ReversibleAdjoint(report=reports.append))(y0, weight)
    expected, _ = gradient(final, STORE)(y0, weight)
    jax.effects_barrier()
    assert relative_error(grad, expected) < 1e-5
    (report,) = reports
    assert report["undone_steps"] + report["replayed_steps"] < 250, report


def test_network_that_contracts():
    """With many parameters, every step ends at a known state, so that none is undone twice
    or replayed, also in single precision."""
    rng = np.random.default_rng(5)
    weights = [rng.normal(size=shape) / 8 for shape in ((40, 2), (40, 40), (2, 40))]
    weights = [jnp.asarray(w, jnp.float32) for w in weights]
    y0s = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    counts = []

    def loss(weights, rate):
        def field(t, y, weights):
            first, second, third = weights
            return third @ jnp.tanh(second @ jnp.tanh(first @ y)) - rate * y

        def of_member(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dr.ALF4(),
                *(jnp.float32(0), jnp.float32(2), None, y0, weights),
                stepsize_controller=dfx.PIDController(1e-3, 1e-6),
                adjoint=dr.ReversibleAdjoint(report=counts.append),
            )
            return sum_of_squares(sol.ys), sol.stats["num_accepted_steps"]

        squares, steps = jax.vmap(of_member)(y0s)
        return jnp.mean(squares), steps

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, steps), _ = gradient(weights, jnp.float32(10))
    jax.effects_barrier()
    assert sum(count["replayed_steps"] for count in counts) == 0
    assert sum(count["restarted_steps"] for count in counts) == 0
    assert sum(count["undone_steps"] for count in counts) == np.sum(steps)


@pytest.mark.parametrize("saved", cases(("fn", "event"), more=("time",)))
def test_what_outputs_at_the_end_add_to_parameters(saved, misses):
    """Parameters that outputs depend on themselves, not through the state, keep their part
    of the gradient if the first steps of the backward pass are undone again."""
    saveat = dfx.SaveAt(t1=True)
    if saved == "fn":
        saveat = dfx.SaveAt(t1=True, fn=lambda t, y, k: k * y)
    undone = []
    report = lambda counts: undone.append(counts["undone_steps"])

    def loss(k, adjoint):
        kwargs = {}
        if saved == "event":
            threshold = lambda t, y, args, **kwargs: t - 1.6 * k
            kwargs["event"] = dfx.Event(threshold, optx.Newton(1e-9, 1e-9))
        t1 = k if saved == "time" else 1.0
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.cos(t) - y),
            dr.ALF4(),
            *(0.0, t1, None, Y0, k),
            stepsize_controller=dfx.StepTo(t1 * jnp.linspace(0, 1, 41)),
            saveat=saveat,
            adjoint=adjoint,
            max_steps=64,
            **kwargs,
        )
        return sum_of_squares(sol.ys) + jnp.sum(sol.ts)

    of = jax.jit(jax.grad(loss), static_argnums=1)
    ours, theirs = (
        of(jnp.array(0.6), adjoint)
        for adjoint in (
            dr.ReversibleAdjoint(checkpoints=32, report=report),
            dfx.RecursiveCheckpointAdjoint(checkpoints=64),
        )
    )
    jax.effects_barrier()
    assert undone[0] > 41
    assert abs(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
