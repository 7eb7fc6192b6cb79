"""Terms of every kind, and functions that close over differentiated values."""

import functools
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import assert_same_gradient, cases, PID, relative_error, sum_of_squares


ALF4, MF, GAUSS = dr.ALF4(), dr.McCallumFoster(dfx.Tsit5()), dr.Gauss4()
Y0 = jnp.array([1.0, 2.0])
W, B = jnp.array(1.3), jnp.array([0.1, 0.4])
TS = jnp.linspace(0.0, 2.0, 9)
DATA = jnp.stack([jnp.sin(TS), TS**2 / 4, TS], axis=1)


class Field(eqx.Module):
    """A module with a function as a field."""

    activation: object

    def __call__(self, t, y, args):
        return self.activation(y) + self.activation(y[:1]) * t


class Decay(dfx.AbstractTerm):
    """A custom term."""

    rate: object

    def vf(self, t, y, args):
        return -self.rate(t) * y

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return vf * control


def matrix(w, b):
    return lambda t, y, args: jnp.tanh(jnp.outer(y * w, jnp.array([0.3, -0.2, 0.5])) + b[0])


def interpolation(b):
    coeffs = dfx.backward_hermite_coefficients(TS, DATA * b[1])
    return dfx.CubicInterpolation(TS, coeffs)


def increments(w, b):
    return lambda t0, t1: (t1 - t0) * jnp.array([1.0, 0.2, 0.1]) * w


# Terms made from traced values, and whether they need a solver that takes any term.
TERMS = {
    "ODETerm": (lambda w, b: dfx.ODETerm(lambda t, y, _: jnp.sin(w * y) - b * t), False),
    "a function in a module": (
        lambda w, b: dfx.ODETerm(Field(lambda y: jnp.sin(w * y) - b[0])),
        False,
    ),
    "MultiTerm": (
        lambda w, b: dfx.MultiTerm(
            dfx.ODETerm(lambda t, y, _: jnp.sin(w * y)),
            dfx.MultiTerm(
                dfx.ODETerm(lambda t, y, _: -b * y * t), dfx.ODETerm(Field(jnp.cos))
            ),
        ),
        False,
    ),
    "a term of one's own": (lambda w, b: Decay(lambda t: w * jnp.cos(t) + b), False),
    "ControlTerm.to_ode": (
        lambda w, b: dfx.ControlTerm(matrix(w, b), interpolation(b)).to_ode(),
        False,
    ),
    "ControlTerm": (lambda w, b: dfx.ControlTerm(matrix(w, b), interpolation(b)), True),
    "ControlTerm of increments": (
        lambda w, b: dfx.ControlTerm(matrix(w, b), increments(w, b)),
        True,
    ),
    "MultiTerm with ControlTerm": (
        lambda w, b: dfx.MultiTerm(
            dfx.ODETerm(lambda t, y, _: -w * y),
            dfx.ControlTerm(matrix(w, b), interpolation(b)),
        ),
        True,
    ),
}


def solve(terms, y0, *, adjoint, any_term, t0=0.0, t1=2.0, args=None, saveat=None):
    return dfx.diffeqsolve(
        terms,
        dfx.ReversibleHeun() if any_term else dr.ALF4(),
        t0,
        t1,
        jnp.copysign(0.1, t1 - t0),
        y0,
        args,
        saveat=dfx.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=dfx.ConstantStepSize() if any_term else PID,
        adjoint=adjoint,
    )


def gradients(loss, *args, transform=lambda f: f):
    def of(adjoint):
        argnums = tuple(range(len(args)))
        gradient = jax.grad(lambda *args: loss(adjoint, *args), argnums)
        return transform(gradient)(*args)

    return of(dr.ReversibleAdjoint()), of(dfx.RecursiveCheckpointAdjoint())


QUICK = ("ControlTerm.to_ode",)


@pytest.mark.long
@pytest.mark.parametrize("name", cases(QUICK, slow=[n for n in TERMS if n not in QUICK]))
def test_closures(name):
    """Gradients with respect to closed-over values are right, backwards in time, also where
    `SaveAt(fn=...)` closes over them."""
    make, any_term = TERMS[name]

    def loss(adjoint, y0, w, b):
        saveat = dfx.SaveAt(t1=True, ts=TS[::-2], fn=lambda t, y, args: jnp.sin(w * y) * t)
        sol = solve(
            make(w, b),
            y0,
            adjoint=adjoint,
            any_term=any_term,
            t0=2.0,
            t1=0.0,
            saveat=saveat,
        )
        return sum_of_squares(sol.ys)

    ours, default = gradients(loss, Y0, W, B, transform=jax.jit)
    for g, e in zip(ours, default, strict=True):
        assert jnp.any(e != 0)
        assert relative_error(g, e) < 1e-10


