"""Gradients that seem to grow, with respect to many parameters, which members may share."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import cases, relative_error
from .test_growth import DEFAULT, GRID, heat, WEIGHTS


# More than are compared one by one, and than a batch sums for each member.
COUNT = 1100


@pytest.mark.long
@pytest.mark.parametrize(
    "solver", cases((dr.ALF4(),), slow=(dr.McCallumFoster(dfx.Tsit5()),))
)
@pytest.mark.parametrize(
    "members", cases((2,), slow=(1,)), ids=lambda members: f"{members} members"
)
def test_many_parameters(solver, members):
    """Fast modes of a heat equation spoil the gradient with respect to its start, unless
    steps are divided, but not the one with respect to the conductivity alone."""
    y0s = jnp.stack([GRID**2, 0.5 * GRID**2 + 0.1])[:members]
    params = jnp.zeros(COUNT)

    def loss(params, y0s, solver, adjoint):
        def of_member(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, u, p: heat(t, u, jnp.exp(jnp.mean(p)))),
                solver,
                *(0.0, 1.0, None, y0, params),
                adjoint=adjoint,
                stepsize_controller=dfx.PIDController(1e-6, 1e-6),
                max_steps=16384,
                throw=False,
            )
            return jnp.vdot(sol.ys[-1], WEIGHTS)

        return jnp.mean(jax.vmap(of_member)(y0s))

    def gradient(solver, adjoint, argnums):
        grad = jax.grad(loss, argnums)
        return jax.jit(lambda *inputs: grad(*inputs, solver, adjoint))(params, y0s)

    want = gradient(dfx.Kvaerno5(), DEFAULT, (0, 1))
    got = gradient(solver, dr.ReversibleAdjoint(), 0)
    assert relative_error(got, want[0]) < 1e-3
    got = gradient(solver, dr.ReversibleAdjoint(), (0, 1))
    assert relative_error(got[0], want[0]) < 1e-3
    assert relative_error(got[1], want[1]) < 1e-3


@pytest.mark.parametrize("shares", cases((), long=(True,), more=(False,)))
def test_members_with_vanishing_gradients(shares):
    """Where the flow has contracted a lot, the gradient of a member may be lost. Alone it
    is refused. In a batch it hardly matters to the gradient of parameters, whether or not
    members share them, and that of its initial state vanishes."""
    rng = np.random.default_rng(162)
    matrix = rng.normal(size=(4, 4))
    matrix -= 1.2 * np.max(np.abs(np.linalg.eigvals(matrix).real)) * np.eye(4)
    inputs = 3 * matrix, rng.normal(size=(8, 4)), np.linspace(0.5, 5, 8)
    weights = rng.normal(size=4)
    if not shares:
        matrices = inputs[0] * rng.uniform(0.9, 1, (8, 1, 1))
        inputs = matrices, *inputs[1:]
    axes = (None if shares else 0), 0, 0

    def of_member(matrix, y0, t1, solver, adjoint, tol):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, matrix: matrix @ y),
            solver,
            *(jnp.zeros_like(t1), t1, None, y0, matrix),
            adjoint=adjoint,
            stepsize_controller=dfx.PIDController(tol, tol / 100),
            throw=False,
        )
        return jnp.vdot(sol.ys[-1], jnp.asarray(weights, y0.dtype))

    def gradients(dtype, *how):
        """Of each member alone, and of the sum."""
        one = lambda *inputs: of_member(*inputs, *how)
        every = jax.vmap(one, axes)
        alone = jax.vmap(jax.grad(one, (0, 1)), axes)
        both = lambda *inputs: (
            alone(*inputs),
            jax.grad(lambda *inputs: jnp.sum(every(*inputs)), (0, 1))(*inputs),
        )
        return jax.jit(both)(*(jnp.asarray(x, dtype) for x in inputs))

    alone, together = gradients(jnp.float32, dr.ALF4(), dr.ReversibleAdjoint(), 1e-3)
    exact, want = gradients(jnp.float64, dfx.Dopri8(), DEFAULT, 1e-9)
    lost = np.isnan(alone[1]).all(axis=1)
    assert 0 < np.sum(lost) < len(lost)
    assert relative_error(together[0], want[0]) < 1e-2
    assert relative_error(together[1], want[1]) < 1e-2
    assert np.max(np.abs(want[1][lost])) < 1e-2 * np.max(np.abs(weights))
    off = np.abs(np.asarray(together[1]) - np.asarray(exact[1]))
    assert np.max(off[lost]) < 1e-3 * np.max(np.abs(weights))


@pytest.mark.more
def test_member_that_is_spoilt():
    """The gradient with respect to the start of a member would be spoilt, and is not,
    however little it contributes to that of the batch."""
    y0s, ends = jnp.stack([GRID**2, GRID**2]), jnp.array([0.01, 1.0])

    def loss(rate, y0s, solver, adjoint):
        def of_member(y0, t1):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(heat),
                solver,
                *(0.0, t1, None, y0, rate),
                adjoint=adjoint,
                stepsize_controller=dfx.PIDController(1e-6, 1e-6),
                max_steps=16384,
                throw=False,
            )
            return jnp.vdot(sol.ys[-1], WEIGHTS)

        return jnp.vdot(jnp.array([1.0, 1e-16]), jax.vmap(of_member)(y0s, ends))

    def gradient(*how):
        grad = jax.grad(loss, (0, 1))
        return jax.jit(lambda *inputs: grad(*inputs, *how))(jnp.array(1.0), y0s)

    got = gradient(dr.ALF4(), dr.ReversibleAdjoint())
    want = gradient(dfx.Kvaerno5(), DEFAULT)
    assert relative_error(got[0], want[0]) < 1e-3
    for ours, exact in zip(got[1], want[1], strict=True):
        assert relative_error(ours, exact) < 1e-3
