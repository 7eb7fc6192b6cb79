"""Batches whose members all do something different: each has the solution and the gradient
that it has alone."""

import dataclasses
import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr
from diffrax_reversible._adjoint.drift import Drift
from diffrax_reversible._adjoint.walk import Walk

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
def test_member_whose_outputs_are_not_used():
    """Its gradient is zero, although its steps cannot be undone."""

    def loss(y0, rates, adjoint):
        def last(y0, rate):
            field = dfx.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(t)))
            where = 0.0, 3.0, 0.02, y0, rate
            sol = dfx.diffeqsolve(field, dr.ALF2(), *where, adjoint=adjoint, max_steps=256)
            return sol.ys[-1]

        return jnp.sum(jnp.where(rates > 20, 0, jax.vmap(last)(y0, rates)))

    def gradient(rates, adjoint):
        return jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(
            jnp.ones(3), rates, adjoint
        )

    lost, ours = jnp.array([1.0, 2.0, 30.0]), dr.ReversibleAdjoint(checkpoints=0)
    expected = gradient(lost, dfx.RecursiveCheckpointAdjoint(checkpoints=256))
    for got, right in zip(gradient(lost, ours), expected, strict=True):
        assert got[2] == 0
        np.testing.assert_allclose(got, right, rtol=1e-6)
    with pytest.raises(Exception, match="missed a known state"):
        gradient(jnp.array([1.0, 2.0, 20.0]), ours)


@pytest.mark.parametrize("where", cases(("outputs",), more=("field", "norm")))
def test_collectives(where):
    """Members may communicate along the axis of a batch. JAX has no gradient of the batch
    as a whole then, but one of each member in it."""
    mean = lambda x, here: jax.lax.pmean(x, "batch") if where == here else 0.0
    norm = optx.rms_norm
    if where == "norm":
        norm = lambda error: jax.lax.pmax(optx.rms_norm(error), "batch")

    def loss(adjoint, y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y - mean(y, "field")),
            dr.ALF4(),
            *(0.0, 1.0, 0.1, y0),
            saveat=dfx.SaveAt(t1=True, fn=lambda t, y, args: y - mean(y, "outputs")),
            stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-4, norm=norm),
            adjoint=adjoint,
            max_steps=16,
        )
        return jnp.sum(sol.ys**2)

    ours, default = (
        ft.partial(loss, adjoint)
        for adjoint in (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    over_batch = lambda fn: jax.jit(jax.vmap(fn, axis_name="batch"))
    y0 = jnp.array([1.0, 2.0, -1.0])
    assert relative_error(over_batch(ours)(y0), over_batch(default)(y0)) < 1e-12
    if where == "norm":
        # Diffrax's own adjoints differentiate the maximum. The solution is linear.
        expected = 2 * over_batch(default)(y0) / y0
    else:
        expected = over_batch(jax.grad(default))(y0)
    assert relative_error(over_batch(jax.grad(ours))(y0), expected) < 1e-10
    with pytest.raises(NotImplementedError, match="Differentiate within the batch"):
        jax.grad(lambda y0: jnp.sum(over_batch(ours)(y0)))(y0)


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


@pytest.mark.parametrize(
    "controller",
    cases((dfx.ConstantStepSize(),), long=(dfx.PIDController(rtol=1e-4, atol=1e-6),)),
)
def test_no_members(controller):
    """An empty batch, such as the last one of a data set, has an empty gradient, and one of
    zero with respect to what members share."""

    def loss(y0s, rate):
        solve = lambda y0: dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y),
            dr.ALF4(),
            *(0.0, 1.0, 0.1, y0, rate),
            stepsize_controller=controller,
            adjoint=dr.ReversibleAdjoint(),
        )
        return sum_of_squares(jax.vmap(solve)(y0s).ys)

    inputs = jnp.zeros((0, 3)), jnp.array(1.0)
    of_starts, of_rate = jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)
    assert of_starts.shape == (0, 3)
    assert of_rate == 0


# More parameters than are summed member by member.
WIDTH = 64
NETWORK = {
    "in": jnp.sin(jnp.arange(2.0 * WIDTH)).reshape(WIDTH, 2),
    "mid": jnp.sin(jnp.arange(1.0 * WIDTH**2)).reshape(WIDTH, WIDTH) / 8,
    "out": jnp.cos(jnp.arange(2.0 * WIDTH)).reshape(2, WIDTH) / WIDTH,
}


PID = dfx.PIDController(rtol=1e-4, atol=1e-6)