@pytest.mark.parametrize(
    "name", cases((), slow=("MultiTerm with ControlTerm", "MultiTerm"))
)
def test_closures_vmap(name):
    """Gradients are right under `vmap` over closed-over values."""
    make, any_term = TERMS[name]
    batch = jnp.array([0.5, 1.3, 2.0])

    def loss(adjoint, w, b):
        sol = solve(make(w, b), Y0, adjoint=adjoint, any_term=any_term)
        return sum_of_squares(sol.ys)

    def over_batch(gradient):
        return jax.jit(jax.vmap(gradient, in_axes=(0, None)))

    ours, default = gradients(loss, batch, B, transform=over_batch)
    assert relative_error(ours, default) < 1e-10


@pytest.mark.slow
def test_functions_in_args():
    def loss(adjoint, w, b):
        args = {"fn": lambda y: w * y, "b": b}
        terms = dfx.ODETerm(lambda t, y, args: jnp.sin(args["fn"](y)) - args["b"] * t)
        sol = solve(terms, Y0, adjoint=adjoint, any_term=False, args=args)
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, W, B)


@pytest.mark.more
def test_term_that_calls_its_field():
    """A subclass of `ODETerm` may call its vector field in its own way."""

    class Autonomous(dfx.ODETerm):
        def vf(self, t, y, args):
            return self.vector_field(y, shift=0.1)

    def loss(adjoint, w, b):
        terms = Autonomous(lambda y, shift: jnp.sin(w * y + shift) - b)
        return sum_of_squares(solve(terms, Y0, adjoint=adjoint, any_term=True).ys)

    assert_same_gradient(loss, W, B)


def test_multi_term_is_the_sum():
    """`MultiTerm` solves the same equation as the sum of its terms, and solves it right."""
    split = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: -y), dfx.ODETerm(lambda t, y, args: jnp.cos(t) * y)
    )
    whole = dfx.ODETerm(lambda t, y, args: -y + jnp.cos(t) * y)

    def final(terms):
        return dfx.diffeqsolve(
            terms, dr.ALF6(), 0.0, 2.0, None, Y0, stepsize_controller=PID
        ).ys[-1]

    np.testing.assert_allclose(final(split), final(whole), rtol=1e-13)
    np.testing.assert_allclose(final(split), Y0 * np.exp(np.sin(2.0) - 2.0), rtol=1e-3)


class Driven(dfx.AbstractTerm):
    """A term that is integrated along `sin(speed t)`."""

    field: Callable
    speed: jax.Array

    def vf(self, t, y, args):
        return self.field(t, y, args)

    def contr(self, t0, t1, **kwargs):
        return jnp.sin(self.speed * t1) - jnp.sin(self.speed * t0)

    def prod(self, vf, control):
        return jax.tree.map(lambda x: control * x, vf)


@pytest.mark.parametrize("solver", cases((ALF4, dr.BlanesMoan4()), slow=(MF, GAUSS)))
def test_differentiated_control(solver):
    """The control of a term of one's own is differentiated too, at the ends of steps and
    between them."""

    def loss(speed, adjoint):
        decay = Driven(lambda t, y, args: -2 * args * y, speed)
        turn = Driven(lambda t, y, args: args * y, speed), decay
        splits = isinstance(solver, dr.BlanesMoan4)
        sol = dfx.diffeqsolve(
            *(turn if splits else decay, solver, 0.0, 1.0, 0.05),
            *((Y0, Y0 / 2) if splits else Y0, W),
            saveat=dfx.SaveAt(ts=jnp.array([0.33, 1.0])),
            adjoint=adjoint,
            max_steps=32,
        )
        return sum_of_squares(sol.ys)

    default = dfx.RecursiveCheckpointAdjoint(checkpoints=32)
    of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    ours, theirs = of(W, dr.ReversibleAdjoint()), of(W, default)
    assert abs(theirs[1]) > 0.1
    assert relative_error(ours, theirs) < 1e-12


