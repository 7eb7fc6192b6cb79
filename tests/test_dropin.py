"""What people do with Diffrax, with the solver and the adjoint replaced and nothing else.

In single precision, as by default, and with default settings: trainings in the manner of
Diffrax's examples, small. In every update the gradient is compared with that of the default
adjoint, with the same solver and a checkpoint for every step.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import as_vector


pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
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
    """Of spirals, in a batch."""
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
    solves that are compiled apart choose others here, and gradients differ by percents."""
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
    """With the exact divergence as a second state."""
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


TRAININGS = neural_ode, neural_cde, normalising_flow, neural_sde


@pytest.mark.parametrize("training", TRAININGS, ids=lambda f: f.__name__)
def test_training(training):
    loss, params = training(dr.ALF4())
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda p, adjoint=adjoint: loss(p, adjoint)))
        for adjoint in (dr.ReversibleAdjoint(), STORE)
    )
    for _ in range(5):
        value, grad = ours(params)
        other, expected = theirs(params)
        assert float(value) == pytest.approx(float(other), rel=1e-5)
        got, want = as_vector(grad), as_vector(expected)
        assert np.max(np.abs(got - want)) < 1e-4 * np.max(np.abs(want))
        rate = 0.5 / np.max(np.abs(want))
        params = jax.tree.map(lambda p, g, r=rate: p - single(r) * g, params, grad)
