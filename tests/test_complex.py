"""Complex states, as in quantum mechanics, and their gradients in JAX's convention."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import cases, relative_error


# Diffrax warns about complex dtypes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex dtype"),
    # Diffrax's controllers divide complex numbers by real ones.
    pytest.mark.usefixtures("standard_promotion"),
]


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


_RANDOM = np.random.default_rng(0)
HERMITIAN = jnp.array(_RANDOM.normal(size=(3, 3)) + 1j * _RANDOM.normal(size=(3, 3)))
PSI0 = jnp.array([1.0, 0.5j, 0.3 - 0.2j])


def schroedinger(t, psi, args):
    """Schrödinger's equation with terms that are not holomorphic, and friction."""
    matrix, rate = args
    hermitian = (matrix + matrix.conj().T) / 2
    pull = rate * jnp.cos(t) * jnp.abs(psi) ** 2 * psi
    return -1j * (hermitian @ psi + pull) - 0.5 * rate * psi + 0.1 * psi.conj()


def drift_and_kick():
    """A driven oscillator of complex amplitude, as a Hamiltonian system."""
    return (
        dfx.ODETerm(lambda t, p, args: p * jnp.asarray(args[1], p.dtype)),
        dfx.ODETerm(lambda t, q, args: -(args[0] @ q) * jnp.abs(q) - 1j * jnp.sin(t)),
    )


CASES = {
    "ALF2": (dr.ALF2(), 1),
    "ALF4": (dr.ALF4(), 1),
    "ALF6": (dr.ALF6(), 1),
    "ALF4 compensated": (dr.ALF4(compensated=True), 1),
    "ALF4 bitwise": (dr.ALF4(bitwise=True), 1),
    "BlanesMoan4": (dr.BlanesMoan4(), 2),
    "KahanLi8 compensated": (dr.KahanLi8(compensated=True), 2),
    "McCallumFoster": (dr.McCallumFoster(dfx.Tsit5()), 1),
    "ReversibleHeun": (dfx.ReversibleHeun(), 1),
    "LeapfrogMidpoint": (dfx.LeapfrogMidpoint(), 1),
    "SemiImplicitEuler": (dfx.SemiImplicitEuler(), 2),
    "ImplicitMidpoint": (dr.ImplicitMidpoint(), 1),
    "Gauss4": (dr.Gauss4(), 1),
}


def solve(name, y0, args, saveat, adjoint, precision=jnp.complex128):
    solver, parts = CASES[name]
    terms = dfx.ODETerm(schroedinger) if parts == 1 else drift_and_kick()
    y0 = y0.astype(precision)
    fixed = name in ("ALF2", "LeapfrogMidpoint", "SemiImplicitEuler")
    tol = 1e-6 if precision == jnp.complex128 else 1e-4
    return dfx.diffeqsolve(
        terms,
        solver,
        *(0.0, 2.0, 0.05),
        y0 if parts == 1 else (y0, 1j * y0),
        args,
        saveat=saveat,
        stepsize_controller=dfx.ConstantStepSize()
        if fixed
        else dfx.PIDController(tol, tol),
        adjoint=adjoint,
    )


def loss(name, saveat, adjoint, precision=jnp.complex128):
    def of(y0, args):
        sol = solve(name, y0, args, saveat, adjoint, precision)
        leaves = jax.tree.leaves(sol.ys)
        return sum(jnp.sum(jnp.abs(y) ** 2 + (y * (2 - 1j)).real) for y in leaves)

    return of


SAVEATS = {
    "t1": dfx.SaveAt(t1=True),
    "ts": dfx.SaveAt(t0=True, ts=jnp.linspace(0.1, 1.9, 7)),
    "fn": dfx.SaveAt(ts=jnp.linspace(0.1, 1.9, 7), fn=lambda t, y, args: y),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name, saveat",
    cases(
        (("BlanesMoan4", "fn"),),
        slow=[("ALF4", "t1"), *((name, "ts") for name in CASES)],
    ),
)
def test_against_default(name, saveat):
    args = HERMITIAN, jnp.array(0.4)
    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint(checkpoints=4096)
    losses = (loss(name, SAVEATS[saveat], adjoint) for adjoint in adjoints)
    ours, want = (jax.jit(jax.grad(of, (0, 1)))(PSI0, args) for of in losses)
    for got, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert got.dtype == reference.dtype
        np.testing.assert_allclose(got, reference, rtol=1e-8, atol=1e-10)


def test_finite_differences():
    """Gradients equal differences along the real and the imaginary axis."""
    args = HERMITIAN, jnp.array(0.4)
    # The steps do not depend on the state.
    of = jax.jit(loss("ALF2", SAVEATS["t1"], dr.ReversibleAdjoint()))
    gradient = jax.grad(of)(PSI0, args)
    eps = 1e-5
    for i, direction in enumerate((1.0, 1j, 1.0)):
        bump = eps * direction * jnp.eye(3)[i]
        slope = (of(PSI0 + bump, args) - of(PSI0 - bump, args)) / (2 * eps)
        # JAX's gradient of a real function is the conjugate of the direction of ascent.
        assert slope == pytest.approx(float((gradient[i] * direction).real), rel=1e-7)


