"""A step is undone up to rounding, and its pull-back is that of the step."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._solver.base import linearise_step

from .problems import (
    as_vector,
    BITWISE,
    COMPENSATED,
    Network,
    network_args,
    relative_error,
    SOLVERS,
    with_slow,
)


pytestmark = pytest.mark.usefixtures("compile_quickly")

Y = jnp.array([1.0, 2.0, 0.5])
T0, T1 = jnp.array(0.2), jnp.array(0.5)


def term():
    return dfx.ODETerm(Network())


@pytest.mark.parametrize("solver", (*SOLVERS, COMPENSATED, BITWISE), ids=repr)
def test_inverse_undoes_step(solver):
    args = network_args()
    state = solver.init(term(), T0, T1, Y, args)
    # A deviation of `v` from the vector field is part of the state, and comes back too.
    state = eqx.tree_at(lambda s: s.v, state, state.v + jnp.array([0.1, -0.2, 0.3]))
    y1, _, _, state1, _ = solver.advance(term(), T0, T1, Y, args, state)
    assert np.max(np.abs(y1 - Y)) > 1e-2
    y0, state0 = solver.inverse_step(term(), T0, T1, y1, args, state1)
    assert np.max(np.abs(y0 - Y)) < 1e-14
    assert np.max(np.abs(state0.v - state.v)) < 1e-14


@pytest.mark.parametrize("solver", (*SOLVERS, COMPENSATED, BITWISE), ids=repr)
@pytest.mark.parametrize("interpolated", with_slow((True,), (False,)))
def test_fused_pullback_is_the_default_one(solver, interpolated):
    """With cotangents of the end of the step, of what it interpolates with, and of all
    the steps after it."""
    args = network_args()
    state = solver.init(term(), T0, T1, Y, args)
    y1, _, dense_info, state1, _ = solver.step(term(), T0, T1, Y, args, state, False)
    params, static = eqx.partition((term(), args), eqx.is_inexact_array)

    def bind(params):
        return eqx.combine(params, static)

    def random_like(tree, seed):
        leaves, treedef = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(
            treedef,
            [
                jax.random.normal(k, x.shape, x.dtype)
                for k, x in zip(keys, leaves, strict=True)
            ],
        )

    real_state = eqx.filter(state, eqx.is_inexact_array)
    cotangent = dr.Cotangent(
        random_like(Y, 0), random_like(real_state, 1), random_like(params, 2)
    )
    dense_cotangent = random_like(dense_info, 3) if interpolated else None
    arguments = bind, params, T0, T1, y1, state1
    y0, state0, fused = solver.inverse_step_and_pullback(
        *arguments, cotangent, dense_cotangent
    )
    _, _, _, pull = linearise_step(solver, *arguments)
    default = pull(cotangent, dense_cotangent)
    assert np.max(np.abs(y0 - Y)) < 1e-14
    assert np.max(np.abs(state0.v - state.v)) < 1e-14
    fused = eqx.tree_at(lambda ct: ct.probe, fused, None, is_leaf=lambda x: x is None)
    assert relative_error(fused, default) < 1e-13
    # ... of which the latter is JAX's own derivative, which differences confirm.
    direction = random_like((Y, state.v, params), 4)

    def projected(h):
        y, v, p = jax.tree.map(lambda x, d: x + h * d, (Y, state.v, params), direction)
        v = eqx.tree_at(lambda s: s.v, state, v)
        y, _, info, v, _ = solver.step(bind(p)[0], T0, T1, y, bind(p)[1], v, False)
        out = as_vector((y, v)) @ as_vector((cotangent.y, cotangent.solver_state))
        if interpolated:
            out = out + as_vector(info) @ as_vector(dense_cotangent)
        return out + as_vector(p) @ as_vector(cotangent.params)

    difference = (projected(1e-6) - projected(-1e-6)) / 2e-6
    assert abs(as_vector(fused) @ as_vector(direction) - difference) < 1e-7 * abs(
        difference
    )
