"""Carry an atom in optical tweezers, faster than it can follow by itself.

The tweezers are a focused laser beam, a well of finite depth that holds an atom in its
ground state. A beam that moves at constant speed shakes the atom and partly loses it. The
script learns a path of the beam by which the atom arrives at rest. It solves the
time-dependent Schrödinger equation

    i ψ' = -1/2 ∂²ψ/∂x² + V(x - c(t)) ψ

on a grid, split into real and imaginary part, and optimises the path `c` by the gradient of
the final overlap with the ground state. The units make the reduced Planck constant and the
mass one.

The fastest modes of the grid oscillate at `2 / dx²`, hundreds of times faster than the atom
in its well, whose wave contains none of them. They bound explicit steps all the same
(`Tsit5`), and neither these nor dissipative implicit steps (`Kvaerno5`) keep the norm.
`ImplicitMidpoint` keeps it to the last bits. Its gradient stores no trajectory: the
backward pass undoes a step by solving the same equations from the other end. The equations
are tridiagonal, and `linear_solver` makes use of that.

The script asserts that the optimised path loses less than 2 % of what constant speed loses
(80 % with `--quick`), that the norm is constant to 1e-12, that the gradient
equals the default adjoint's to 1e-8, and that it takes less than a tenth of the memory of
`Tsit5`'s.

Run `python examples/04_schroedinger.py` after `pip install ".[examples]"`. It takes two
minutes on two cores, and writes `04_schroedinger.png`. `--quick` makes fewer updates, with
a third of the grid. The gradient of `Kvaerno5` solves dense equations for every stage,
whatever the `linear_solver` of its steps, so only its solve is measured. `--quick --all`
measures its gradient too, in two minutes.
"""

import pathlib
import sys
import time
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib
import numpy as np
import optax
import scipy.linalg
import tqdm
from jaxtyping import Array, Complex, Float

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

QUICK, ALL = "--quick" in sys.argv, "--all" in sys.argv
POINTS, STEPS, UPDATES = (255, 500, 10) if QUICK else (767, 2000, 60)
# Where the beam starts and ends, and the time in between.
START, END, DURATION = -4.0, 4.0, 2.5
DEPTH, WAIST = 40.0, 2.0
X = jnp.linspace(-12.0, 12.0, POINTS + 2)[1:-1]
DX = float(X[1] - X[0])

# Real and imaginary parts.
Wave = tuple[Float[Array, " x"], Float[Array, " x"]]


def well(x: Float[Array, " x"]) -> Float[Array, " x"]:
    """The potential, zero at the bottom."""
    return DEPTH * (1 - jnp.exp(-2 * (x / WAIST) ** 2))


def path(t: Float[Array, ""], amplitudes: Float[Array, " k"]) -> Float[Array, ""]:
    """The beam's position: constant speed, and harmonics that vanish at both ends."""
    s = t / DURATION
    harmonics = jnp.sin(jnp.pi * jnp.arange(1, amplitudes.size + 1) * s)
    return START + (END - START) * s + amplitudes @ harmonics


def schroedinger(t, psi: Wave, amplitudes) -> Wave:
    potential = well(X - path(t, amplitudes))

    def hamiltonian(f):
        ends = jnp.pad(f, 1)
        return -(ends[2:] - 2 * f + ends[:-2]) / (2 * DX**2) + potential * f

    re, im = psi
    return hamiltonian(im), -hamiltonian(re)


def ground_state(centre: float) -> Wave:
    diagonal = 1 / DX**2 + np.asarray(well(X - centre))
    beside = np.full(POINTS - 1, -0.5 / DX**2)
    _, vectors = scipy.linalg.eigh_tridiagonal(
        diagonal, beside, select="i", select_range=(0, 0)
    )
    ground = jnp.asarray(vectors[:, 0])
    return ground, jnp.zeros_like(ground)


class Bands(NamedTuple):
    """The diagonals of a complex tridiagonal matrix, each as long as the main one."""

    lower: Complex[Array, " x"]
    main: Complex[Array, " x"]
    upper: Complex[Array, " x"]