def shared_loss(
    solver, adjoint, network, rate, t1, saveat=None, controller=None, dt0=0.05, event=None
):
    def field(t, y, args):
        network, rate = args
        hidden = jnp.tanh(network["mid"] @ jnp.tanh(network["in"] @ y))
        return network["out"] @ hidden - rate * (y - jnp.cos(t))

    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        *(0.0, t1, dt0, jnp.array([0.2, 0.8], rate.dtype), (network, rate)),
        saveat=dfx.SaveAt(t1=True) if saveat is None else saveat(t1),
        stepsize_controller=controller or PID,
        event=event,
        adjoint=adjoint,
        max_steps=256,
    )
    return sum_of_squares(sol.ys)


@pytest.mark.parametrize(
    "miss, of_all, with_rates, repeats",
    (
        (2e-7, False, False, False),
        (2e-7, False, True, True),
        (2e-7, True, False, True),
        (2e-6, False, False, True),
    ),
    ids=("one", "one, own gradients", "all", "one, beyond the tolerance"),
)
def test_mean_miss(monkeypatch, miss, of_all, with_rates, repeats):
    """If a batch asks for a sum over its members, the mean of their misses decides whether
    all undo their last steps again. The tolerance is 1e-6."""
    drifts = Walk.drifts

    def larger_drifts(self, position, *args):
        _, rate = self.context(self.params).args
        far = position.origin.step - position.step > 3
        far &= of_all | (rate == 2)
        add = lambda x: x + jnp.where(far, miss, 0).astype(x.dtype)
        return [Drift(*map(add, drift)) for drift in drifts(self, position, *args)]

    monkeypatch.setattr(Walk, "drifts", larger_drifts)
    known = []

    def loss(network, rates):
        adjoint = dr.ReversibleAdjoint(checkpoints=1, watch=known.append)
        one = lambda rate: shared_loss(dr.ALF4(), adjoint, network, rate, 3.0)
        return jnp.sum(jax.vmap(one)(rates))

    argnums = (0, 1) if with_rates else (0,)
    jax.block_until_ready(jax.jit(jax.grad(loss, argnums))(NETWORK, jnp.linspace(1, 2, 32)))
    jax.effects_barrier()
    assert any(state["repeated"] for state in known) == repeats


# One member restarts, one hardly takes a step, and one takes none.
RATES, ENDS = jnp.array([20.0, 0.5, 3.0, 1.0]), jnp.array([3.0, 4.0, 0.1, 0.0])
INTERPOLATED = lambda t1: dfx.SaveAt(ts=jnp.linspace(0, 1, 4) * t1)
FIRST_LAYER = lambda t, y, args: jnp.tanh(args[0]["in"] @ y)
FUNCTION = lambda t1: dfx.SaveAt(steps=True, fn=FIRST_LAYER)
INTERPOLATED_FUNCTION = lambda t1: dfx.SaveAt(ts=jnp.linspace(0, 1, 4) * t1, fn=FIRST_LAYER)
JUMPS = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.05, 1.5]))
EVENT = dfx.Event(lambda t, y, args, **kwargs: y[1] - 0.4, optx.Newton(1e-8, 1e-8))


@pytest.mark.parametrize(
    "solver, adjoint, more",
    cases(
        ((dr.ALF4(), dr.ReversibleAdjoint(), {}),),
        more=(
            (dr.ALF4(), dr.ReversibleAdjoint(), dict(saveat=INTERPOLATED_FUNCTION)),
            (dr.McCallumFoster(dfx.Tsit5()), dr.ReversibleAdjoint(), {}),
            (dr.ALF4(), dr.ReversibleAdjoint(checkpoints=1), dict(saveat=INTERPOLATED)),
        ),
        slow=(
            (dr.ALF4(), dr.ReversibleAdjoint(), dict(saveat=FUNCTION)),
            (dr.ALF4(), dr.ReversibleAdjoint(), dict(controller=JUMPS)),
            (dr.ALF4(), dr.ReversibleAdjoint(), dict(event=EVENT)),
            (dr.ALF6(), dr.ReversibleAdjoint(checkpoints=3), dict(saveat=INTERPOLATED)),
            (
                dfx.ReversibleHeun(),
                dr.ReversibleAdjoint(),
                dict(controller=dfx.ConstantStepSize(), dt0=0.02),
            ),
            (dr.Gauss4(), dr.ReversibleAdjoint(), {}),
        ),
    ),
)
def test_shared_parameters(solver, adjoint, more):
    """Their gradient is summed over the batch as it arises. It equals the sum of those of
    the members, each of which is computed apart, and that of the default adjoint."""
    batch, counts = (NETWORK, RATES, ENDS), []

    def summed(adjoint, solver=solver, more=more):
        def loss(network, rates, ends):
            one = lambda rate, t1: shared_loss(solver, adjoint, network, rate, t1, **more)
            return jnp.sum(jax.vmap(one)(rates, ends))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*batch)

    def apart(network, rate, t1):
        loss = lambda network, rate: shared_loss(solver, adjoint, network, rate, t1, **more)
        return jax.grad(loss, argnums=(0, 1))(network, rate)

    ours = summed(dataclasses.replace(adjoint, report=counts.append))
    jax.effects_barrier()
    of_network, of_rates = jax.jit(jax.vmap(apart, (None, 0, 0)))(*batch)
    of_network = jax.tree.map(lambda x: jnp.sum(x, axis=0), of_network)
    assert relative_error(ours, (of_network, of_rates)) < 1e-12
    default = dfx.RecursiveCheckpointAdjoint(checkpoints=256)
    theirs = summed(default)
    if sum(count["restarted_steps"] for count in counts) == 0:
        assert relative_error(ours, theirs) < 1e-8
    else:
        # With restarts of its own, the gradient is that of another solve, as accurate.
        accurate = more | dict(controller=dfx.PIDController(1e-9, 1e-11))
        exact = summed(default, dfx.Dopri8(), accurate)
        assert relative_error(ours, exact) < 1.1 * relative_error(theirs, exact)


