"""Solves with more restarts than checkpoints, or more steps than the record holds."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._adjoint import steps

from .counter import Counter
from .problems import (
    as_vector,
    cases,
    kepler,
    lorenz,
    Network,
    network_args,
    relative_error,
)


def pid(tol, **kwargs):
    return dfx.PIDController(rtol=tol, atol=tol, **kwargs)


def scaled(field):
    return lambda t, y, scale: jax.tree.map(lambda dy: scale * dy, field(t, y, None))


def relaxation(t, y, rate):
    return -rate * (y - jnp.cos(t).astype(y.dtype))


def final_of(field, t1, dt0=None, solver=None, **kwargs):
    def final(y0, args, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4() if solver is None else solver,
            *(0.0, t1, dt0, y0, args),
            adjoint=adjoint,
            **kwargs,
        )
        ys = jax.tree.leaves(sol.ys)
        counts = sol.stats.get("num_restarts"), sol.stats["num_accepted_steps"]
        return sum(jnp.sum(y**2) for y in ys), counts

    return final


def gradient(final, adjoint, argnums=(0, 1)):
    """The compiled gradient of `final`, and the numbers of restarts and steps."""
    return jax.jit(lambda *inputs: jax.grad(final, argnums, has_aux=True)(*inputs, adjoint))


STORE = dfx.RecursiveCheckpointAdjoint(checkpoints=4096)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    cases((dr.ALF4(),), slow=(dr.McCallumFoster(dfx.Tsit5()), dr.ALF6())),
    ids=("ALF4", "coupling", "ALF6"),
)
def test_any_number_of_checkpoints(solver):
    """Gradients are right with fewer checkpoints than restarts, or none."""
    final = final_of(relaxation, 10.0, stepsize_controller=pid(1e-6), solver=solver)
    inputs = jnp.array([1.0, 0.5]), jnp.array(10.0)
    expected, _ = gradient(final, STORE)(*inputs)
    for checkpoints in (0, 3, 100):
        grad, (restarts, _) = gradient(final, dr.ReversibleAdjoint(checkpoints))(*inputs)
        assert 3 < restarts < 100
        # The gradient with respect to `y0` has died out.
        assert relative_error(grad[1], expected[1]) < 1e-8
        assert np.max(np.abs(as_vector(grad[0]) - as_vector(expected[0]))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints, most", ((8, 2.0), (32, 1.4), (4, 3.0)))
def test_evaluations(checkpoints, most):
    """At most `most` times as many as with checkpoints for all restarts."""
    field = Counter()

    def counted(t, y, rate):
        # A field with the stiffness of `relaxation`, evaluated once.
        return relaxation(t, y, rate) + 0 * field(t, y, rate)

    final = final_of(counted, 10.0, 0.025)
    inputs = jnp.array(1.0), jnp.array(40.0)

    reports = []

    def evaluations(checkpoints):
        adjoint = dr.ReversibleAdjoint(checkpoints, report=reports.append)
        count, (grad, (restarts, _)) = field.during(gradient(final, adjoint), *inputs)
        assert restarts == 76
        return count, grad[1]

    (few, grad), (enough, expected) = evaluations(checkpoints), evaluations(128)
    assert few < most * enough
    assert relative_error(grad, expected) < 1e-12
    jax.effects_barrier()
    replaying, not_replaying = reports
    assert replaying["undone_steps"] == not_replaying["undone_steps"] == 400
    assert not_replaying["replayed_steps"] == 0
    # Five evaluations per step, and one for each replayed restart.
    replayed = 5 * replaying["replayed_steps"]
    assert 0 < replayed <= few - enough < 1.25 * replayed


@pytest.mark.slow
def test_batch():
    """Each element of a batch restarts, and is replayed, at its own steps."""
    final = final_of(relaxation, 10.0, 0.025)
    rates = jnp.linspace(0.0, 40.0, 5)
    inputs = jnp.ones((5, 2)), rates
    reports = []
    ours, theirs = (
        jax.vmap(gradient(final, adjoint))(*inputs)
        for adjoint in (dr.ReversibleAdjoint(checkpoints=3, report=reports.append), STORE)
    )
    jax.effects_barrier()
    counts = sorted(report["replayed_steps"] for report in reports)
    assert len(counts) == 5 and counts[0] == 0 and counts[-1] > 400
    restarts, _ = ours[1]
    assert restarts[0] == 0 and restarts[-1] > 30
    for grad, expected in zip(ours[0][1], theirs[0][1], strict=True):
        assert relative_error(grad, expected) < 1e-8


@pytest.mark.parametrize(
    "problem", cases((), long=("divided",), more=("contracting", "chaotic", "long"))
)
def test_evaluations_of_a_batch(problem):
    """Elements that restart, and are replayed, at their own steps wait for one another: a
    batch takes some evaluations more than its longest element, and not those of all. It
    takes several times as many where elements divide their own steps, see `Division`."""
    counts, argnums = [], (0, 1)

    def count(x):
        counts.append(1)
        return np.ones(x.shape, x.dtype)

    def counted(t, y, rate):
        struct, x = jax.ShapeDtypeStruct(y[0].shape, y.dtype), jax.lax.stop_gradient(y[0])
        # One call for the whole batch.
        one = jax.pure_callback(count, struct, x, vmap_method="broadcast_all")
        if problem in ("contracting", "divided"):
            return one * relaxation(t, y, rate)
        return rate * one * lorenz(t, y, None)

    if problem == "chaotic":
        most, t1, rates = 3, jnp.float32(3.0), jnp.ones(16, jnp.float32)
        kwargs = dict(stepsize_controller=pid(1e-4))
        y0 = jax.random.normal(jax.random.key(0), (16, 3), jnp.float32)
        y0 = y0 + jnp.array([[1.0, 1.0, 25.0]], jnp.float32)
    elif problem == "long":
        # More steps than are on record.
        most, t1, rates = 1.8, 2.0, jnp.ones(64)
        kwargs = dict(dt0=2 / 512, max_steps=512)
        y0 = jnp.array([[1.0, 1.0, 25.0]]) + jax.random.normal(jax.random.key(0), (64, 3))
    else:
        most, tol = (6, 1e-3) if problem == "divided" else (2, 1e-4)
        # The cotangent of the initial state grows in many elements.
        argnums = argnums if problem == "divided" else 1
        t1, rates, y0 = 10.0, jnp.linspace(0.0, 40.0, 41), jnp.ones((41, 2))
        kwargs = dict(stepsize_controller=pid(tol))
    final = final_of(counted, t1, **kwargs)

    def evaluations(fn, *inputs):
        counts.clear()
        jax.block_until_ready(fn(*inputs))
        jax.effects_barrier()
        return len(counts)

    one = gradient(final, dr.ReversibleAdjoint(), argnums)
    # The fastest rates take the most.
    members = list(zip(y0, rates, strict=True))[-16:]
    alone = [evaluations(one, *inputs) for inputs in members]
    assert evaluations(jax.vmap(one), y0, rates) < most * max(alone) < sum(alone)


E = 0.6
ORBIT = (jnp.array([1 - E, 0.0]), jnp.array([0.0, np.sqrt((1 + E) / (1 - E))]))


@pytest.mark.long
@pytest.mark.parametrize(
    "field, y0, args, t1, tol",
    cases(
        ((scaled(kepler), ORBIT, jnp.array(1.0), 30.0, 1e-8),),
        slow=((scaled(lorenz), jnp.ones(3), jnp.array(1.0), 6.0, 1e-8),),
    ),
    ids=("kepler", "lorenz"),
)
@pytest.mark.parametrize(
    "solver",
    cases((dr.ALF4(),), slow=(dr.McCallumFoster(dfx.Tsit5()),)),
    ids=("ALF4", "coupling"),
)
def test_no_bound_on_steps(field, y0, args, t1, tol, solver, monkeypatch):
    """Gradients are right if only the last 256 steps are on record. Replays recompute the
    others."""
    monkeypatch.setattr(steps, "_most_rows", 0)
    kwargs = dict(stepsize_controller=pid(tol), solver=solver)
    ts = jnp.linspace(0, t1, 7)
    final = final_of(field, t1, max_steps=None, saveat=dfx.SaveAt(ts=ts), **kwargs)
    bounded = final_of(field, t1, max_steps=4096, saveat=dfx.SaveAt(ts=ts), **kwargs)
    expected, _ = gradient(bounded, STORE)(y0, args)
    for adjoint in (dr.ReversibleAdjoint(), dr.ReversibleAdjoint(checkpoints=2)):
        grad, (_, count) = gradient(final, adjoint)(y0, args)
        assert count > 300
        # For steps off the record, the controller chooses again, by error estimates that
        # round differently; `drift_tol` bounds the effect.
        assert relative_error(grad, expected) < 1e-5


@pytest.mark.long
def test_replays_take_the_same_steps():
    """Constant steps end where a table is looked up: a time that rounds differently reads
    another entry."""
    table = jnp.cos(jnp.arange(1001.0) ** 2)

    def field(t, y, rate):
        return table[jnp.floor(10 * t).astype(int)] - rate * y

    known = []
    adjoint = dr.ReversibleAdjoint(checkpoints=4, watch=known.append)
    solver = dr.McCallumFoster(dfx.Heun())
    final = final_of(field, 100.0, 0.1, solver)
    jax.block_until_ready(gradient(final, adjoint)(jnp.array(1.0), jnp.array(0.3)))
    jax.effects_barrier()
    assert max(state["miss"] for state in known) < 1e-3


@pytest.mark.slow
def test_long_solves_of_solvers_that_do_not_restart(monkeypatch):
    """They also continue from known states; without any, they are replayed from the
    start."""
    monkeypatch.setattr(steps, "_most_rows", 0)
    final = final_of(scaled(kepler), 60.0, 0.05, dr.ALF2(), max_steps=None)
    bounded = final_of(scaled(kepler), 60.0, 0.05, dr.ALF2())
    args = jnp.array(1.0)
    expected, _ = gradient(bounded, STORE)(ORBIT, args)
    for checkpoints in (0, 8):
        adjoint = dr.ReversibleAdjoint(checkpoints, drift_tol=1e-9)
        grad, (restarts, count) = gradient(final, adjoint)(ORBIT, args)
        assert restarts == 0 and count == 1200
        assert relative_error(grad, expected) < 1e-8


@pytest.mark.slow
def test_jumps_and_steps_that_are_recomputed(monkeypatch):
    """Gradients are right if flags of restarts and jumps are overwritten."""
    monkeypatch.setattr(steps, "_most_rows", 0)
    dt = 5e-4
    jumps = dfx.ClipStepSizeController(pid(1e-6, dtmax=10 * dt), jump_ts=jnp.arange(1, 3.0))
    density = dr.StepDensityController(lambda t, y, args: dt * (2 + jnp.sin(t)))
    inputs = jnp.array([1.0, 0.5]), jnp.array(40.0)

    def switched(t, y, rate):
        return relaxation(t, y, jnp.where(t < 1, rate / 2, rate))

    for controller, field in ((jumps, switched), (density, relaxation)):
        kwargs = dict(stepsize_controller=controller, max_steps=8192)
        final = final_of(field, 3.0, None, **kwargs)
        expected, _ = gradient(final, dfx.RecursiveCheckpointAdjoint(8192))(*inputs)
        grad, (restarts, count) = gradient(final, dr.ReversibleAdjoint(2))(*inputs)
        assert restarts > 2 and count > 300
        assert relative_error(grad[1], expected[1]) < 1e-8


class Torn(dfx.AbstractStepSizeController):
    """Leaves a gap between steps, and does not report a jump."""

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, dt0

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        return True, t1 + 1e-6, t1 + state, False, state, dfx.RESULTS.successful


@pytest.mark.slow
@pytest.mark.parametrize("solver", (dr.ALF4(), dfx.ReversibleHeun()), ids=repr)
def test_many_steps_in_single_precision(solver):
    """With default settings, the error is below ten times that of the default adjoint."""
    count = 10_000

    def gradient(dtype, adjoint):
        cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
        network = jax.tree.map(cast, Network())
        args = jnp.asarray(network_args()["scale"], dtype)

        def final(y0, args):
            field = dfx.ODETerm(lambda t, y, scale: network(t, y, {"scale": scale}))
            times = (jnp.asarray(t, dtype) for t in (0.0, 20.0, 20 / count))
            kwargs = dict(max_steps=count + 10, adjoint=adjoint)
            return jnp.sum(
                dfx.diffeqsolve(field, solver, *times, y0, args, **kwargs).ys ** 2
            )

        y0 = jnp.array([1.0, 2.0, 0.5], dtype)
        return as_vector(jax.jit(jax.grad(final, argnums=(0, 1)))(y0, args))

    store = dfx.RecursiveCheckpointAdjoint(checkpoints=count + 10)
    exact = gradient(jnp.float64, store)
    ours, stored = (
        np.max(np.abs(gradient(jnp.float32, adjoint) - exact))
        for adjoint in (dr.ReversibleAdjoint(), store)
    )
    # Three to six times were measured.
    assert ours < 10 * stored


def test_gaps_between_steps():
    final = final_of(relaxation, 1.0, 0.1, stepsize_controller=Torn())
    with pytest.raises(Exception, match="did not begin where the last one had ended"):
        gradient(final, dr.ReversibleAdjoint())(jnp.ones(2), jnp.array(1.0))
