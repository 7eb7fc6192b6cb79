"""Vector fields with a kink where a solve begins or rests for a while: gradients take the
same side of the kink as the solve, as with the default adjoint."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr
from diffrax_reversible._branches import may_be_singular, may_branch

from .chains import TwoStreams
from .counter import Counter
from .problems import cases, relative_error


def guarded(h):
    """The direction of `h`, and zero at zero."""
    n2 = jnp.sum(h**2)
    safe = jnp.where(n2 > 0, n2, 1.0)
    return jnp.where(n2 > 0, h / jnp.sqrt(safe), 0.0)


def kinks(h):
    """One kink for every two entries of `h`."""
    fns = jax.nn.relu, jnp.abs, lambda h: jnp.maximum(h, 1.0), guarded
    pairs = h.reshape(-1, 2)
    return jnp.concatenate([fn(x) for fn, x in zip(fns, pairs, strict=False)])


AT_KINKS = jnp.repeat(jnp.array([0.0, 0.0, 1.0, 0.0]), 2)
# Their backward pass does not return to the start if the field itself jumps there.
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


@pytest.mark.long
@pytest.mark.parametrize(
    "rest, save_fn",
    cases(((False, True),), slow=((True, False),)),
    ids=("moving, functions saved", "at rest"),
)
@pytest.mark.parametrize(
    "name",
    cases(
        ("LeapfrogMidpoint",),
        more=("McCallumFoster",),
        slow=("ALF2", "ALF4", "ALF6", "ALF8", "ReversibleHeun"),
    ),
)
def test_start(name, rest, save_fn):
    """Gradients are right if hidden and augmented states begin at zero, some at rest."""

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


def infusion(t, y, k):
    """All is zero until a dose flows in and takes effect."""
    dose, tissue, effect = y
    flow = k[0] * jnp.maximum(t - 0.31, 0.0) + 0.0 * dose
    effects = jax.nn.relu(tissue) + jnp.abs(dose)
    return jnp.stack([flow - dose, dose - 0.3 * tissue, k[1] * effects - effect])


@pytest.mark.long
@pytest.mark.parametrize(
    "name, steps",
    cases(
        (("ALF4", "constant"),),
        slow=[
            ("McCallumFoster", "adaptive"),
            *((name, "constant") for name in SOLVERS if name != "ALF4"),
            *((name, "adaptive") for name in ("ALF4", "ALF6", "ReversibleHeun")),
            ("ALF4", "jump"),
            ("ALF6", "saved functions"),
        ],
    ),
)
def test_at_rest_for_a_while(name, steps):
    """Gradients are right in a batch with a member that never rests, and in steps during
    which the rest ends."""
    pid = dfx.PIDController(rtol=1e-5, atol=1e-7)
    jumps = dfx.ClipStepSizeController(pid, jump_ts=jnp.array([0.31]))
    controllers = dict(adaptive=pid, jump=jumps)
    controller = controllers.get(steps, dfx.ConstantStepSize())
    saveat = dfx.SaveAt(t1=True)
    if steps == "saved functions":
        ts = jnp.linspace(0.0, 1.0, 5)
        saveat = dfx.SaveAt(ts=ts, fn=lambda t, y, k: jax.nn.relu(y) * k[0])

    def pulled(y0, adjoint):
        kwargs = dict(saveat=saveat, stepsize_controller=controller, dt0=0.05)
        return gradient(infusion, SOLVERS[name], y0, adjoint, **kwargs)

    y0 = jnp.array([[0.0, 0.0, 0.0], [0.2, 0.1, 0.0]])
    default = dfx.RecursiveCheckpointAdjoint(checkpoints=200)
    ours, theirs = (
        jax.vmap(lambda y0, adjoint=adjoint: pulled(y0, adjoint))(y0)
        for adjoint in (dr.ReversibleAdjoint(), default)
    )
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.long
def test_couplings_at_rest():
    """Gradients are right with a solver that does not know the whole vector field."""
    f = lambda t, y, k: k[0] * jnp.maximum(t - 0.31, 0.0) - jax.nn.relu(y)
    g = lambda t, y, k: k[1] * jnp.abs(y) * jnp.maximum(t - 0.61, 0.0)
    terms, solver = (dfx.ODETerm(f), dfx.ODETerm(g)), TwoStreams()

    def loss(inputs, adjoint):
        y0, k = inputs
        sol = dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.05, y0, k, adjoint=adjoint)
        return jnp.sum(sol.ys[0] + sol.ys[1])

    inputs = (jnp.zeros(2), jnp.zeros(2)), jnp.array([0.7, -0.4])
    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint(checkpoints=40)
    ours, theirs = (jax.grad(loss)(inputs, adjoint) for adjoint in adjoints)
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.slow
def test_evaluations():
    """A kink costs two more evaluations for each of a step, to find its start and to make
    it again, in the two steps in which an entry is set off."""
    counter, y0 = Counter(), jnp.zeros(2)

    def field(kink, t, y, k):
        flow = jnp.maximum(t - jnp.array([0.0, 0.33]), 0.0)
        return counter.one(t, y) * (k * flow - kink(y))

    def evaluations(kink):
        def loss(k):
            term = dfx.ODETerm(ft.partial(field, kink))
            adjoint = dr.ReversibleAdjoint()
            sol = dfx.diffeqsolve(term, dr.ALF4(), 0.0, 1.0, 0.1, y0, k, adjoint=adjoint)
            return jnp.sum(sol.ys)

        return counter.during(jax.jit(jax.grad(loss)), jnp.array(0.7))[0]

    assert evaluations(jnp.abs) == evaluations(jnp.square) + 2 * (5 + 5)


@pytest.mark.slow
@pytest.mark.optimised
def test_memory():
    """Memory is flat, and exceeds that of a smooth field by fewer than 16 states."""

    def bytes_of(kink, max_steps):
        def loss(y0):
            field = lambda t, y, args: jnp.roll(y, 1) - kink(y)
            sol = dfx.diffeqsolve(
                *(dfx.ODETerm(field), dr.ALF4(), 0.0, 1.0, 0.1, y0),
                adjoint=dr.ReversibleAdjoint(),
                max_steps=max_steps,
            )
            return jnp.sum(sol.ys)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(SIZE)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    SIZE = 100_000
    ours = bytes_of(jnp.abs, 4096)
    assert bytes_of(jnp.abs, 10**6) < 1.05 * ours
    assert ours - bytes_of(jnp.square, 4096) < 16 * 8 * SIZE


def test_misses_are_not_hidden():
    """Entries at rest, which are known, do not hide misses."""

    def field(t, y, rate):
        return rate * (jnp.abs(jnp.sin(jnp.maximum(t - 0.2, 0.0))) - jnp.abs(y))

    def loss(rate):
        adjoint = dr.ReversibleAdjoint(checkpoints=0)
        term, y0 = dfx.ODETerm(field), jnp.zeros(2)
        sol = dfx.diffeqsolve(term, dr.ALF2(), 0.0, 2.0, 0.01, y0, rate, adjoint=adjoint)
        return jnp.sum(sol.ys)

    assert jnp.isfinite(jax.grad(loss)(1.0))
    with pytest.raises(RuntimeError, match="the backward pass"):
        eqx.filter_jit(jax.grad(loss))(150.0)


def turned(y):
    """`exp(i y)`"""
    return jax.lax.complex(jnp.cos(y), jnp.sin(y))


@jax.jit
def softplus(y, scale=2):
    """Not that of JAX."""
    return jnp.where(y > 0, scale * y, y)


@pytest.mark.parametrize(
    "fn, branches",
    (
        (lambda y: jnp.tanh(y[0]) * y[1:] + y[:-1] ** 3 - jnp.roll(y, 1)[1:], False),
        (lambda y: jax.nn.softplus(y) + jax.nn.silu(y) + jax.nn.gelu(y), False),
        (lambda y: jnp.where(AT_KINKS[0] > 0, y, jnp.sin(y)) + jnp.abs(AT_KINKS[0]), False),
        (jax.vmap(jax.nn.relu), True),
        (softplus, True),
        (lambda y: softplus(y, 3), True),
        (jax.nn.elu, True),
        (jnp.sort, True),
        (lambda y: jnp.arctan2(y[0], y[1]) * y, True),
        (lambda y: jnp.log(y + 2) + jnp.sqrt(y + 1) * jnp.exp(turned(y)).real, False),
        (lambda y: jnp.log(turned(y)).imag, True),
        (lambda y: jnp.sqrt(turned(y)).real, True),
        (lambda y: (turned(y) ** jnp.array(0.3 + 0j)).real, True),
        (lambda y: jax.lax.cond(y[0] > 0, lambda: y, lambda: 2 * y), True),
        (lambda y: jax.lax.scan(lambda c, _: (c + y, jnp.abs(c)), y, None, 2)[1], True),
    ),
    ids=(
        *("tanh and powers", "softplus, silu and gelu", "kinks of constants"),
        *("relu", "another softplus", "with a scale", "elu", "sort", "atan2"),
        *("real log and sqrt", "complex log", "complex sqrt", "complex power"),
        *("cond", "scan"),
    ),
)
def test_what_may_branch(fn, branches):
    assert may_branch(fn, jnp.arange(3.0)) == branches


@pytest.mark.parametrize(
    "fn, singular",
    (
        (lambda t: jnp.sin(t / 3) * t**2 + jnp.exp(-t) + jnp.tanh(t) / AT_KINKS[1], False),
        (lambda t: jax.nn.softplus(t) + jnp.log(AT_KINKS[1]), False),
        (lambda t: 1 / t, True),
        (lambda t: t**-2, True),
        (lambda t: t**0.25, True),
        (lambda t: jnp.sqrt(t), True),
        (lambda t: jax.jit(jnp.log)(t), True),
    ),
    ids=("smooth", "of constants", "quotient", "inverse", "power", "sqrt", "log"),
)
def test_what_may_be_singular(fn, singular):
    assert may_be_singular(fn, jnp.array(2.0)) == singular


@pytest.mark.parametrize("power", (0.25, 0.5))
@pytest.mark.parametrize(
    "solver", cases((dr.ALF4(),), more=(dr.ALF6(), dr.ALF8())), ids=str
)
def test_singular_at_the_end(solver, power):
    """`y' = -y d(t^power)/dt` to the neighbourhood of zero, as of a diffusion model whose
    noise vanishes there. Nothing follows the last step that would show what it misses."""
    tol, end = 1e-2, 1e-5
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y * power * t ** (power - 1)),
        solver,
        *(1.0, end, -0.01, jnp.array(1.0)),
        stepsize_controller=dfx.PIDController(tol, tol / 10),
    )
    assert relative_error(sol.ys[-1], jnp.exp(1 - end**power)) < tol


@pytest.mark.slow
def test_splitting():
    """Gradients are right if momenta begin at rest, and some coordinates rest longer."""
    off = jnp.array([0.0, 0.33])
    terms = (
        dfx.ODETerm(lambda t, p, k: p * k[0] + jnp.abs(p)),
        dfx.ODETerm(
            lambda t, q, k: jnp.sin(jnp.maximum(t - off, 0.0)) * k[1] - jax.nn.relu(q)
        ),
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
