"""Batches whose members all do something different: each has the solution and the gradient
that it has alone."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import as_terms, cases, relative_error, sum_of_squares


JUMP = 1.5


def field(t, y, rate):
    """The first entry contracts and jumps. The second diverges if it starts above one."""
    a, b = y
    jump = jnp.where(t < JUMP, 0.0, 0.3)
    return jnp.stack([-rate * (a - jnp.cos(t) - jump), b * (b - 1)])


# Rate, start of the second entry, threshold of the event, end.
MEMBERS = {
    "restarts": (20.0, 0.3, -9.0, 4.0),
    "jumps": (1.0, 0.3, -9.0, 4.0),
    "ends early": (15.0, 0.3, -9.0, 0.7),
    "event": (8.0, 0.9, 0.5, 4.0),
    "event at once": (8.0, 0.51, 0.5, 4.0),
    "too many steps": (300.0, 0.3, -9.0, 4.0),
    "smallest step reached": (10.0, 1.3, -9.0, 4.0),
    "no steps": (10.0, 0.3, -9.0, 0.0),
}
# Failed solves have a gradient of NaN, alone as well.
FAILED = {"too many steps", "smallest step reached"}


def solve(solver, jumps, rate, b0, threshold, t1):
    controller = dfx.PIDController(rtol=1e-4, atol=1e-6, dtmin=1e-7, force_dtmin=False)
    if jumps:
        controller = dfx.ClipStepSizeController(controller, jump_ts=jnp.array([JUMP]))
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        t1,
        jnp.array(0.05),
        jnp.stack([jnp.array(0.2), b0]),
        rate,
        stepsize_controller=controller,
        event=dfx.Event(lambda t, y, args, **kwargs: y[1] - threshold),
        adjoint=dr.ReversibleAdjoint(checkpoints=64),
        max_steps=256,
        throw=False,
    )
    out = dict(ts=sol.ts, ys=sol.ys, result=sol.result._value, **sol.stats)
    return jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0) ** 2), out


@pytest.mark.long
@pytest.mark.parametrize("solver", cases((dr.ALF4(),), slow=(dr.ALF6(),)), ids=repr)
@pytest.mark.parametrize("jumps", cases((True,), slow=(False,)))
def test_every_member_as_alone(solver, jumps):
    run = jax.value_and_grad(
        lambda *member: solve(solver, jumps, *member), argnums=(0, 1), has_aux=True
    )
    members = jnp.array(list(MEMBERS.values()))
    (_, batched), batched_grad = jax.jit(jax.vmap(run))(*members.T)
    alone = jax.jit(run)
    results = {}
    for i, (name, member) in enumerate(zip(MEMBERS, members, strict=True)):
        (_, out), grad = alone(*member)
        assert out["num_steps"] == batched["num_steps"][i], name
        assert out["num_restarts"] == batched["num_restarts"][i], name
        assert out["result"] == batched["result"][i], name
        if name in FAILED:
            continue
        assert np.allclose(out["ts"], batched["ts"][i], rtol=1e-12), name
        assert relative_error(batched["ys"][i], out["ys"]) < 1e-8, name
        assert relative_error(jax.tree.map(lambda g, i=i: g[i], batched_grad), grad) < 1e-8
        results[name] = int(out["num_restarts"])
    # Each member does what its name says.
    assert results["restarts"] > 0 and results["ends early"] > 0
    codes = {name: int(code) for name, code in zip(MEMBERS, batched["result"], strict=True)}
    expected = dict.fromkeys(MEMBERS, dfx.RESULTS.successful)
    expected["event"] = expected["event at once"] = dfx.RESULTS.event_occurred
    expected["too many steps"] = dfx.RESULTS.max_steps_reached
    expected["smallest step reached"] = dfx.RESULTS.dt_min_reached
    assert codes == {name: result._value for name, result in expected.items()}


@pytest.mark.more
def test_outputs_where_a_member_takes_no_steps():
    """Gradients are right for all outputs that Diffrax writes after the last step,
    `SaveAt(steps=2)` among them, of members with and without steps."""
    net = lambda t, y, rate: jnp.sin(rate * y) + jnp.cos(t)
    save = lambda t, y, rate: t * y + rate
    subs = (
        dfx.SubSaveAt(t0=True, t1=True, ts=jnp.zeros(3), fn=save),
        dfx.SubSaveAt(ts=jnp.zeros(2)),
        dfx.SubSaveAt(t1=True, steps=2),
        dfx.SubSaveAt(t1=True, steps=1),
    )

    def loss(adjoint, y0, rate, t1):
        ts = t1 * jnp.array([0.3, 0.7, 1.0])
        saveat = dfx.SaveAt(subs=subs)
        where = lambda s: (s.subs[0].ts, s.subs[1].ts)
        saveat = eqx.tree_at(where, saveat, (ts, ts[1:]))
        sol = dfx.diffeqsolve(
            dfx.ODETerm(net),
            dr.ALF4(),
            0.0,
            t1,
            jnp.array(0.1),
            y0,
            rate,
            saveat=saveat,
            adjoint=adjoint,
            max_steps=16,
        )
        leaves = jax.tree.leaves(sol.ys)
        weights = [jnp.arange(1.0, y.size + 1).reshape(y.shape) for y in leaves]
        pairs = zip(weights, leaves, strict=True)
        return sum(jnp.sum(jnp.where(jnp.isfinite(y), w * y**2, 0)) for w, y in pairs)

    # Of three and of four steps: the last of three is none that `steps=2` writes.
    ends = jnp.array([0.0, 0.25, 0.4])
    start = jnp.array([[0.5, -0.2, 0.1], [1.0, 0.3, -0.4], [0.2, 0.6, 0.7]])

    def gradients(adjoint):
        grad = jax.grad(ft.partial(loss, adjoint), argnums=(0, 1))
        return jax.jit(jax.vmap(grad, (0, None, 0)))(start, jnp.array(1.3), ends)

    expected = gradients(dfx.RecursiveCheckpointAdjoint())
    for ours, default in zip(gradients(dr.ReversibleAdjoint()), expected, strict=True):
        assert relative_error(ours, default) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("solver", cases((dr.ALF4(),), slow=(dr.ALF6(),)), ids=repr)
def test_event_beside_restart(solver):
    """What a finished member would do next does not stop the other members."""

    def solve(threshold):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y),
            solver,
            0.0,
            20.0,
            1.0,
            jnp.array(10.0),
            event=dfx.Event(lambda t, y, args, **kwargs: y - threshold),
            stepsize_controller=dfx.PIDController(1e-3, 1e-6),
            adjoint=dr.ReversibleAdjoint(),
        ).ys[0]

    thresholds = jnp.array([1e-3, 0.2, 2.0, 9.0, 5.0])
    alone = jnp.stack([solve(threshold) for threshold in thresholds])
    assert np.allclose(jax.vmap(solve)(thresholds), alone, rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize(
    "controller",
    cases((dfx.PIDController(rtol=1e-3, atol=1e-3),), slow=(dr.StepDensityController(),)),
)
def test_no_states_are_held(controller):
    """Members wait for others that have more steps to undo, even if the start is the only
    known state."""

    def loss(p0, t1, adjoint):
        sol = dfx.diffeqsolve(
            as_terms((lambda t, p, _: p, lambda t, q, _: -jnp.sin(q))),
            dr.StormerVerlet(),
            *(0.0, t1, None, (jnp.array(1.0), p0)),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        )
        return sum_of_squares(sol.ys), sol.stats["num_accepted_steps"]

    def of(adjoint):
        gradient = jax.grad(lambda p0, t1: loss(p0, t1, adjoint), has_aux=True)
        return jax.jit(jax.vmap(gradient))(jnp.array([0.3, 1.5, 0.5]), ends)

    ends = jnp.array([0.2, 6.0, 1.0])
    ours, steps = of(dr.ReversibleAdjoint())
    assert steps[0] < 16 < 32 < steps[1]
    theirs, _ = of(dfx.RecursiveCheckpointAdjoint(checkpoints=256))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