@pytest.mark.parametrize(
    "name", cases(("ALF4",), slow=("Gauss4", "ALF6", "McCallumFoster"))
)
def test_as_real_and_imaginary_parts(name):
    """The solution equals that of the same equation in twice as many real numbers."""
    solver, _ = CASES[name]
    args = HERMITIAN, jnp.array(0.4)

    def real_field(t, y, args):
        dy = schroedinger(t, y[0] + 1j * y[1], args)
        return jnp.stack([dy.real, dy.imag])

    kwargs = dict(stepsize_controller=dfx.ConstantStepSize(), args=args)
    times = dict(t0=0.0, t1=2.0, dt0=0.05)
    terms = dfx.ODETerm(schroedinger)
    whole = dfx.diffeqsolve(terms, solver, y0=PSI0, **times, **kwargs).ys[0]
    y0 = jnp.stack([PSI0.real, PSI0.imag])
    real = dfx.diffeqsolve(dfx.ODETerm(real_field), solver, y0=y0, **times, **kwargs).ys[0]
    np.testing.assert_allclose(whole, real[0] + 1j * real[1], rtol=1e-12)


@pytest.mark.parametrize(
    "name", cases((), slow=("ALF4", "ALF4 compensated", "BlanesMoan4", "Gauss4"))
)
def test_single_precision(name):
    args = HERMITIAN.astype(jnp.complex64), jnp.array(0.4, jnp.float32)
    y0 = PSI0.astype(jnp.complex64)
    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint(checkpoints=4096)
    ours, want = (
        jax.grad(loss(name, SAVEATS["t1"], adjoint, jnp.complex64))(y0, args)
        for adjoint in adjoints
    )
    assert ours.dtype == jnp.complex64
    np.testing.assert_allclose(ours, want, rtol=1e-3)


@pytest.mark.slow
def test_unitary_walk_back_to_the_last_bit():
    """With exact sums of both parts, the backward pass returns to the start to the last
    bit. All 500 steps are on record, as times may round differently in replayed steps."""
    terms = dfx.ODETerm(lambda t, psi, args: -1j * (args @ psi))
    matrix = (HERMITIAN + HERMITIAN.conj().T) / 2

    def final(y0, bitwise):
        return dfx.diffeqsolve(
            terms,
            dr.ALF4(bitwise=bitwise),
            *(0.0, 10.0, 0.02, y0, matrix),
            adjoint=dr.ReversibleAdjoint(drift_tol=0.0 if bitwise else None),
        ).ys[0]

    gradient = jax.grad(lambda y0: jnp.sum(jnp.abs(final(y0, True)) ** 2))(PSI0)
    # The norm is conserved.
    np.testing.assert_allclose(gradient, 2 * PSI0.conj(), rtol=1e-4)
    assert relative_error(jnp.abs(final(PSI0, False)), jnp.abs(final(PSI0, True))) < 1e-10


@pytest.mark.slow
def test_restarts_and_vmap():
    """Gradients equal differences in a batch whose members decay at different rates."""

    def of(rate, y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -(rate + 2j) * (y - jnp.exp(1j * t))),
            dr.ALF4(),
            *(0.0, 4.0, None, y0, rate),
            stepsize_controller=dfx.PIDController(1e-7, 1e-7),
            adjoint=dr.ReversibleAdjoint(checkpoints=32),
        )
        return jnp.sum(jnp.abs(sol.ys)) + jnp.sum(sol.ys.real), sol.stats["num_restarts"]

    rates = jnp.array([0.0, 2.0, 20.0])
    y0 = jnp.array([1.0 + 0j, 0.2j])
    grads, restarts = jax.vmap(lambda r: jax.grad(of, has_aux=True)(r, y0))(rates)
    assert restarts[0] <= 1 < restarts[2]
    eps = 1e-5
    slopes = [(of(r + eps, y0)[0] - of(r - eps, y0)[0]) / (2 * eps) for r in rates]
    np.testing.assert_allclose(grads, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    cases(
        (),
        long=("BlanesMoan4",),
        more=("McCallumFoster",),
        slow=("ALF6", "ReversibleHeun", "Gauss4"),
    ),
)
def test_strict_promotion(name):
    """Gradients are right under strict promotion, with given steps as in Diffrax."""
    solver, parts = CASES[name]
    field = dfx.ODETerm(lambda t, y, args: jnp.asarray(-1j, y.dtype) * y)
    terms = (field, field) if parts == 2 else field
    copies = 1 if name == "Gauss4" else 1000
    y0 = (PSI0, 2 * PSI0) if parts == 2 else jnp.tile(PSI0, copies)

    def final(y0, adjoint):
        sol = dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, y0, adjoint=adjoint)
        return sum(jnp.sum(jnp.abs(y) ** 4) for y in jax.tree_util.tree_leaves(sol.ys))

    adjoints = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
    with jax.numpy_dtype_promotion("strict"):
        ours, theirs = (jax.grad(final)(y0, adjoint) for adjoint in adjoints)
    parts = lambda x: jax.tree_util.tree_map(lambda x: jnp.stack([x.real, x.imag]), x)
    assert relative_error(parts(ours), parts(theirs)) < 1e-12
