"""On random systems, steps and outputs, steps are undone and gradients are exact.

Only values are drawn, so that one compilation serves them all.
"""

import functools as ft
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import diffrax_reversible as dr

from .problems import as_vector, BITWISE, cases, COMPENSATED, SOLVERS


F32, F64 = "float32", "float64"
# Of both leaves of the state, and of time. Diffrax accepts no finer dtype for time.
DTYPES = ((F64, F64, F64), (F32, F32, F32), (F64, F32, F32))

# Exactly representable in float32. XLA flushes subnormal numbers to zero.
unit = st.floats(-1, 1, width=32, allow_subnormal=False)


def fraction(low):
    return st.floats(low, 1, width=32)


LIPSCHITZ = 2.0
# The length of a solve, in time.
MAX_LENGTH = 2.0
STEPS = 12
MAX_STEPS = 40


class System(NamedTuple):
    """`y' = (A y + B tanh(C y / 3 + d + t)) / 3 + e cos(2t)`.

    The Lipschitz constant is at most two: no entry of `A`, `B` and `C` exceeds one, and
    rows have three entries.
    """

    matrices: np.ndarray
    vectors: np.ndarray

    def __call__(self, t, y):
        a, b, c = self.matrices
        d, e = self.vectors
        return (a @ y + b @ jnp.tanh(c @ y / 3 + d + t)) / 3 + e * jnp.cos(2 * t)


def sizeable(x):
    """Bounded away from zero, as entries that start there by chance are refused."""
    return np.where(x < 0, -1, 1) * (0.25 + 0.75 * np.abs(x))


systems = st.builds(
    System,
    arrays(np.float64, (3, 3, 3), elements=unit),
    arrays(np.float64, (2, 3), elements=unit),
)
states = arrays(np.float64, 3, elements=unit)


def as_state(x, dtypes):
    """A state of two leaves, one of them a scalar."""
    return {"a": jnp.asarray(x[:2], dtypes[0]), "b": jnp.asarray(x[2], dtypes[1])}


def field(t, y, system):
    dtype = system.vectors.dtype
    x = jnp.concatenate([y["a"].astype(dtype), y["b"].astype(dtype)[None]])
    return as_state(system(t.astype(dtype), x), (y["a"].dtype, y["b"].dtype))


TERM = dfx.ODETerm(field)


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def coarsest_eps(dtypes):
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


@ft.cache
def round_trip(solver):
    @jax.jit
    def run(system, t0, t1, y0, deviation):
        v0 = jax.tree.map(jnp.add, field(t0, y0, system), deviation)
        state0 = eqx.tree_at(lambda s: s.v, solver.init(TERM, t0, t1, y0, system), v0)
        y1, _, _, state1, _ = solver.advance(TERM, t0, t1, y0, system, state0)
        y, state = solver.backward_step(TERM, t0, t1, y1, system, state1)
        return (y0, v0), (y1, state1.v), (y, state.v)

    return run


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "solver", cases(SOLVERS[1:2], slow=(SOLVERS[0], *SOLVERS[2:])), ids=repr
)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(systems, states, states, st.floats(-4, 4, width=32), unit)
def test_inverse_undoes_step(solver, dtypes, system, y0, deviation, t0, length):
    """A step is undone for any `v`, in either direction of time."""
    length = length / 4
    system = cast(system, np.result_type(*dtypes))
    times = cast((t0, t0 + length), dtypes[2])
    y0, deviation = as_state(y0, dtypes), as_state(deviation, dtypes)
    start, end, restored = round_trip(solver)(system, *times, y0, deviation)
    size = np.max(np.abs(as_vector((start, end))))
    # A sub-step makes about four operations in either direction. Each rounds by up to half
    # an `eps` of its operands. These errors grow as solutions do, over the lengths of the
    # sub-steps rather than that of the step, as some sub-steps go backwards.
    sub_steps = np.abs(solver.tableau.sub_steps)
    growth = np.exp(LIPSCHITZ * abs(length) * np.sum(sub_steps))
    bound = 4 * len(sub_steps) * coarsest_eps(dtypes) * size * growth
    assert np.max(np.abs(as_vector(restored) - as_vector(start))) <= bound


class Solve(NamedTuple):
    """The arrays that a solve depends on."""

    system: System
    y0: dict[str, jax.Array]
    t0: jax.Array
    t1: jax.Array
    dt0: jax.Array
    # The ends of given steps.
    step_to: jax.Array
    tol: jax.Array
    ts: jax.Array


