"""Single and half precision, and compensated and bitwise reversible additions."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import as_vector, BITWISE, cases, COMPENSATED, kepler, lorenz, relative_error


def pendulum(t, y, args):
    del t, args
    return y[1], -jnp.sin(y[0])


class Tanh(eqx.Module):
    """A network of a few layers."""

    mlp: eqx.nn.MLP

    def __init__(self, size, width, dtype):
        # Drawn in single precision, so that the weights are the same in every dtype.
        mlp = eqx.nn.MLP(
            size,
            size,
            width,
            2,
            activation=jnp.tanh,
            dtype=jnp.float32,
            key=jax.random.key(0),
        )
        self.mlp = cast(mlp, dtype)

    def __call__(self, t, y, args):
        del t, args
        return 2 * self.mlp(y)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def skew_network(t, y, args):
    """Solutions stay bounded, as the sum of `log(cosh(y))` is conserved."""
    del t, args
    w = jnp.arange(-6, 10).reshape(4, 4).astype(y.dtype) / 10
    return (w - w.T) @ jnp.tanh(y)


def initial(name, dtype):
    y0 = {
        "kepler": (jnp.array([0.4, 0.0]), jnp.array([0.0, 2.0])),
        "pendulum": (jnp.array(1.0), jnp.array(0.3)),
        "network": jnp.linspace(-1, 1, 4),
    }[name]
    return cast(y0, dtype)


FIELDS = {"kepler": kepler, "pendulum": pendulum, "network": skew_network}


@pytest.mark.optimised
@pytest.mark.parametrize(
    "name, dtype",
    # In float32, without the restarts of a solve, 1,600 orbits of Kepler's problem outgrow
    # the lattice more than sixteenfold.
    cases(
        (),
        slow=(("pendulum", jnp.float32), ("kepler", jnp.float64), ("network", jnp.float32)),
    ),
)
def test_every_state_of_a_million_steps_to_the_last_bit(name, dtype):
    solver, steps = BITWISE, 1_000_000
    term, y0 = dfx.ODETerm(FIELDS[name]), initial(name, dtype)
    # A few thousand different step sizes.
    h = jnp.asarray(0.01 + 0.005 * jnp.sin(jnp.arange(steps) % 5_000), dtype)
    zero = jnp.zeros((), dtype)

    def forward(state, h):
        y, _, _, solver_state, _ = solver.advance(term, zero, h, state[0], None, state[1])
        return (y, solver_state), state

    def backward(carry, at):
        state, wrong = carry
        h, expected = at
        state = solver.backward_step(term, zero, h, state[0], None, state[1])
        same = [
            jnp.array_equal(x, e)
            for x, e in zip(leaves(state), leaves(expected), strict=True)
        ]
        return (state, wrong + jnp.where(jnp.stack(same).all(), 0, 1)), None

    def leaves(state):
        y, solver_state = state
        return jax.tree.leaves((y, solver_state.v, solver_state.low))

    start = y0, solver.init(term, zero, h[0], y0, None)
    end, states = jax.jit(lambda start, h: lax.scan(forward, start, h))(start, h)
    assert np.max(np.abs(as_vector(end[0]) - as_vector(y0))) > 1e-2
    walk = jax.jit(lambda *carry: lax.scan(backward, carry, (h, states), reverse=True)[0])
    (y, _), wrong = walk(end, jnp.array(0))
    assert wrong == 0
    assert np.array_equal(as_vector(y), as_vector(y0))


@pytest.mark.optimised
@pytest.mark.parametrize(
    "name", cases(("network",), slow=[name for name in FIELDS if name != "network"])
)
@pytest.mark.parametrize("dtype", cases((), long=(jnp.float64,), slow=(jnp.float32,)))
def test_no_drift_in_gradients(name, dtype):
    """Between restarts, the backward pass of a gradient with `bitwise=True` is exact to the
    last bit, under varying step sizes. With plain sums it is not."""

    def gradient(solver):
        reports = []

        @eqx.filter_jit
        def final(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(FIELDS[name]),
                solver,
                jnp.zeros((), dtype),
                jnp.asarray(50.0, dtype),
                jnp.asarray(0.01, dtype),
                y0,
                stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
                adjoint=dr.ReversibleAdjoint(50, drift_tol=0, report=reports.append),
                max_steps=20_000,
            )
            total = sum(jnp.sum(y) for y in jax.tree.leaves(sol.ys))
            return total, sol.stats["num_accepted_steps"]

        grad, steps = jax.grad(final, has_aux=True)(initial(name, dtype))
        jax.effects_barrier()
        assert np.all(np.isfinite(as_vector(grad)))
        return reports[-1]["undone_steps"], steps

    undone, steps = gradient(BITWISE)
    assert undone == steps
    # Any miss has steps undone again.
    undone, steps = gradient(dr.ALF4())
    assert undone > steps


@pytest.mark.parametrize(
    "solver_cls, t1", cases((), slow=((dr.ALF6, 20.0), (dr.ALF4, 5.0)))
)
def test_gradient_in_single_precision(solver_cls, t1):
    """Errors against double precision are below three times the default adjoint's."""

    def gradient(solver, adjoint, dtype):
        @eqx.filter_jit
        def final(diff, static, dt0):
            field, y0 = eqx.combine(diff, static)
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, field: field(t, y, None)),
                solver,
                jnp.zeros((), dtype),
                jnp.asarray(t1, dtype),
                dt0,
                y0,
                field,
                adjoint=adjoint,
                max_steps=10_010,
            )
            return jnp.sum(sol.ys**2)

        inputs = Tanh(8, 32, dtype), cast(jnp.linspace(-1, 1, 8), dtype)
        diff, static = eqx.partition(inputs, eqx.is_inexact_array)

        def of(steps):
            return as_vector(jax.grad(final)(diff, static, jnp.asarray(t1 / steps, dtype)))

        return of

    compensated = solver_cls(compensated=True)
    exact = gradient(solver_cls(), dfx.RecursiveCheckpointAdjoint(), jnp.float64)
    default = gradient(solver_cls(), dfx.RecursiveCheckpointAdjoint(), jnp.float32)
    ours = gradient(compensated, dr.ReversibleAdjoint(), jnp.float32)
    for steps in (50, 500, 10_000):
        reference = exact(steps)
        error, default_error = (
            np.linalg.norm(g - reference) / np.linalg.norm(reference)
            for g in (ours(steps), default(steps))
        )
        assert error < 3 * default_error, steps


