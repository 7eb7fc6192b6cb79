"""User-defined solvers whose steps are chains of couplings."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffrax_reversible as dr

from .chains import Ruth, TwoStreams
from .counter import Counter
from .problems import as_terms, cases, network_args, PAIR, PAIR_Y0, relative_error


def final(solver, y0, fields, adjoint, args=None, **kwargs):
    args = network_args() if args is None else args
    kwargs = dict(saveat=dfx.SaveAt(ts=[0.45, 2.0, 3.0])) | kwargs
    dt0 = 0.125 if "stepsize_controller" not in kwargs else None
    return dfx.diffeqsolve(
        as_terms(fields), solver, 0.0, 3.0, dt0, y0, args, adjoint=adjoint, **kwargs
    )


@pytest.mark.slow
@pytest.mark.parametrize("solver", (TwoStreams(), Ruth()), ids=repr)
def test_gradient(solver):
    """Gradients equal the default adjoint's, in a batch with outputs between the steps."""

    @eqx.filter_jit
    def gradient(adjoint):
        def loss(y0, fields, scale):
            args = network_args() | {"scale": scale}
            ys = final(solver, y0, fields, adjoint, args).ys
            return sum(jnp.sum(y**2) for y in ys)

        grad = eqx.filter_grad(lambda parts, scale: loss(*parts, scale))
        return jax.vmap(lambda scale: grad((PAIR_Y0, PAIR), scale))(jnp.array([1.0, 0.3]))

    ours, default = map(
        gradient, (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    assert relative_error(ours, default) < 1e-12


class RealAndImaginary(dr.AbstractCouplingSolver):
    """The parts of a complex state are real, and in another unit."""

    term_structure = dfx.ODETerm

    def split(self, y, solver_state):
        return y.real, 2 * y.imag

    def join(self, parts):
        return jax.lax.complex(parts[0], parts[1] / 2), None

    def couplings(self, term, t0, t1, rate):
        h = t1 - t0
        first = dr.Coupling(0, lambda imag: h * rate * jnp.sin(imag))
        return first, dr.Coupling(1, lambda real: -h * rate * real**2)


class Stacked(RealAndImaginary):
    """The parts are rows of one array, and the last is held in the solver state."""

    def init(self, terms, t0, t1, y0, args):
        return 3 * y0[1], 5

    def split(self, y, solver_state):
        return y[0] ** 3, solver_state[0] / 2

    def join(self, parts):
        first, second = jnp.cbrt(parts[0]), 2 * parts[1]
        return jnp.stack([first, second / 3]), (second, 5)


@pytest.mark.filterwarnings("ignore:Complex dtype")
@pytest.mark.parametrize(
    "solver, y0",
    ((RealAndImaginary(), jnp.array(1.0 + 0.5j)), (Stacked(), jnp.array([1.0, 0.5]))),
)
def test_parts_of_ones_own(solver, y0):
    """Gradients are right if `split` and `join` do more than regroup the state."""

    def loss(y0, rate, adjoint):
        y = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: y), solver, 0, 1, 0.1, y0, rate, adjoint=adjoint
        ).ys[0]
        return jnp.sum(jnp.abs(y) ** 2 + jnp.sin(y).real)

    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
    gradients = (jax.grad(loss, (0, 1))(y0, 1.3, adjoint) for adjoint in adjoints)
    for ours, default in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, default, rtol=1e-12)


def test_order():
    """The error on a pendulum is of order 3."""
    fields = (lambda t, p, args: p), (lambda t, q, args: -jnp.sin(q))
    y0 = jnp.array(1.0), jnp.array(0.5)

    @jax.jit
    def solve(dt0):
        return dfx.diffeqsolve(as_terms(fields), Ruth(), 0.0, 2.0, dt0, y0).ys

    coarse, middle, fine = (np.array(solve(jnp.array(2.0 / n))) for n in (64, 128, 256))
    slopes = np.log2(np.abs(coarse - middle) / np.abs(middle - fine))
    assert np.all(slopes > 2.8), slopes


@pytest.mark.parametrize(
    "solver, parts, at_start",
    cases(
        ((TwoStreams(), 2, 2),),
        more=((dfx.SemiImplicitEuler(), 2, 2), (dfx.LeapfrogMidpoint(), 1, 1)),
    ),
    ids=repr,
)
def test_evaluations(solver, parts, at_start):
    """The backward pass takes as many evaluations as the forward pass, plus those of
    one step to measure the error at the start."""
    counter, scale = Counter(), jnp.array(0.7)
    y0, fields = (PAIR_Y0, (counter, counter)) if parts == 2 else (PAIR_Y0[0], counter)

    def loss(y0, scale):
        adjoint, saveat = dr.ReversibleAdjoint(checkpoints=0), dfx.SaveAt(t1=True)
        sol = final(solver, y0, fields, adjoint, scale, saveat=saveat)
        return sum(jnp.sum(y) for y in jax.tree.leaves(sol.ys))

    forward, _ = counter.during(jax.jit(loss), y0, scale)
    assert forward == parts * 24
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    both, _ = counter.during(gradient, y0, scale)
    assert both - forward == parts * 24 + at_start


