"""Every form of saving: the values of the default adjoint, and its gradients."""

import itertools as it

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import Network, network_args, PID, relative_error, sum_of_squares


Y0 = jnp.array([1.0, 2.0, 0.5])
TS = jnp.linspace(0.0, 3.0, 9)


def scaled(t, y, args):
    return {"y": t * y**2 * args["scale"], "count": jnp.array(3)}


def assert_same(saveat, solver, read):
    """`read(sol)` makes the loss out of a solution."""

    @eqx.filter_jit
    def gradient(adjoint):
        @eqx.filter_value_and_grad(has_aux=True)
        def value_and_grad(inputs):
            y0, field, args = inputs
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                solver,
                0.0,
                3.0,
                jnp.array(0.2),
                y0,
                args,
                saveat=saveat,
                adjoint=adjoint,
                stepsize_controller=PID,
                max_steps=40,
            )
            return read(sol), (sol.ts, sol.ys)

        return value_and_grad((Y0, Network(), network_args()))

    (value, out), grad = gradient(dr.ReversibleAdjoint())
    (expected_value, expected), expected_grad = gradient(dfx.RecursiveCheckpointAdjoint())
    # They are compiled apart, and their last bits may differ.
    rounding = dict(rtol=100 * np.finfo(np.float64).eps, atol=0)
    np.testing.assert_allclose(value, expected_value, **rounding)
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **rounding)
    assert relative_error(grad, expected_grad) < 1e-10


@pytest.mark.parametrize("t0, t1, ts", list(it.product((False, True), repeat=3))[1:])
def test_t0_t1_ts(t0, t1, ts):
    saveat = dfx.SaveAt(t0=t0, t1=t1, ts=TS if ts else None)
    assert_same(saveat, dr.ALF4(), lambda sol: sum_of_squares(sol.ys))


@pytest.mark.parametrize("steps, t1", ((1, True), (2, False), (3, True)))
def test_steps(steps, t1):
    saveat = dfx.SaveAt(steps=steps, t0=True, t1=t1, ts=TS)
    assert_same(saveat, dr.ALF4(), lambda sol: sum_of_squares(sol.ys))


@pytest.mark.parametrize("solver", (dr.ALF4(), dr.ALF6()), ids=repr)
def test_fn(solver):
    """With a function to save, of which the output is not all real, `ts` included."""
    saveat = dfx.SaveAt(t0=True, t1=True, ts=TS, steps=2, fn=scaled)
    assert_same(saveat, solver, lambda sol: sum_of_squares(sol.ys))


def test_subs():
    saveat = dfx.SaveAt(
        subs={
            "ts": dfx.SubSaveAt(ts=TS[1:4]),
            "fn": [dfx.SubSaveAt(ts=TS[3:], fn=scaled), dfx.SubSaveAt(steps=2)],
            "ends": dfx.SubSaveAt(t0=True, t1=True, fn=scaled),
            "unused": dfx.SubSaveAt(t0=True, ts=TS, steps=3),
        }
    )
    assert_same(
        saveat,
        dr.ALF4(),
        lambda sol: sum_of_squares({k: v for k, v in sol.ys.items() if k != "unused"}),
    )


@pytest.mark.parametrize("solver", (dr.ALF4(), dr.ALF6()), ids=repr)
def test_dense(solver):
    def read(sol):
        ts = jnp.array([0.0, 0.4, 1.7, 3.0])
        values, slopes = jax.vmap(sol.evaluate)(ts), jax.vmap(sol.derivative)(ts)
        return jnp.sum(values**2) + jnp.sum(slopes[1:] ** 2) + sum_of_squares(sol.ys)

    assert_same(dfx.SaveAt(dense=True, ts=TS), solver, read)


def test_solver_state():
    def read(sol):
        return sum_of_squares(sol.ys) + jnp.sum(sol.solver_state.v**3)

    saveat = dfx.SaveAt(ts=TS, solver_state=True, controller_state=True, made_jump=True)
    assert_same(saveat, dr.ALF4(), read)


def test_dense_only():
    read = lambda sol: jnp.sum(sol.evaluate(1.3) ** 2)
    assert_same(dfx.SaveAt(dense=True), dr.ALF4(), read)