def pendulum_force(t, q, k):
    del t
    return -k * jnp.sin(q)


def central_force(t, q, k):
    del t
    return -k * q / jnp.sum(q**2) ** jnp.asarray(1.5, q.dtype)


# A pendulum that falls from its top, and a comet that passes close to the sun.
MOTIONS = dict(
    fall=(pendulum_force, 3.14, 0.0, 10.0),
    comet=(central_force, [0.1, 0.0], [0.0, 19**0.5], 20.0),
)
PID = dfx.PIDController(rtol=1e-5, atol=1e-5)
DENSITY = dr.StepDensityController(fraction=0.05)
UNSTABLE = cases(
    (("fall", dr.BlanesMoan4(nystrom=True), PID),),
    slow=(
        ("fall", dr.BlanesMoan6(nystrom=True), DENSITY),
        ("comet", dr.BlanesMoan6(nystrom=True), PID),
    ),
)


@pytest.mark.long
@pytest.mark.parametrize("motion, solver, controller", UNSTABLE)
def test_unstable_orbits(motion, solver, controller):
    """In single precision, symplectic steps amplify rounding errors too, where orbits are
    unstable. By default, as states are held, gradients are about as accurate as with the
    default adjoint."""
    force, q0, p0, t1 = MOTIONS[motion]
    terms = dfx.ODETerm(lambda t, p, k: p), dfx.ODETerm(force)

    def gradient(adjoint, solver=solver, controller=controller, dtype=jnp.float32):
        def final(q, p, k):
            times = *jnp.array([0, t1], dtype), jnp.asarray(0.01, dtype)
            sol = dfx.diffeqsolve(
                *(terms, solver, *times, (q, p), k),
                adjoint=adjoint,
                stepsize_controller=controller,
            )
            return jnp.sum(sol.ys[0] ** 2)

        # The same numbers in every precision.
        inputs = (jnp.asarray(jnp.asarray(x, jnp.float32), dtype) for x in (q0, p0, 1))
        return jax.jit(jax.grad(final, (0, 1, 2)))(*inputs)

    store = dfx.RecursiveCheckpointAdjoint(checkpoints=4096)
    precise = dfx.PIDController(rtol=1e-10, atol=1e-10)
    exact = gradient(store, dr.KahanLi8(), precise, jnp.float64)
    ours, default = (
        relative_error(gradient(adjoint), exact)
        for adjoint in (dr.ReversibleAdjoint(), store)
    )
    assert ours < 3 * default
    with pytest.raises(RuntimeError, match="missed a known state"):
        gradient(dr.ReversibleAdjoint(checkpoints=0))


@pytest.mark.slow
def test_unstable_orbits_in_double_precision():
    """A comet with an eccentricity of 0.99 needs states too, which are not held there by
    default."""

    def gradient(adjoint):
        def final(q, p):
            sol = dfx.diffeqsolve(
                (dfx.ODETerm(lambda t, p, k: p), dfx.ODETerm(central_force)),
                dr.BlanesMoan6(nystrom=True),
                *(0.0, 20.0, 0.01, (q, p), 1.0),
                adjoint=adjoint,
                stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
            )
            return jnp.sum(sol.ys[0] ** 2)

        start = jnp.array([0.01, 0.0]), jnp.array([0.0, 199**0.5])
        return jax.jit(jax.grad(final, (0, 1)))(*start)

    expected = gradient(dfx.RecursiveCheckpointAdjoint(checkpoints=4096))
    assert relative_error(gradient(dr.ReversibleAdjoint(checkpoints=8)), expected) < 1e-4
    with pytest.raises(RuntimeError, match="missed a known state"):
        gradient(dr.ReversibleAdjoint())


