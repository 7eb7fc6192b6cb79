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
    """Fast modes of a heat equation spoil the gradient with respect to its start. That is
    refused, and the one with respect to the conductivity alone, which they do not spoil, is
    accepted."""
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

    want = gradient(dfx.Kvaerno5(), DEFAULT, 0)
    got = gradient(solver, dr.ReversibleAdjoint(), 0)
    assert relative_error(got, want) < 1e-3
    spoilt = gradient(solver, dr.ReversibleAdjoint(), (0, 1))
    assert np.all(np.isnan(spoilt[1]))