@pytest.mark.slow
@pytest.mark.optimised
def test_memory():
    """Memory does not grow with the depth, except for the times of some steps."""

    def bytes_of(adjoint, depth):
        def loss(y0, scale):
            shift = lambda t, y, scale: jnp.sin(scale * jnp.roll(y, 1))
            terms = as_terms((shift, shift))
            sol = dfx.diffeqsolve(
                *(terms, TwoStreams(), 0, depth, 1, y0, scale),
                adjoint=adjoint,
                max_steps=depth,
            )
            return sum(jnp.sum(y) for y in sol.ys)

        y0 = jnp.ones(16384), jnp.ones(16384)
        compiled = jax.jit(jax.grad(loss)).lower(y0, jnp.array(0.1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = bytes_of(dr.ReversibleAdjoint(), 4096)
    assert bytes_of(dr.ReversibleAdjoint(), 10**6) < 1.05 * ours
    assert ours < 0.5 * bytes_of(dfx.RecursiveCheckpointAdjoint(), 4096)


@pytest.mark.slow
def test_steps_that_reverse_themselves():
    """The step size is a function of the state, as there is no error estimate."""
    steps = dr.StepDensityController(lambda t, y, args: 0.1 / (1 + jnp.sum(y[0] ** 2)))

    class WithField(TwoStreams):
        def func(self, terms, t0, y0, args):
            (f, g), (x1, x2) = terms, y0
            return f.vf(t0, x2, args), g.vf(t0, x1, args)

    @eqx.filter_jit
    def gradient(adjoint):
        def loss(y0):
            ys = final(WithField(), y0, PAIR, adjoint, stepsize_controller=steps).ys
            return sum(jnp.sum(y**2) for y in ys)

        return jax.grad(loss)(PAIR_Y0)

    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
    assert relative_error(*map(gradient, adjoints)) < 1e-10


@pytest.mark.slow
def test_reversible_network():
    """A network of twelve layers with separate weights, one step each, learns to tell
    points inside a circle from those outside."""
    depth, width = 12, 4

    def make_layers(key):
        make = lambda key: eqx.nn.MLP(width, width, 8, 1, jnp.tanh, key=key)
        return eqx.filter_vmap(make)(jax.random.split(key, depth))

    def layer(t, x, layers):
        """The first axis of all weights is that of the layers."""
        i = jnp.round(t).astype(int) % depth
        arrays, static = eqx.partition(layers, eqx.is_array)
        here = eqx.combine(jax.tree.map(lambda w: w[i], arrays), static)
        return here(x)

    terms = (
        dfx.ODETerm(lambda t, x, args: layer(t, x, args[0])),
        dfx.ODETerm(lambda t, x, args: layer(t, x, args[1])),
    )

    def logit(layers, point, adjoint):
        streams = jnp.tile(point, 2), jnp.tile(point, 2)
        sol = dfx.diffeqsolve(
            terms, TwoStreams(), 0, depth, 1, streams, layers, adjoint=adjoint
        )
        return jnp.sum(sol.ys[0])

    points = jax.random.uniform(jax.random.key(1), (64, 2), minval=-2, maxval=2)
    labels = (jnp.linalg.norm(points, axis=1) < 1.3).astype(points.dtype)

    def loss(layers, adjoint):
        logits = jax.vmap(lambda point: logit(layers, point, adjoint))(points)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))

    layers = tuple(map(make_layers, jax.random.split(jax.random.key(0))))
    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    default = gradient(layers, dfx.RecursiveCheckpointAdjoint())
    assert relative_error(gradient(layers, dr.ReversibleAdjoint()), default) < 1e-12
    optimiser = optax.adam(3e-2)
    state = optimiser.init(eqx.filter(layers, eqx.is_array))
    for _ in range(60):
        value, grad = gradient(layers, dr.ReversibleAdjoint())
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grad, state)
        layers = eqx.apply_updates(layers, updates)
    assert value < 0.1 < 0.5 < default[0]


class Chain(dr.AbstractCouplingSolver):
    term_structure = dfx.ODETerm
    coupling: dr.Coupling

    def couplings(self, terms, t0, t1, args):
        return (self.coupling,)


@pytest.mark.parametrize(
    "coupling, y0, message",
    (
        (dr.Coupling(0, lambda x: x, scale=0), None, "number that is not zero"),
        (dr.Coupling(0, lambda x: x, scale=float("nan")), None, "number that is not zero"),
        (dr.Coupling(0, lambda x: x, scale=jnp.array(2.0)), None, "known when the solve"),
        (dr.Coupling(2, lambda x, y: x), None, "one of the 2 parts"),
        (dr.Coupling(-1, lambda x: x), None, "one of the 2 parts"),
        (dr.Coupling(0, lambda x: x[:1]), None, "has to return arrays like part 0"),
        (dr.Coupling(0, lambda x: (x, x)), None, "has to return arrays like part 0"),
        (dr.Coupling(0, lambda x: x.astype("float32")), None, "dtypes .*float64"),
        (dr.Coupling(0, lambda x: x), list(PAIR_Y0), "tuple of at least two parts"),
    ),
    ids=(
        *("zero", "NaN", "JAX scalar", "no such part", "negative part"),
        *("shape", "structure", "dtype", "list"),
    ),
)
def test_refusals(coupling, y0, message):
    y0 = PAIR_Y0 if y0 is None else y0
    with pytest.raises(ValueError, match=message):
        final(Chain(coupling), y0, lambda t, y, args: y, dr.ReversibleAdjoint())


def test_no_vector_field():
    with pytest.raises(NotImplementedError, match="override `func`, or use"):
        steps = dr.StepDensityController(fraction=0.1)
        kwargs = dict(stepsize_controller=steps)
        final(TwoStreams(), PAIR_Y0, PAIR, dr.ReversibleAdjoint(), **kwargs)
