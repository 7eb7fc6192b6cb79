"""Evaluations of the vector field, counted at run time."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import PID


pytestmark = pytest.mark.usefixtures("compile_quickly")


class Counter:
    def __init__(self):
        self.count = 0

    def __call__(self, t, y, scale):
        # Pure, so that what is not used is not evaluated either.
        point = jax.lax.stop_gradient((t, y))
        one = jax.pure_callback(self._increment, jax.ShapeDtypeStruct((), y.dtype), point)
        return one * jnp.tanh(scale * y) - jnp.cos(t)

    def _increment(self, point):
        self.count += 1
        return np.ones((), point[1].dtype)

    def during(self, fn, *args):
        self.count = 0
        out = jax.block_until_ready(fn(*args))
        jax.effects_barrier()
        return self.count, out


@pytest.mark.parametrize(
    "solver, stages", ((dr.ALF2(), 1), (dr.ALF4(), 5), (dr.ALF6(), 20), (dr.ALF8(), 34))
)
@pytest.mark.parametrize("controller", (dfx.ConstantStepSize(), PID))
@pytest.mark.parametrize("ts", (None, jnp.linspace(0, 3, 7)))
def test_evaluations(solver, stages, controller, ts):
    field = Counter()

    def final(y0, scale):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            0.0,
            3.0,
            jnp.array(1.0),
            y0,
            scale,
            saveat=dfx.SaveAt(t1=True, ts=ts),
            adjoint=dr.ReversibleAdjoint(),
            stepsize_controller=controller,
        )
        return jnp.sum(sol.ys), sol.stats["num_steps"]

    y0, scale = jnp.array([1.0, 2.0]), jnp.array(0.3)
    forward, (_, steps) = field.during(jax.jit(final), y0, scale)
    # To interpolate costs `ALF6` an evaluation a step.
    evaluates = stages == 20 and ts is not None
    assert forward == (stages + evaluates) * steps + 1
    gradient = jax.jit(jax.value_and_grad(final, argnums=(0, 1), has_aux=True))
    both, _ = field.during(gradient, y0, scale)
    # And another walk back over the step.
    assert forward < both <= (3 if evaluates else 2) * forward