class Tridiagonal(lx.AbstractLinearSolver):
    """Solves tridiagonal equations in a wave that are linear over the complex numbers.

    Products with three vectors give the three diagonals.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Bands:
        del options
        re, im = operator.in_structure()
        index = jnp.arange(POINTS)
        products = []
        for i in range(3):
            ones = jnp.where(index % 3 == i, 1.0, 0.0).reshape(re.shape)
            a, b = operator.mv((ones, jnp.zeros(im.shape)))
            products.append((a + 1j * b).reshape(-1))

        def diagonal(offset):
            return jnp.stack(products)[(index + offset) % 3, index]

        return Bands(diagonal(-1).at[0].set(0), diagonal(0), diagonal(1).at[-1].set(0))

    def compute(self, state: Bands, vector: Wave, options: dict[str, Any]):
        del options
        right = (vector[0] + 1j * vector[1]).reshape(-1, 1)
        solution = jax.lax.linalg.tridiagonal_solve(*state, right)
        solution = solution.reshape(vector[0].shape)
        return (solution.real, solution.imag), lx.RESULTS.successful, {}

    def transpose(self, state: Bands, options: dict[str, Any]):
        """The transpose in real and imaginary parts, which conjugates complex entries."""
        lower = jnp.roll(state.upper, 1).conj()
        upper = jnp.roll(state.lower, -1).conj()
        return Bands(lower, state.main.conj(), upper), options

    def conj(self, state: Bands, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self) -> bool:
        return True


def overlap(psi: Wave, other: Wave) -> Float[Array, ""]:
    """The probability of finding one wave in the other."""
    (a, b), (c, d) = psi, other
    return (a @ c + b @ d) ** 2 + (a @ d - b @ c) ** 2


FROM, TO = ground_state(START), ground_state(END)


class Method(NamedTuple):
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint
    controller: dfx.AbstractStepSizeController
    dt0: float | None


def solve(amplitudes, method: Method, saveat: dfx.SaveAt | None = None) -> dfx.Solution:
    return dfx.diffeqsolve(
        dfx.ODETerm(schroedinger),
        method.solver,
        0.0,
        DURATION,
        method.dt0,
        FROM,
        amplitudes,
        saveat=dfx.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=method.controller,
        adjoint=method.adjoint,
        max_steps=2**17,
    )


def lost(amplitudes, method: Method):
    """The probability of losing the atom; the norm and the number of steps."""
    sol = solve(amplitudes, method)
    assert sol.ys is not None
    re, im = (y[0] for y in sol.ys)
    norm = re @ re + im @ im
    return 1 - overlap((re, im), TO), (norm, sol.stats["num_steps"])


MIDPOINT = Method(
    dr.ImplicitMidpoint(linear_solver=Tridiagonal()),
    dr.ReversibleAdjoint(),
    dfx.ConstantStepSize(),
    DURATION / STEPS,
)
STORED = MIDPOINT._replace(adjoint=dfx.RecursiveCheckpointAdjoint())
PID = dfx.PIDController(rtol=1e-6, atol=1e-6)
EXPLICIT = Method(dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint(), PID, None)
CHORD = dfx.with_stepsize_controller_tols(dfx.VeryChord)(linear_solver=Tridiagonal())
DISSIPATIVE = EXPLICIT._replace(solver=dfx.Kvaerno5(root_finder=CHORD))


def gradient_of(method: Method):
    return jax.jit(jax.value_and_grad(lambda a: lost(a, method), has_aux=True))


def measure(
    name: str, method: Method, amplitudes, with_gradient: bool = True
) -> dict[str, Any]:
    """Measure a gradient, or only a solve.

    Time excludes compilation. Memory excludes inputs and outputs.
    """
    run = jax.jit(lambda a: lost(a, method))
    if with_gradient:
        run = gradient_of(method)
    memory: Any = run.lower(amplitudes).compile().memory_analysis()
    jax.block_until_ready(run(amplitudes))
    start = time.perf_counter()
    value, grad = jax.block_until_ready(run(amplitudes))
    seconds = time.perf_counter() - start
    (loss, (norm, steps)), grad = (value, grad) if with_gradient else ((value, grad), 0.0)
    row = dict(
        seconds=seconds,
        megabytes=memory.temp_size_in_bytes / 1e6,
        steps=int(steps),
        norm=abs(float(norm) - 1),
        loss=float(loss),
        grad=grad,
    )
    print(
        f"{name:40} {seconds:6.2f} s {row['megabytes']:7.2f} MB {row['steps']:6d} steps, "
        f"norm off by {row['norm']:.0e}, lost {row['loss']:.6f}"
    )
    return row


def optimise(amplitudes):
    """Find the path that loses least. Returns its amplitudes and the losses."""
    gradient = gradient_of(MIDPOINT)
    schedule = optax.cosine_decay_schedule(0.05, UPDATES)
    optimiser = optax.adam(schedule)
    state, losses = optimiser.init(amplitudes), []
    bar = tqdm.trange(UPDATES, desc="carrying the atom")
    for _ in bar:
        (loss, (norm, _)), grad = gradient(amplitudes)
        assert abs(norm - 1) < 1e-12
        losses.append(float(loss))
        bar.set_postfix(lost=f"{loss:.5f}")
        updates, state = optimiser.update(grad, state)
        amplitudes = optax.apply_updates(amplitudes, updates)
    return amplitudes, losses


def draw(before, after, losses, file: pathlib.Path) -> None:
    ts = jnp.linspace(0, DURATION, 200)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, amplitudes, title in zip(
        axes, (before, after), ("constant speed", "optimised"), strict=False
    ):
        ys = solve(amplitudes, MIDPOINT, dfx.SaveAt(ts=ts)).ys
        assert ys is not None
        re, im = ys
        density = (re**2 + im**2) / DX
        ax.pcolormesh(X, ts, density, cmap="magma", rasterized=True, vmax=1.2)
        centres = jax.vmap(lambda t, a=amplitudes: path(t, a))(ts)
        ax.plot(centres, ts, color="c", lw=1, label="beam")
        kept = overlap((re[-1], im[-1]), TO)
        ax.set(
            title=f"{title}: {100 * kept:.1f} % arrive", xlim=(-8, 10), xlabel="position"
        )
    axes[0].set_ylabel("time")
    axes[0].legend(loc="upper left")
    axes[2].semilogy(losses)
    axes[2].set(title="probability of losing the atom", xlabel="update")
    figure.savefig(file, dpi=100)


def main() -> None:
    before = jnp.zeros(8)
    after, losses = optimise(before)
    print(f"lost at constant speed: {losses[0]:.4f}, optimised: {losses[-1]:.6f}")
    draw(before, after, losses, pathlib.Path(__file__).with_suffix(".png"))

    ours = measure("ImplicitMidpoint, ReversibleAdjoint", MIDPOINT, after)
    default = measure("ImplicitMidpoint, default adjoint", STORED, after)
    off = jnp.linalg.norm(ours["grad"] - default["grad"])
    assert off < 1e-8 * jnp.linalg.norm(default["grad"])
    assert ours["norm"] < 1e-12
    if ALL:
        measure("Kvaerno5, default adjoint", DISSIPATIVE, after)
    if not QUICK:
        explicit = measure("Tsit5, default adjoint", EXPLICIT, after)
        dissipative = measure("Kvaerno5, solve only", DISSIPATIVE, after, False)
        # The steps are as accurate as those of `Tsit5`.
        assert abs(ours["loss"] - explicit["loss"]) < 1e-4
        assert min(explicit["norm"], dissipative["norm"]) > 1e6 * ours["norm"]
        assert ours["megabytes"] < 0.1 * explicit["megabytes"]
    assert losses[-1] < (0.8 if QUICK else 0.02) * losses[0]
    print("OK")


if __name__ == "__main__":
    main()