@st.composite
def solves(draw, dtypes):
    time = np.dtype(dtypes[2]).type
    t0 = time(draw(st.floats(-4, 4, width=32)))
    t1 = t0 + time(draw(st.sampled_from((1, -1))) * draw(fraction(0.125)) * MAX_LENGTH)
    gaps = draw(arrays(np.float64, STEPS, elements=fraction(0.125)))
    step_to = np.cumsum(np.append(0, gaps)) / np.sum(gaps)
    ts = np.sort(draw(arrays(np.float64, 4, elements=fraction(0))))

    def between(x):
        return np.clip((t0 + x * (t1 - t0)).astype(time), min(t0, t1), max(t0, t1))

    system = cast(draw(systems), np.result_type(*dtypes))
    y0 = as_state(sizeable(draw(states)), dtypes)
    dt0 = (t1 - t0) / draw(st.floats(4, STEPS, width=32))
    tol = 10.0 ** -draw(st.integers(2, 5))
    times = t0, t1, dt0, np.append(between(step_to[:-1]), t1), tol, between(ts)
    return Solve(system, y0, *cast(times, dtypes[2]))


def moment(t, y, args):
    return {"moment": jnp.sum(y["a"] ** 2) * y["a"], "t": t * y["b"].astype(t.dtype)}


# Given the drawn times, at which dense output is evaluated.
SAVEATS = {
    "ends": lambda ts: dfx.SaveAt(t0=True, t1=True),
    "ts": lambda ts: dfx.SaveAt(ts=ts),
    "steps": lambda ts: dfx.SaveAt(steps=2, t1=True),
    "dense": lambda ts: dfx.SaveAt(dense=True),
    "fn": lambda ts: dfx.SaveAt(t0=True, ts=ts, fn=moment),
    "subs": lambda ts: dfx.SaveAt(
        subs=[
            dfx.SubSaveAt(t0=True, ts=ts),
            dfx.SubSaveAt(ts=ts, steps=1, fn=moment),
            dfx.SubSaveAt(t1=True, steps=3),
        ],
        dense=True,
    ),
}


def controller_and_dt0(name, p):
    if name == "fixed":
        return dfx.ConstantStepSize(), p.dt0
    if name == "given":
        return dfx.StepTo(p.step_to), None
    # By default steps may grow by an error estimate that is pure rounding. Steps, and so
    # gradients, would then differ between the two adjoints.
    return dfx.PIDController(rtol=p.tol, atol=p.tol, factormax=3.0), p.dt0


def read(sol, ts):
    """A linear function of all outputs that were written."""
    outputs = [sol.ys]
    if sol.interpolation is not None:
        outputs.append(jax.vmap(sol.evaluate)(ts))
    total = jnp.array(0.0)
    for leaf in jax.tree.leaves(outputs):
        weights = jnp.cos(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape)
        written = jnp.where(jnp.isfinite(leaf), leaf, 0).astype(weights.dtype)
        total += jnp.sum(weights * written)
    return total


@ft.cache
def gradient(adjoint, solver, controller, saveat):
    @jax.jit
    def run(p):
        def loss(system, y0):
            steps, dt0 = controller_and_dt0(controller, p)
            sol = dfx.diffeqsolve(
                TERM,
                solver,
                p.t0,
                p.t1,
                dt0,
                y0,
                system,
                saveat=SAVEATS[saveat](p.ts),
                stepsize_controller=steps,
                adjoint=adjoint,
                max_steps=MAX_STEPS,
                throw=False,
            )
            return read(sol, p.ts), (sol.ys, sol.stats["num_accepted_steps"])

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(p.system, p.y0)

    return run


# Every controller and form of saving, with various solvers and dtypes.
CASES = cases(
    (),
    slow=(
        (dr.ALF4(), "pid", "subs", DTYPES[1]),
        (BITWISE, "pid", "fn", DTYPES[0]),
        (dr.ALF6(), "given", "subs", DTYPES[0]),
        (dr.ALF4(), "fixed", "ends", DTYPES[0]),
        (dr.ALF4(), "pid", "ts", DTYPES[0]),
        (dr.ALF8(), "pid", "dense", DTYPES[0]),
        (dr.ALF2(), "given", "steps", DTYPES[0]),
        (COMPENSATED, "fixed", "dense", DTYPES[1]),
        # `PIDController` does not take mixed dtypes.
        (dr.ALF6(), "fixed", "ts", DTYPES[2]),
    ),
)


@pytest.mark.parametrize("solver, controller, saveat, dtypes", CASES)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_gradient(solver, controller, saveat, dtypes, data):
    """The gradient is that of the default adjoint."""
    p = data.draw(solves(dtypes))
    grad, (ys, steps) = gradient(dr.ReversibleAdjoint(40), solver, controller, saveat)(p)
    default = gradient(dfx.RecursiveCheckpointAdjoint(), solver, controller, saveat)
    expected, (expected_ys, expected_steps) = default(p)
    assert steps == expected_steps
    coarse = coarsest_eps(dtypes)
    for y, e in zip(jax.tree.leaves(ys), jax.tree.leaves(expected_ys), strict=True):
        # They are compiled separately, and may differ by rounding.
        np.testing.assert_allclose(y, e, rtol=1e3 * coarse, atol=1e3 * coarse)
    # The weights of `read`, the states and the sensitivities are about one.
    error = np.abs(as_vector(grad) - as_vector(expected))
    assert np.max(error) <= 2e4 * coarse * max(np.max(np.abs(as_vector(expected))), 1.0)
