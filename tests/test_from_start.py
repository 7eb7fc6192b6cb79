"""Steps that cannot be undone are differentiated from their start."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr
from diffrax_reversible._adjoint import steps
from diffrax_reversible._adjoint.drift import Drift
from diffrax_reversible._adjoint.walk import Walk

from .counter import Counter
from .problems import cases, Network, network_args, PID, relative_error, sum_of_squares
from .test_replays import STORE


Y0 = jnp.array([0.3, -0.2, 0.5])
TS = jnp.linspace(0.1, 1.9, 7)
JUMPING = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.7]))
SAVEAT = dfx.SaveAt(t0=True, t1=True, ts=TS, fn=lambda t, y, args: t + jnp.sin(y))


@pytest.fixture
def miss(monkeypatch):
    """Makes the backward pass miss every state `y` that it reconstructs, even over single
    steps, if `where(y)`."""
    drifts = Walk.drifts

    def patch(where=lambda y: True):
        def drifts_of_undone_steps(self, position, *args):
            undone = (position.origin.step > position.step) & (position.reach > 0)
            undone = undone & where(position.y)
            add = lambda x: x + jnp.where(undone, 1, 0).astype(x.dtype)
            return [Drift(*map(add, drift)) for drift in drifts(self, position, *args)]

        monkeypatch.setattr(Walk, "drifts", drifts_of_undone_steps)

    return patch


def loss(y0, scale, times, solver, adjoint, controller=PID):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(Network()),
        solver,
        *times,
        jnp.array(0.1),
        y0,
        network_args() | dict(scale=scale),
        saveat=SAVEAT,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=256,
    )
    return sum_of_squares(sol.ys)


def gradients(*settings, argnums=(0, 1)):
    """With respect to the state and `scale`, and by `argnums` to the ends of the solve."""
    point = Y0, jnp.array(1.3), (jnp.array(0.0), jnp.array(2.0))
    grad = jax.jit(lambda *point: jax.grad(loss, argnums)(*point, *settings))
    return grad(*point)


CASES = {
    "ALF4, with a jump": (dr.ALF4(), JUMPING),
    "LeapfrogMidpoint": (dfx.LeapfrogMidpoint(), dfx.ConstantStepSize()),
    "McCallumFoster": (dr.McCallumFoster(dfx.Tsit5()), PID),
    "ALF4 compensated": (dr.ALF4(compensated=True), PID),
    "ALF6": (dr.ALF6(), PID),
}


@functools.cache
def stored(name):
    """The gradients of a case by the default adjoint."""
    solver, controller = CASES[name]
    return gradients(solver, STORE, controller)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    cases(
        ("ALF4, with a jump",),
        more=("LeapfrogMidpoint",),
        slow=("McCallumFoster", "ALF4 compensated", "ALF6"),
    ),
)
@pytest.mark.parametrize("checkpoints", cases((8,), slow=(1,)))
def test_no_step_is_undone(miss, name, checkpoints):
    solver, controller = CASES[name]
    expected = stored(name)
    miss()
    ours = gradients(solver, dr.ReversibleAdjoint(checkpoints), controller)
    assert relative_error(ours, expected) < 1e-11


@pytest.mark.slow
def test_steps_that_are_forgotten(miss, monkeypatch):
    """Gradients are right with a short record, which may lack the start of a step."""
    expected = gradients(dr.ALF4(), STORE)
    monkeypatch.setattr(steps, "_least_rows", 2)
    monkeypatch.setattr(steps, "_most_rows", 0)
    miss()
    for checkpoints in (1, 3):
        ours = gradients(dr.ALF4(), dr.ReversibleAdjoint(checkpoints))
        assert relative_error(ours, expected) < 1e-11


@pytest.mark.slow
def test_times(miss):
    """Gradients with respect to times are right as well."""
    settings, argnums = (dr.ALF4(), dr.ReversibleAdjoint()), (0, 1, 2)
    expected = gradients(*settings, argnums=argnums)
    miss()
    assert relative_error(gradients(*settings, argnums=argnums), expected) < 1e-11


@pytest.mark.slow
def test_batch(miss):
    """Gradients are right if some members undo all steps and others few."""
    starts = jnp.array([[0.3, -0.2, 0.5], [2.0, 1.0, -0.3], [0.1, 0.2, -0.1]])

    def of(adjoint):
        grad = jax.grad(lambda y0: loss(y0, 1.3, (0.0, 2.0), dr.ALF4(), adjoint))
        return jax.jit(jax.vmap(grad))(starts)

    expected = of(STORE)
    miss(lambda y: y[0] > 0.2)
    assert relative_error(of(dr.ReversibleAdjoint()), expected) < 1e-11


@pytest.mark.more
def test_field_that_cancels():
    """The trace of a saturated layer in single precision, as in a normalising flow. Undoing
    a step recovers no digit of its integral, and the gradient needs none."""
    weights = jnp.array([[1.0, 0.2], [-0.3, 0.8]], jnp.float32)
    starts = jnp.array([[5.0, 13.0], [6.0, 12.0], [7.0, 10.0], [10.0, 11.0]], jnp.float32)

    def field(t, state, weights):
        y, _ = state
        layer = lambda y: jnp.tanh(weights @ y)
        return layer(y), jnp.trace(jax.jacfwd(layer)(y))

    def run(adjoint):
        def one(y0, weights):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dr.ALF4(),
                *(jnp.float32(0), jnp.float32(-4), jnp.float32(-0.5)),
                (y0, jnp.float32(0)),
                weights,
                adjoint=adjoint,
            )
            y, log = jax.tree.map(lambda y: y[0], sol.ys)
            return log + jnp.sum(y**2) / 2

        grad = jax.jit(jax.grad(one, (0, 1)))
        return [grad(y0, weights) for y0 in starts]

    assert relative_error(run(dr.ReversibleAdjoint()), run(STORE)) < 1e-5


@pytest.mark.slow
def test_evaluations(miss):
    """A step of five sub-steps takes 5 more evaluations from its start, and at most 5 to
    replay it and 5 to undo it in vain."""
    counter, count = Counter(), 7

    def loss(y0):
        field = dfx.ODETerm(lambda t, y, args: counter.one(t, y) * jnp.sin(y))
        times = 0.0, float(count), 1.0
        adjoint = dr.ReversibleAdjoint()
        sol = dfx.diffeqsolve(field, dr.ALF4(), *times, y0, adjoint=adjoint)
        return jnp.sum(sol.ys)

    def evaluations():
        return counter.during(jax.jit(lambda y0: jax.grad(loss)(y0)), jnp.array([0.3]))[0]

    once = evaluations()
    miss()
    assert once + count * 5 <= evaluations() <= once + count * (5 + 5 + 5)
