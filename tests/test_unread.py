"""Leaves of `terms` and `args` that nothing reads take no memory. Leaves that only one part
of a solve reads have their gradients."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr


ROOT_FINDER = optx.Newton(1e-10, 1e-10, optx.rms_norm)


class StartedBy(dr.ALF4):
    """A solver whose `init` reads an argument that no step reads."""

    def init(self, terms, t0, t1, y0, args):
        state = super().init(terms, t0, t1, y0, args)
        return eqx.tree_at(lambda s: s.v, state, state.v + args["init"])


def compiled(adjoint):
    args = {name: jnp.array(x) for name, x in dict(field=-0.3, save=2.0, init=0.01).items()}
    args |= dict(event=jnp.array(0.8), unread=jnp.ones(10_000))

    def loss(args):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: args["field"] * y),
            StartedBy(),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            args,
            saveat=dfx.SaveAt(t1=True, fn=lambda t, y, args: (t, y * args["save"])),
            event=dfx.Event(lambda t, y, args, **kwargs: y - args["event"], ROOT_FINDER),
            adjoint=adjoint,
            max_steps=16,
        )
        return sum(jnp.sum(x) for x in sol.ys)

    return jax.jit(jax.grad(loss)).lower(args).compile(), args


@pytest.mark.long
def test_gradient_and_memory():
    ours, args = compiled(dr.ReversibleAdjoint())
    theirs, _ = compiled(dfx.RecursiveCheckpointAdjoint())
    grad, want = ours(args), theirs(args)
    for name in args:
        np.testing.assert_allclose(grad[name], want[name], rtol=1e-9, err_msg=name)
        assert np.any(want[name] != 0) == (name != "unread")
    assert ours.memory_analysis().temp_size_in_bytes < args["unread"].nbytes


class FollowingArgs(dfx.AbstractStepSizeController):
    """The length of its steps is an argument."""

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, None

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        return True, t1, t1 + args["step"], False, state, dfx.RESULTS.successful


def test_read_by_the_controller():
    """The gradient of the times of steps is refused, and not zero."""

    def loss(step):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y),
            dr.ALF4(),
            *(0.0, 1.0, 0.1, jnp.array(1.0), {"step": step}),
            saveat=dfx.SaveAt(steps=True),
            stepsize_controller=FollowingArgs(),
            adjoint=dr.ReversibleAdjoint(),
            max_steps=16,
        )
        return jnp.sum(jnp.where(jnp.isfinite(sol.ts), sol.ts, 0))

    with pytest.raises(NotImplementedError, match="depend on the state"):
        jax.grad(loss)(jnp.array(0.2))
