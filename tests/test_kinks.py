"""Vector fields that are not smooth where a solve begins: gradients take the side of the
kink that the solve was on, as the default adjoint's do."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr

from .problems import relative_error, with_slow


def guarded(h):
    """The direction of `h`, and zero at zero."""
    n2 = jnp.sum(h**2)
    safe = jnp.where(n2 > 0, n2, 1.0)
    return jnp.where(n2 > 0, h / jnp.sqrt(safe), 0.0)


def kinks(h):
    """Each for two entries of `h`."""
    fns = jax.nn.relu, jnp.abs, lambda h: jnp.maximum(h, 1.0), guarded
    pairs = h.reshape(-1, 2)
    return jnp.concatenate([fn(x) for fn, x in zip(fns, pairs, strict=False)])


AT_KINKS = jnp.repeat(jnp.array([0.0, 0.0, 1.0, 0.0]), 2)
# By which the walk back does not come to the start where the field itself jumps there.
AT_CONTINUOUS = ("LeapfrogMidpoint", "ReversibleHeun")
SOLVERS = {
    "ALF2": dr.ALF2(),
    "ALF4": dr.ALF4(),
    "ALF6": dr.ALF6(),
    "ALF8": dr.ALF8(),
    "McCallumFoster": dr.McCallumFoster(dfx.Bosh3()),
    "LeapfrogMidpoint": dfx.LeapfrogMidpoint(),
    "ReversibleHeun": dfx.ReversibleHeun(),
}


def gradient(field, solver, y0, adjoint, **kwargs):
    def loss(inputs):
        y0, k = inputs
        kwargs_ = dict(t0=0.0, t1=1.0, dt0=0.1, saveat=dfx.SaveAt(t1=True)) | kwargs
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, y0=y0, args=k, adjoint=adjoint, **kwargs_
        )
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(sol.ys))

    return jax.jit(jax.grad(loss))((y0, jnp.array([0.7, -0.4])))


@pytest.mark.parametrize(
    "rest, save_fn",
    with_slow(((False, True),), ((True, False),)),
    ids=("moving, functions saved", "at rest"),
)
@pytest.mark.parametrize(
    "name",
    with_slow(
        ("ALF4", "McCallumFoster"),
        ("LeapfrogMidpoint", "ALF2", "ALF6", "ALF8", "ReversibleHeun"),
    ),
)
def test_start(name, rest, save_fn):
    """Hidden and augmented states begin at zero; some of them at rest."""

    h0 = AT_KINKS[:6] if name in AT_CONTINUOUS else AT_KINKS

    def field(t, y, k):
        a, h = y
        push = jnp.sin(t) if rest else 1.0
        kink = kinks(h) - kinks(h0)
        return k[0] * a - jnp.sum(h), push * (k[1] + jnp.sum(a)) + k[0] * kink

    y0 = jnp.array([0.3]), h0
    kwargs = {}
    if save_fn:
        fn = lambda t, y, args: (y[0] * args[0], y[1])
        kwargs = dict(saveat=dfx.SaveAt(ts=jnp.linspace(0.0, 1.0, 4), fn=fn))
    ours = gradient(field, SOLVERS[name], y0, dr.ReversibleAdjoint(), **kwargs)
    theirs = gradient(
        field, SOLVERS[name], y0, dfx.RecursiveCheckpointAdjoint(checkpoints=20), **kwargs
    )
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.optimised
def test_splitting():
    """Momenta begin at rest."""
    terms = (
        dfx.ODETerm(lambda t, p, k: p * k[0] + jnp.abs(p)),
        dfx.ODETerm(lambda t, q, k: jnp.sin(t) * k[1] - jax.nn.relu(q)),
    )
    y0 = jnp.zeros(2), jnp.zeros(2)

    def loss(inputs, adjoint):
        y0, k = inputs
        sol = dfx.diffeqsolve(
            terms, dr.BlanesMoan4(), 0.0, 1.0, 0.1, y0, k, adjoint=adjoint
        )
        return jnp.sum(sol.ys[0] ** 2) + jnp.sum(sol.ys[1])

    inputs = y0, jnp.array([0.7, -0.4])
    ours = jax.grad(loss)(inputs, dr.ReversibleAdjoint())
    theirs = jax.grad(loss)(inputs, dfx.RecursiveCheckpointAdjoint(checkpoints=20))
    assert relative_error(ours, theirs) < 1e-10
