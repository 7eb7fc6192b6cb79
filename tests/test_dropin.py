"""Common uses of Diffrax, with the solver and the adjoint replaced and nothing else.

Small trainings in the manner of Diffrax's examples, in single precision, the default, and
with default settings. In every update the gradient equals that of the default adjoint with
the same solver and a checkpoint for every step.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import as_vector, cases


pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
]

MAX_STEPS = 4096
STORE = dfx.RecursiveCheckpointAdjoint(checkpoints=MAX_STEPS)


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def single(x):
    return jnp.asarray(x, jnp.float32)


def pid(rtol, atol):
    return dfx.PIDController(rtol=rtol, atol=atol)


def mlp(key, *sizes):
    keys = jr.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[1:], sizes[:-1], strict=True)
    return [
        (
            jr.normal(key, (m, n), jnp.float32) / np.float32(n**0.5),
            jnp.zeros(m, jnp.float32),
        )
        for key, m, n in shapes
    ]


def apply(layers, x, last=lambda x: x):
    for weight, bias in layers[:-1]:
        x = jax.nn.softplus(weight @ x + bias)
    weight, bias = layers[-1]
    return last(weight @ x + bias)


def neural_ode(solver):
    """Solved in a batch."""
    ts = single(np.linspace(0, 5, 20))
    y0s = single(np.random.default_rng(0).uniform(-0.6, 1, (8, 2)))
    targets = single(np.random.default_rng(1).normal(size=(8, 20, 2)) / 5)

    def field(t, y, layers):
        return apply(layers, y, jnp.tanh)

    def loss(layers, adjoint):
        def one(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                solver,
                *(ts[0], ts[-1], ts[1] - ts[0], y0, layers),
                saveat=dfx.SaveAt(ts=ts),
                stepsize_controller=pid(1e-3, 1e-6),
                adjoint=adjoint,
            )
            return sol.ys

        return jnp.mean((jax.vmap(one)(y0s) - targets) ** 2)

    return loss, mlp(jr.key(0), 2, 16, 16, 2)


def neural_cde(solver):
    """Driven by cubic splines through samples. With equal steps: in single precision, two
    solves that are compiled separately choose different steps here, and their gradients
    differ by percents."""
    ts = single(np.linspace(0, 6, 15))
    xs = np.stack([np.sin(np.linspace(0, 6, 15)), np.cos(np.linspace(0, 6, 15))], axis=1)
    xs = single(np.concatenate([np.asarray(ts)[:, None], xs], axis=1))
    coeffs = dfx.backward_hermite_coefficients(ts, xs)

    def field(t, y, layers):
        return apply(layers, y, jnp.tanh).reshape(6, 3)

    def loss(layers, adjoint):
        control = dfx.CubicInterpolation(ts, coeffs)
        sol = dfx.diffeqsolve(
            dfx.ControlTerm(field, control).to_ode(),
            solver,
            *(ts[0], ts[-1], single(0.1), jnp.ones(6, jnp.float32), layers),
            adjoint=adjoint,
        )
        return jnp.mean(sol.ys**2)

    return loss, mlp(jr.key(1), 6, 16, 18)


def normalising_flow(solver):
    """With the integral of the exact divergence as a second part of the state."""
    points = single(np.random.default_rng(2).normal(size=(8, 2)))

    def field(t, state, layers):
        y, _ = state
        fn = lambda y: apply(layers, jnp.append(y, t.astype(y.dtype)), jnp.tanh)
        return fn(y), jnp.trace(jax.jacfwd(fn)(y))

    def loss(layers, adjoint):
        def one(y):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                solver,
                *(single(0.5), single(0.0), single(-0.05), (y, single(0.0)), layers),
                adjoint=adjoint,
            )
            y, log = jax.tree.map(lambda x: x[0], sol.ys)
            return log + jnp.sum(y**2) / 2

        return jnp.mean(jax.vmap(one)(points))

    return loss, mlp(jr.key(2), 3, 16, 2)


def neural_sde(solver):
    del solver
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    path = dfx.VirtualBrownianTree(single(0), single(5), single(0.05), shape, jr.key(3))

    def drift(t, y, layers):
        return apply(layers[0], y, jnp.tanh) - y

    def diffusion(t, y, layers):
        return jnp.diag(apply(layers[1], y, jax.nn.sigmoid))

    def loss(layers, adjoint):
        terms = dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(diffusion, path))
        sol = dfx.diffeqsolve(
            terms,
            dfx.ReversibleHeun(),
            *(single(0), single(5), single(0.1), jnp.ones(2, jnp.float32), layers),
            saveat=dfx.SaveAt(ts=single(np.linspace(0, 5, 6))),
            adjoint=adjoint,
        )
        return jnp.mean(sol.ys**2)

    return loss, (mlp(jr.key(4), 2, 16, 2), mlp(jr.key(5), 2, 16, 2))


def latent_ode(solver):
    """Solves from the code of a series and decodes the solution. The code has a prior."""
    ts = single(np.linspace(0, 3, 12))
    ys = single(np.stack([np.sin(np.linspace(0, 3, 12)), np.linspace(0, 1, 12)], axis=1))

    def field(t, y, layers):
        return apply(layers, y, jnp.tanh)

    def loss(params, adjoint):
        encoder, scale, hidden, decoder = params
        mean, log_std = jnp.split(apply(encoder, ys.reshape(-1)), 2)
        code = mean + jnp.exp(log_std) * single([0.3, -0.5, 0.1, 0.8])
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: scale * field(t, y, args)),
            solver,
            *(ts[0], ts[-1], single(0.4), code, hidden),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        rebuilt = jax.vmap(lambda y: apply(decoder, y))(sol.ys)
        prior = jnp.sum(mean**2 + jnp.exp(2 * log_std) - 2 * log_std)
        return jnp.mean((rebuilt - ys) ** 2) + 0.01 * prior

    sizes = (24, 16, 8), (4, 16, 4), (4, 8, 2)
    encoder, hidden, decoder = (mlp(jr.key(i), *n) for i, n in enumerate(sizes))
    return loss, (encoder, single(1.0), hidden, decoder)


def kalman_filter(solver):
    """The filter's covariance obeys a Riccati equation. It contracts, more strongly as the
    parameters improve."""
    ts = single(np.linspace(0, 6, 61))
    noise = np.random.default_rng(4).normal(size=61) / 3
    observed = dfx.LinearInterpolation(
        ts, single(np.sin(2 * np.linspace(0, 6, 61)) + noise)
    )

    def field(t, state, params):
        x, p = state
        transition, log_q, log_r = params
        gain = p[:, 0] / jnp.exp(log_r)
        dx = transition @ x + gain * (observed.evaluate(t) - x[0])
        noise = jnp.exp(log_q) * jnp.eye(2, dtype=p.dtype)
        dp = transition @ p + p @ transition.T + noise - jnp.outer(gain, p[0])
        return dx, dp

    def loss(params, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            *(ts[0], ts[-1], single(0.02)),
            (jnp.zeros(2, jnp.float32), jnp.eye(2, dtype=jnp.float32)),
            params,
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        x, _ = sol.ys
        return jnp.mean((x[:, 0] - jnp.sin(2 * ts)) ** 2)

    return loss, (single([[0.1, 1.0], [-2.0, -0.3]]), single(0.0), single(-2.5))


def forcing(solver):
    """An oscillator under an interpolated force, which is learned at the nodes."""
    ts = single(np.linspace(0, 4, 9))

    def field(t, y, force):
        q, p = y
        return p, -q - 0.1 * p + dfx.LinearInterpolation(ts, force).evaluate(t)

    def loss(force, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            *(ts[0], ts[-1], single(0.1), (single(1.0), single(0.0)), force),
            saveat=dfx.SaveAt(ts=ts[1:]),
            stepsize_controller=pid(1e-4, 1e-6),
            adjoint=adjoint,
        )
        return jnp.mean((sol.ys[0] - 1) ** 2)

    return loss, single(np.linspace(0, 1, 9))


def steady_state(solver):
    """An event ends the solve where the system comes to rest."""
    target = single([0.7, 0.2])

    def field(t, y, params):
        weight, bias = params
        return jnp.tanh(weight @ y + bias) - y

    def loss(params, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            *(0.0, jnp.inf, None, jnp.zeros(2, jnp.float32), params),
            max_steps=None if isinstance(adjoint, dr.ReversibleAdjoint) else MAX_STEPS,
            stepsize_controller=pid(1e-3, 1e-6),
            event=dfx.Event(dfx.steady_state_event()),
            adjoint=adjoint,
        )
        return jnp.sum((sol.ys[0] - target) ** 2)

    return loss, (single([[0.3, -0.2], [0.4, 0.1]]), single([0.2, 0.1]))


TRAININGS = cases(
    (neural_cde,),
    more=(kalman_filter,),
    slow=(normalising_flow, neural_sde, neural_ode, latent_ode, forcing),
)


@pytest.mark.slow
def test_steady_state():
    """Gradients are those of the default adjoint or, where the backward pass has restarted,
    closer to that of the fixed point."""
    reports = []
    loss, params = steady_state(dr.ALF4())
    adjoints = dr.ReversibleAdjoint(report=reports.append), STORE
    ours, theirs = (
        jax.jit(jax.grad(lambda p, adjoint=adjoint: loss(p, adjoint)))
        for adjoint in adjoints
    )

    def at_rest(params):
        weight, bias = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        y = jnp.zeros(2)
        for _ in range(200):
            y = jnp.tanh(weight @ y + bias)
        return jnp.sum((y - jnp.array([0.7, 0.2])) ** 2)

    for _ in range(5):
        grad = theirs(params)
        exact, got, want = map(as_vector, (jax.grad(at_rest)(params), ours(params), grad))
        jax.effects_barrier()
        size = np.max(np.abs(want))
        if reports[-1]["restarted_steps"] > 0:
            assert np.max(np.abs(got - exact)) < np.max(np.abs(want - exact))
        else:
            assert np.max(np.abs(got - want)) < 1e-4 * size
        params = jax.tree.map(lambda p, g, r=0.5 / size: p - single(r) * g, params, grad)
    assert any(report["restarted_steps"] > 0 for report in reports)


@pytest.mark.long
@pytest.mark.parametrize("training", TRAININGS, ids=lambda f: f.__name__)
def test_training(training):
    loss, params = training(dr.ALF4())
    rng = np.random.default_rng(0)
    eps = np.finfo(np.float32).eps

    def rounded(params):
        signs = lambda p: single(1 + eps * rng.choice([-1, 1], p.shape))
        return jax.tree.map(lambda p: p * signs(p), params)

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda p, adjoint=adjoint: loss(p, adjoint)))
        for adjoint in (dr.ReversibleAdjoint(), STORE)
    )
    for _ in range(5):
        value, grad = ours(params)
        other, expected = theirs(params)
        assert float(value) == pytest.approx(float(other), rel=1e-5)
        got, want = as_vector(grad), as_vector(expected)
        # What a rounding of the parameters changes, which differs between processors.
        by_rounding = [as_vector(theirs(rounded(params))[1]) - want for _ in range(4)]
        size, by_rounding = np.max(np.abs(want)), np.max(np.abs(by_rounding))
        allowed = np.clip(4 * by_rounding, 1e-4 * size, 1e-3 * size)
        assert np.max(np.abs(got - want)) < allowed
        rate = 0.5 / np.max(np.abs(want))
        params = jax.tree.map(lambda p, g, r=rate: p - single(r) * g, params, grad)


@pytest.mark.slow
def test_hessian():
    """Hessians of coupled species, as in a fit by Newton's method."""
    ts = single(np.linspace(0, 4, 9))

    def loss(rates, adjoint):
        def field(t, y, rates):
            prey, predators = y
            a, b, c, d = rates
            return prey * (a - b * predators), predators * (c * prey - d)

        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            *(ts[0], ts[-1], single(0.05), (single(1.0), single(0.5)), rates),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        return sum(jnp.mean((y - 1) ** 2) for y in sol.ys)

    rates = single([1.1, 0.4, 0.3, 0.5])
    ours, theirs = (
        jax.jit(jax.hessian(lambda rates, adjoint=adjoint: loss(rates, adjoint)))(rates)
        for adjoint in (dr.ReversibleAdjoint(), dfx.DirectAdjoint())
    )
    assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
