"""Solvers under Diffrax's default adjoint, which recomputes steps and accepts or rejects
them again: they must round as they did at first."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr

from .problems import cases, relative_error, sum_of_squares


@pytest.mark.optimised
@pytest.mark.parametrize(
    "solver",
    cases(
        (),
        slow=[
            dr.ALF4(),
            dr.ALF6(),
            dr.ALF4(compensated=True),
            dr.McCallumFoster(dfx.Tsit5()),
            dr.Gauss4(),
        ],
    ),
    ids=repr,
)
def test_steps_that_hang_on_rounding(solver):
    """Gradients do not depend on the number of checkpoints, although the kinks of a control
    make the choice of steps chaotic: moving the start by 1e-15 leads to other steps."""
    members = 4
    ts = jnp.linspace(0.0, 2.0, 17)
    angles = 2 * ts[None] + 1.5 * jnp.arange(float(members))[:, None]
    path = jnp.stack(
        [jnp.broadcast_to(ts, angles.shape), jnp.sin(angles), jnp.cos(angles)], -1
    )
    coefficients = jax.vmap(dfx.backward_hermite_coefficients, (None, 0))(ts, path)
    network = eqx.nn.MLP(8, 24, 32, 1, jax.nn.softplus, jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_array)

    def gradients(checkpoints):
        def loss(params, coefficients):
            network = eqx.combine(params, static)
            field = lambda t, y, args: network(y).reshape(8, 3)
            control = dfx.CubicInterpolation(ts, coefficients)
            sol = dfx.diffeqsolve(
                dfx.ControlTerm(field, control).to_ode(),
                solver,
                ts[0],
                ts[-1],
                None,
                jnp.ones(8),
                stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-7),
                adjoint=dfx.RecursiveCheckpointAdjoint(checkpoints),
                max_steps=512,
            )
            return sum_of_squares(sol.ys)

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, coefficients)

    assert relative_error(gradients(4), gradients(512)) < 1e-12
