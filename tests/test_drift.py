"""A backward pass that misses the initial state is an error, never a wrong gradient."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import textwrap

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._adjoint import backward


def contracting(t, y, rate):
    return -rate * (y - jnp.cos(t))


@functools.cache
def compiled(adjoint, throw, t1, field):
    def final(y0, rate):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            # This solver does not restart.
            dr.ALF2(),
            0.0,
            t1,
            jnp.array(0.01),
            y0,
            rate,
            adjoint=adjoint,
            throw=throw,
        )
        return jnp.sum(sol.ys)

    return jax.jit(jax.grad(final, argnums=(0, 1)))


def gradient(rate, drift_tol=None, throw=True, t1=10.0, adjoint=None, field=contracting):
    if adjoint is None:
        # The start is the only known state.
        adjoint = dr.ReversibleAdjoint(checkpoints=0, drift_tol=drift_tol)
    return compiled(adjoint, throw, t1, field)(jnp.array([1.0, 2.0]), rate)


def test_error_says_by_how_much_and_what_helps():
    with pytest.raises(RuntimeError) as e:
        gradient(jnp.array(4.0))
    message = str(e.value)
    assert "adjoint=ReversibleAdjoint())`: the backward pass" in message
    assert "relative error between 1e" in message
    for remedy in (
        *(
            "dt0",
            "checkpoints=",
            "shorten",
            "RecursiveCheckpointAdjoint",
            "float64",
            "drift_tol",
        ),
        "compensated=True",
    ):
        assert remedy in message


def test_error_of_a_batch_is_that_of_the_element_concerned():
    with pytest.raises(RuntimeError, match="missed a known state"):
        jax.vmap(gradient)(jnp.array([0.3, 4.0, 0.5]))


def test_nan_without_throw():
    assert all(np.all(np.isnan(g)) for g in gradient(jnp.array(4.0), throw=False))


def test_nan_for_the_batch_element_concerned_only():
    rates = jnp.array([0.3, 4.0, 0.5])
    grad_y0, grad_rate = jax.vmap(lambda rate: gradient(rate, throw=False))(rates)
    assert np.array_equal(np.isnan(grad_rate), [False, True, False])
    alone, _ = gradient(rates[2])
    assert np.allclose(grad_y0[2], alone, rtol=1e-12)


def test_tolerance_can_be_set():
    rate = jnp.array(1.0)
    exact = gradient(rate, adjoint=dfx.RecursiveCheckpointAdjoint())
    # The drift is about 1e-12. It passes with the default tolerance, and ...
    grad = gradient(rate)
    assert np.allclose(grad[1], exact[1], rtol=1e-8)
    # ... not with a smaller one.
    with pytest.raises(RuntimeError, match="relative error between 1e-1[0-9]"):
        gradient(rate, drift_tol=1e-15)


@pytest.mark.parametrize("rate", (0.5, 1.0, 1.5, 2.0, 2.5, 3.0))
def test_never_wrong_in_silence(rate):
    """From no drift to a failed reconstruction, gradients are right or NaN."""
    exact = gradient(jnp.array(rate), adjoint=dfx.RecursiveCheckpointAdjoint())
    grad = gradient(jnp.array(rate), throw=False)
    # The limit is `rate * T = 15`, here with `T = 10`.
    assert np.isfinite(grad[1]) == (rate * 10 <= 15)
    if np.isfinite(grad[1]):
        # The state may be off by 1e-6, and the gradient by somewhat more.
        assert np.allclose(grad[1], exact[1], rtol=1e-5)
    # With known states in between.
    grad = gradient(jnp.array(rate), adjoint=dr.ReversibleAdjoint())
    assert np.allclose(grad[1], exact[1], rtol=1e-8)


def test_not_finite():
    def blow_up(t, y, rate):
        return rate * y**2

    with pytest.raises(RuntimeError, match="not finite"):
        gradient(jnp.array(1.0), field=blow_up)
    grads = gradient(jnp.array(1.0), field=blow_up, throw=False)
    assert all(np.all(np.isnan(g)) for g in grads)


def test_start_next_to_zero():
    """The error is not measured relative to the size of a start near zero."""

    @jax.jit
    def run(y0):
        def final(y0):
            adjoint = dr.ReversibleAdjoint()
            term = dfx.ODETerm(lambda t, y, args: jnp.cos(t) + 0.1 * y)
            sol = dfx.diffeqsolve(
                term, dr.ALF4(), 0.0, 5.0, jnp.array(0.01), y0, adjoint=adjoint
            )
            return jnp.sum(sol.ys)

        return jax.grad(final)(y0)

    for size in (0.0, 1e-30, 1e-12):
        assert np.allclose(run(jnp.array([size, -size])), np.exp(0.5), rtol=1e-8)


@pytest.mark.parametrize("drift_tol", (None, float("inf")))
def test_a_walk_that_stops_halfway(drift_tol, monkeypatch):
    """A backward pass that stops halfway, should one occur, is always an error."""

    def stops(walk, end):
        position = walk.start(end, jnp.array(False), jnp.array(False))
        meter = walk.problem.progress_meter.init()
        return dataclasses.replace(position, meter=meter), jnp.array(False)

    monkeypatch.setattr(backward, "run_walks", stops)

    def field(t, y, rate):
        # A new function, whose backward pass JAX has not traced before.
        return contracting(t, y, rate)

    with pytest.raises(RuntimeError, match="there is no gradient"):
        gradient(jnp.array(0.3), drift_tol=drift_tol, field=field)
    grads = gradient(jnp.array(0.3), drift_tol=drift_tol, throw=False, field=field)
    assert all(jnp.all(jnp.isnan(g)) for g in grads)


@pytest.mark.slow
def test_errors_as_nan():
    """If Equinox turns errors into NaN, as programs must that JAX is to cache, a refused
    gradient is NaN in every entry."""
    script = """
        import jax.numpy as jnp
        from tests.test_drift import gradient
        (y_bar, rate_bar) = gradient(jnp.array(4.0))
        assert jnp.isnan(y_bar).all() and jnp.isnan(rate_bar), (y_bar, rate_bar)
        (y_bar, rate_bar) = gradient(jnp.array(1.0), t1=1.0)
        assert jnp.isfinite(y_bar).all() and jnp.isfinite(rate_bar), (y_bar, rate_bar)
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"EQX_ON_ERROR": "nan", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
