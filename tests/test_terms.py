"""Terms of every kind, and functions that close over what is differentiated."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import InverseOnly, PID, relative_error, sum_of_squares


Y0 = jnp.array([1.0, 2.0])
W, B = jnp.array(1.3), jnp.array([0.1, 0.4])
TS = jnp.linspace(0.0, 2.0, 9)
DATA = jnp.stack([jnp.sin(TS), TS**2 / 4, TS], axis=1)


class Static(eqx.Module):
    fn: object = eqx.field(static=True)

    def __call__(self, t, y, args):
        return self.fn(t, y, args)


class Field(eqx.Module):
    """A module one of whose fields is a function."""

    activation: object

    def __call__(self, t, y, args):
        return self.activation(y) + self.activation(y[:1]) * t


class Decay(dfx.AbstractTerm):
    """A term of someone else's."""

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


# The terms, made of traced values, and whether only a solver that takes any term can
# solve them.
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
    "MultiTerm with to_ode": (
        lambda w, b: dfx.MultiTerm(
            dfx.ODETerm(lambda t, y, _: -w * y),
            dfx.ControlTerm(matrix(w, b), interpolation(b)).to_ode(),
        ),
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


class Midpoint(InverseOnly):
    """For any control: `z` and a copy of it leapfrog over each other.

    Nothing is claimed of its order; it is here for the adjoint.
    """

    def init(self, terms, t0, t1, y0, args):
        return y0

    def advance(self, terms, t0, t1, y0, args, solver_state):
        y1 = y0 + terms.vf_prod(t0, solver_state, args, terms.contr(t0, t1))
        z1 = solver_state + terms.vf_prod(t1, y1, args, terms.contr(t0, t1))
        return y1, None, dict(y0=y0, y1=y1), z1, dfx.RESULTS.successful

    def inverse_step(self, terms, t0, t1, y1, args, solver_state):
        z0 = solver_state - terms.vf_prod(t1, y1, args, terms.contr(t0, t1))
        y0 = y1 - terms.vf_prod(t0, z0, args, terms.contr(t0, t1))
        return y0, z0


def solve(terms, y0, *, adjoint, any_term, t0=0.0, t1=2.0, args=None, saveat=None):
    return dfx.diffeqsolve(
        terms,
        Midpoint() if any_term else dr.ALF4(),
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


@pytest.mark.parametrize("name", TERMS)
def test_closures(name):
    """Under `jit`, backwards in time, with a `SaveAt(fn=...)` that closes over as well."""
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


@pytest.mark.parametrize("name", ("ODETerm", "MultiTerm", "MultiTerm with ControlTerm"))
def test_closures_vmap(name):
    """Over a batch of closed-over values, with and without `jit`."""
    make, any_term = TERMS[name]
    batch = jnp.array([0.5, 1.3, 2.0])

    def loss(adjoint, w, b):
        sol = solve(make(w, b), Y0, adjoint=adjoint, any_term=any_term)
        return sum_of_squares(sol.ys)

    def over_batch(gradient):
        return jax.vmap(gradient, in_axes=(0, None))

    ours, default = gradients(loss, batch, B, transform=lambda f: jax.jit(over_batch(f)))
    assert relative_error(ours, default) < 1e-10
    eager, _ = gradients(loss, batch, B, transform=over_batch)
    assert relative_error(eager, default) < 1e-10


def test_functions_in_args():
    def loss(adjoint, w, b):
        args = {"fn": lambda y: w * y, "b": b}
        terms = dfx.ODETerm(lambda t, y, args: jnp.sin(args["fn"](y)) - args["b"] * t)
        sol = solve(terms, Y0, adjoint=adjoint, any_term=False, args=args)
        return sum_of_squares(sol.ys)

    ours, default = gradients(loss, W, B, transform=jax.jit)
    assert relative_error(ours, default) < 1e-10


def test_hidden_closures_are_refused():
    def loss(w):
        terms = dfx.ODETerm(Static(lambda t, y, args: w * y))
        sol = solve(terms, Y0, adjoint=dr.ReversibleAdjoint(), any_term=False)
        return sum_of_squares(sol.ys)

    with pytest.raises(NotImplementedError, match="static field"):
        jax.grad(loss)(W)


def test_multi_term_is_the_sum():
    """And the equation is solved to the order of the solver, from any initial step."""
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
