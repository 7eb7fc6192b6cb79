"""Small problems that several test files share."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr


SOLVERS = (dr.ALF2(), dr.ALF4(), dr.ALF6(), dr.ALF8())
COMPENSATED = dr.ALF4(compensated=True)
BITWISE = dr.ALF4(bitwise=True)

# (controller, dt0); the steps of the third end at given times.
PID = dfx.PIDController(rtol=1e-4, atol=1e-4)
CONTROLLERS = (
    (dfx.ConstantStepSize(), 0.1),
    # Too large a first step, so that steps are rejected.
    (PID, 2.0),
    (dfx.ClipStepSizeController(PID, step_ts=jnp.array([0.5, 1.7, 2.0])), 0.4),
    (dfx.StepTo(jnp.array([0.0, 0.3, 0.4, 1.0, 1.5, 2.2, 3.0])), None),
)


class Network(eqx.Module):
    """A neural vector field that depends on time and on `args`. Some leaves of the field
    and of `args` cannot be differentiated."""

    mlp: eqx.nn.MLP

    def __init__(self, dtype=jnp.float64, seed=0):
        self.mlp = eqx.nn.MLP(
            3, 3, 8, 2, activation=jnp.tanh, dtype=dtype, key=jax.random.key(seed)
        )

    def __call__(self, t, y, args):
        return self.mlp(y) * args["scale"] * jnp.cos(t).astype(y.dtype)


def network_args(dtype=jnp.float64):
    return {"scale": jnp.array(1.3, dtype), "integer": jnp.arange(2), "none": None}


class Case(NamedTuple):
    """A solver and something that it can solve."""

    solver: dfx.AbstractSolver
    field: Any
    y0: Any
    controller: dfx.AbstractStepSizeController
    dt0: float


Y0 = jnp.array([1.0, 2.0, 0.5])
# The fields of `q' = f(t, p)` and `p' = g(t, q)`.
PAIR = (Network(seed=1), Network(seed=2))
PAIR_Y0 = (Y0, jnp.array([0.3, -1.0, 0.8]))
SPLITTINGS = (dr.StormerVerlet(), dr.BlanesMoan4(), dr.BlanesMoan6(), dr.KahanLi8())
NYSTROM = (dr.BlanesMoan4(nystrom=True), dr.BlanesMoan6(nystrom=True))

LOOSE = dfx.PIDController(rtol=1e-2, atol=1e-2)
# One solver of every family except `ALF`. Those with error estimates reject steps.
FAMILIES = {
    "splitting": Case(dr.BlanesMoan4(), PAIR, PAIR_Y0, *CONTROLLERS[1]),
    "coupling": Case(dr.McCallumFoster(dfx.Tsit5()), Network(), Y0, *CONTROLLERS[1]),
    "ReversibleHeun": Case(dfx.ReversibleHeun(), Network(), Y0, LOOSE, 2.0),
    "LeapfrogMidpoint": Case(dfx.LeapfrogMidpoint(), Network(), Y0, *CONTROLLERS[0]),
    "SemiImplicitEuler": Case(dfx.SemiImplicitEuler(), PAIR, PAIR_Y0, *CONTROLLERS[0]),
}


def cases(quick, *, long=(), more=(), slow=()):
    """The cases of a test. Only the `quick` ones run by default. `long` ones take longest,
    and run in CI too; `more` are further solvers, controllers and combinations of what
    other tests check; `slow` are further combinations of all of these."""

    def marked(case, mark):
        values = case if type(case) is tuple else (case,)
        return pytest.param(*values, marks=mark)

    return [
        *quick,
        *(marked(case, pytest.mark.long) for case in long),
        *(marked(case, pytest.mark.more) for case in more),
        *(marked(case, pytest.mark.slow) for case in slow),
    ]


families = pytest.mark.parametrize(
    "family",
    cases(
        (),
        slow=(
            "coupling",
            "splitting",
            "ReversibleHeun",
            "LeapfrogMidpoint",
            "SemiImplicitEuler",
        ),
    ),
)


def as_terms(field):
    """The term of a vector field, or the terms of several."""
    if isinstance(field, tuple):
        return tuple(map(dfx.ODETerm, field))
    return dfx.ODETerm(field)


def as_vector(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    widest = lambda leaf: np.complex128 if jnp.iscomplexobj(leaf) else np.float64
    return np.concatenate([np.asarray(leaf, widest(leaf)).ravel() for leaf in leaves])


def relative_error(tree, reference):
    x, ref = as_vector(tree), as_vector(reference)
    return np.max(np.abs(x - ref)) / np.max(np.abs(ref))


def sum_of_squares(ys):
    """Of all saved outputs, except those that were not written, which are infinite."""
    leaves = jax.tree.leaves(eqx.filter(ys, eqx.is_inexact_array))
    return sum(jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2) for y in leaves)


def assert_same_gradient(
    loss, *args, adjoints=None, reference=None, tol=1e-10, rtol=1e-11, has_aux=False
):
    """`loss(adjoint, *args)` has the same value and the same gradient under `adjoints`, by
    default `ReversibleAdjoint()`, and a `reference`, by default Diffrax's default adjoint.
    Gradients may differ by `tol`, values by `rtol`. So may, for `has_aux`, what the loss
    returns beside its value. Returns the last gradient."""
    adjoints = (dr.ReversibleAdjoint(),) if adjoints is None else adjoints
    reference = dfx.RecursiveCheckpointAdjoint() if reference is None else reference

    @eqx.filter_jit
    def run(args, adjoint):
        of = eqx.filter_value_and_grad(lambda args: loss(adjoint, *args), has_aux=has_aux)
        return of(args)

    expected, expected_grad = run(args, reference)
    for adjoint in adjoints:
        value, grad = run(args, adjoint)
        # Error estimates that are compiled differently round differently, and so do steps.
        for x, y in zip(*map(jax.tree.leaves, (value, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=rtol)
        assert jax.tree.structure(grad) == jax.tree.structure(expected_grad)
        assert relative_error(grad, expected_grad) < tol
    return grad


def kepler(t, y, args):
    del t, args
    q, p = y
    return p, -q / jnp.sum(q**2) ** 1.5


def harmonic(t, p, args):
    """The drift of a Hamiltonian system with masses."""
    del t
    return p / args["scale"]


def lorenz(t, y, args):
    del t, args
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def slow_manifold(t, y, k):
    """The second entry is a fast mode that follows the first."""
    del t
    return jnp.stack([k * (-y[0] + 0.1 * y[0] ** 2), -500 * y[1] + y[0]])


def reference(field, y0, t0, t1, args=None):
    """The solution at `t1`, by a solver that is independent of this package."""
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        dfx.Dopri8(),
        t0,
        t1,
        None,
        y0,
        args,
        stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-13),
        max_steps=None,
    ).ys[0]


class InverseOnly(dr.AbstractReversibleSolver):
    """Leapfrog for `y' = f(t, y)` as a user would add it: a step and its inverse."""

    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args), jnp.array(0)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def _midpoint(self, terms, t0, t1, y, v, args, sign):
        h = sign * terms.contr(t0, t1)
        k = y + h / 2 * v
        v = 2 * terms.vf(t0 + (t1 - t0) / 2, k, args) - v
        return k + h / 2 * v, v

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        v, count = solver_state
        y1, v = self._midpoint(terms, t0, t1, y0, v, args, 1)
        return y1, None, dict(y0=y0, y1=y1), (v, count + 1), dfx.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state):
        v, count = solver_state
        y0, v = self._midpoint(terms, t0, t1, y1, v, args, -1)
        return y0, (v, count - 1)