def test_time_does_not_drift():
    """The compensated solution of `y' = 1` is the time, to 2 ulp, after a million steps."""

    def final(solver):
        @jax.jit
        def run(dt0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: jnp.ones_like(y)),
                solver,
                jnp.float32(0),
                jnp.float32(1000),
                dt0,
                jnp.float32(0),
                saveat=dfx.SaveAt(t1=True),
                max_steps=1_100_000,
            )
            return sol.ys[0], sol.ts[0], sol.stats["num_steps"]

        y, t, steps = run(jnp.float32(0.001))
        assert steps > 900_000
        return abs(float(y) - float(t)) / np.spacing(np.float32(t))

    assert final(COMPENSATED) <= 2
    assert final(dr.ALF4()) > 200


@pytest.mark.parametrize("unit", (1e-12, 1e12))
@pytest.mark.parametrize(
    "solver",
    cases(
        (dr.ALF4(compensated=True), dr.BlanesMoan4(compensated=True)),
        more=(dr.ALF6(bitwise=True),),
    ),
)
def test_start_at_rest(solver, unit):
    """Where the state is zero at first, and the force too, its size is not known yet."""
    single = jnp.float32

    def loss(force):
        push = lambda t: force * unit * jnp.sin(t)
        terms, y0 = dfx.ODETerm(lambda t, y, args: push(t) - y), jnp.zeros(2, single)
        if isinstance(solver, dr.BlanesMoan4):
            terms, y0 = (dfx.ODETerm(lambda t, p, args: p), terms), (y0, y0)
        step = (jnp.asarray(t, single) for t in (0, 2, 0.05))
        adjoint = dr.ReversibleAdjoint()
        ys = dfx.diffeqsolve(terms, solver, *step, y0, adjoint=adjoint).ys
        return jax.tree.leaves(ys)[0][0, 0] / jnp.asarray(unit, single)

    first_order = (np.exp(-2) + np.sin(2) - np.cos(2)) / 2
    second_order = np.sin(2) / 2 - np.cos(2)
    exact = second_order if isinstance(solver, dr.BlanesMoan4) else first_order
    got = jax.jit(jax.value_and_grad(loss))(jnp.asarray(1, single))
    np.testing.assert_allclose(got, exact, rtol=2e-6)


@pytest.mark.slow
def test_chaos():
    """Between restarts, compensated sums drift much less than plain ones."""

    def gradient(solver, adjoint):
        @eqx.filter_jit
        def final(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lorenz), solver, 0.0, 10.0, jnp.array(0.01), y0, adjoint=adjoint
            )
            return jnp.sum(sol.ys)

        return jax.grad(final)(jnp.array([1.0, 2.0, 20.0]))

    def error(solver):
        ours = gradient(solver, dr.ReversibleAdjoint(checkpoints=12, drift_tol=1e-6))
        expected = gradient(solver, dfx.RecursiveCheckpointAdjoint())
        return np.max(np.abs(ours - expected)) / np.max(np.abs(expected))

    compensated = error(dr.ALF6(compensated=True))
    # Before 0.7, the vector field rounded differently in the two programs.
    recent = jax.__version_info__ >= (0, 7)
    assert compensated < (1e-11 if recent else 1e-10)
    assert compensated < (1e-2 if recent else 0.1) * error(dr.ALF6()) < 1e-8


@pytest.mark.parametrize("dtype", cases((), more=(jnp.float16,), slow=(jnp.bfloat16,)))
@pytest.mark.parametrize("compensated", cases((False,), slow=(True,)))
def test_half_precision(dtype, compensated):
    """Gradients are right if the state is in half, and time in single precision."""

    def gradient(adjoint):
        # Diffrax multiplies by the step size, which promotes dtypes.
        with jax.numpy_dtype_promotion("standard"):

            @eqx.filter_jit
            def final(w, y0):
                sol = dfx.diffeqsolve(
                    dfx.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
                    dr.ALF4(compensated=compensated),
                    jnp.float32(0),
                    jnp.float32(1),
                    jnp.float32(1 / 16),
                    y0,
                    w,
                    adjoint=adjoint,
                )
                return jnp.sum(sol.ys.astype(jnp.float32) ** 2)

            w = jax.random.normal(jax.random.key(0), (4, 4), dtype)
            return jax.grad(final, argnums=(0, 1))(w, jnp.linspace(-1, 1, 4, dtype=dtype))

    ours = gradient(dr.ReversibleAdjoint())
    assert all(g.dtype == dtype for g in ours)
    error = np.abs(as_vector(ours) - as_vector(gradient(dfx.RecursiveCheckpointAdjoint())))
    size = np.max(np.abs(as_vector(ours)))
    assert np.max(error) < 8 * float(jnp.finfo(dtype).eps) * size