@pytest.mark.more
def test_shared_parameters_and_times():
    """As `test_shared_parameters`, where the ends of the members are differentiated too."""

    def loss(network, t1, rate):
        solver, adjoint = dr.ALF4(), dr.ReversibleAdjoint()
        return shared_loss(solver, adjoint, network, rate, t1, saveat=INTERPOLATED_FUNCTION)

    def sum_of_losses(network, ends):
        return jnp.sum(jax.vmap(loss, (None, 0, 0))(network, ends, RATES))

    ours = jax.jit(jax.grad(sum_of_losses, argnums=(0, 1)))(NETWORK, ENDS)
    apart = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, 0, 0)))
    of_network, of_ends = apart(NETWORK, ENDS, RATES)
    of_network = jax.tree.map(lambda x: jnp.sum(x, axis=0), of_network)
    assert relative_error(ours, (of_network, of_ends)) < 1e-12


@pytest.mark.long
def test_shared_parameters_when_a_member_misses():
    """In single precision a member undoes steps again. The other does so with it, as what
    it has added to a common sum cannot be taken back alone; apart it does not."""
    known = []
    network, *batch = jax.tree.map(
        lambda x: x.astype(jnp.float32),
        (NETWORK, jnp.array([90.0, 2.0]), jnp.array([2.0, 30.0])),
    )

    def loss(network, rate, t1):
        adjoint = dr.ReversibleAdjoint(watch=known.append)
        return shared_loss(dr.ALF4(), adjoint, network, rate, t1)

    def sum_of_losses(network, *batch):
        return jnp.sum(jax.vmap(loss, (None, 0, 0))(network, *batch))

    ours = jax.jit(jax.grad(sum_of_losses))(network, *batch)
    jax.effects_barrier()
    repeated = sum(state["repeated"] for state in known)
    known.clear()
    apart = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(network, *batch)
    jax.effects_barrier()
    assert repeated > sum(state["repeated"] for state in known) > 0
    expected = jax.tree.map(lambda x: jnp.sum(x, axis=0), apart)
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.long
def test_batches_of_batches():
    """Some parameters are shared by all members, and some by those of a row."""
    rates = jnp.array([[2.0, 0.5, 3.0], [1.0, 5.0, 0.1]])
    scales = jnp.array([1.0, -0.5])

    def loss(network, scale, rate):
        network = network | dict(out=network["out"] * scale)
        return shared_loss(dr.ALF4(), dr.ReversibleAdjoint(), network, rate, 1.0)

    def sum_of_losses(network, scales):
        row = jax.vmap(loss, (None, None, 0))
        return jnp.sum(jax.vmap(row, (None, 0, 0))(network, scales, rates))

    ours = jax.jit(jax.grad(sum_of_losses, argnums=(0, 1)))(NETWORK, scales)
    apart = jax.vmap(jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0)), (None, 0, 0))
    of_network, of_scales = jax.jit(apart)(NETWORK, scales, rates)
    of_network = jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1)), of_network)
    expected = of_network, jnp.sum(of_scales, axis=1)
    assert relative_error(ours, expected) < 1e-12


@pytest.mark.parametrize(
    "saveat",
    cases((), long=(INTERPOLATED_FUNCTION,), more=(None,)),
    ids=("function", "end"),
)
def test_memory_per_member(saveat):
    """No member holds a cotangent of the parameters of its own."""

    def bytes_of(members):
        def loss(network, rates):
            def one(rate):
                solver, adjoint = dr.ALF4(), dr.ReversibleAdjoint()
                return shared_loss(solver, adjoint, network, rate, 1.0, saveat)

            return jnp.sum(jax.vmap(one)(rates))

        lowered = jax.jit(jax.grad(loss)).lower(NETWORK, jnp.linspace(1, 2, members))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    network = sum(x.nbytes for x in jax.tree.leaves(NETWORK))
    assert bytes_of(48) - bytes_of(16) < 32 * network / 3