@functools.cache
def gradient_of_controlled(adjoint, direct):
    """The gradient for an equation driven by an interpolation of irregular data, with
    respect to weights and data. It is solved as an ODE, or directly by `ReversibleHeun`."""
    ts = jnp.array([0.0, 0.1, 0.45, 0.5, 1.2, 1.3, 2.0])
    data = jnp.stack([ts, jnp.sin(3 * ts)], axis=1)
    weights = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)

    def field(t, y, weights):
        return jnp.tanh(weights @ y).reshape(2, 2)

    def loss(weights, data):
        coeffs = dfx.backward_hermite_coefficients(ts, data)
        term = dfx.ControlTerm(field, dfx.CubicInterpolation(ts, coeffs))
        fine = dfx.StepTo(jnp.linspace(0.0, 2.0, 801))
        knots = dfx.ClipStepSizeController(PID, step_ts=ts)
        sol = dfx.diffeqsolve(
            term if direct else term.to_ode(),
            dfx.ReversibleHeun() if direct else dr.ALF4(),
            0.0,
            2.0,
            None if direct else 0.1,
            Y0,
            weights,
            saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=fine if direct else knots,
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, data)


@pytest.mark.long
@pytest.mark.parametrize(
    "direct", cases((False,), slow=(True,)), ids=("as ODE", "directly")
)
def test_controlled_equation(direct):
    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
    ours, default = (gradient_of_controlled(adjoint, direct) for adjoint in adjoints)
    assert relative_error(ours, default) < 1e-10


@pytest.mark.slow
def test_controlled_equation_either_way():
    """Both ways give the same gradient, to their accuracy."""
    as_ode, directly = (
        gradient_of_controlled(dr.ReversibleAdjoint(), direct) for direct in (False, True)
    )
    assert relative_error(as_ode, directly) < 1e-2


def loss_of_stochastic_equation(adjoint, y0, w, b):
    path = dfx.VirtualBrownianTree(0.0, 2.0, tol=1e-3, shape=(2,), key=jax.random.key(1))
    terms = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: -w * y),
        dfx.ControlTerm(lambda t, y, args: jnp.diag(jnp.cos(b * y)), path),
    )
    sol = dfx.diffeqsolve(
        *(terms, dfx.ReversibleHeun(), 0.0, 2.0, 0.05, y0),
        saveat=dfx.SaveAt(ts=TS),
        adjoint=adjoint,
    )
    return sum_of_squares(sol.ys)


@pytest.mark.long
def test_stochastic_equation():
    """Gradients are right for `ReversibleHeun` along a Brownian path, which the backward
    pass repeats."""
    assert_same_gradient(loss_of_stochastic_equation, Y0, W, B)


@pytest.mark.long
def test_second_derivative_along_a_path():
    """A Brownian path does not admit tangents of its times, so that known states may not
    mix these with the state."""

    def product(adjoint):
        gradient = jax.grad(lambda w: loss_of_stochastic_equation(adjoint, Y0, w, B))
        return jax.jit(lambda w: jax.jvp(gradient, (w,), (jnp.cos(w),)))(W)

    ours, expected = product(dr.ReversibleAdjoint()), product(dfx.DirectAdjoint())
    assert relative_error(ours, expected) < 1e-10


class CountedPath(dfx.AbstractPath):
    """A path that tells of its evaluations."""

    tell: Callable
    t0: float = 0.0
    t1: float = 2.0

    def evaluate(self, t0, t1=None, left=True):
        del left
        jax.debug.callback(self.tell, t0)
        return jnp.sin(3 * t1) - jnp.sin(3 * t0)


def test_evaluations_of_a_path():
    """`ReversibleHeun` evaluates a path, which may take longer than the vector field, once
    per step in either pass, and once for the scales at every known state."""
    times = []

    @jax.jit
    @jax.grad
    def gradient(w):
        terms = dfx.MultiTerm(
            dfx.ODETerm(lambda t, y, w: -w * y),
            dfx.ControlTerm(lambda t, y, w: w * jnp.cos(y), CountedPath(times.append)),
        )
        sol = dfx.diffeqsolve(
            *(terms, dfx.ReversibleHeun(), 0.0, 2.0, 0.1, jnp.array(1.0), w),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys**2)

    gradient(jnp.array(0.7))
    jax.effects_barrier()
    # The known state after 16 steps, and the start.
    assert len(times) == 20 + 20 + 2
