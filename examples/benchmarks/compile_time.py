"""How long a gradient takes to trace and compile, and to load in the next process.

A neural ODE of four entries with two hidden layers of width 16, saved at five times, with
adaptive steps; and Kepler's orbit for the symplectic solver. Every method runs in processes
of its own, twice. Both share a cache of compiled programs: the second finds there what the
first has compiled. JAX caches no program that can raise an error, so that errors give NaN
here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp

import diffrax_reversible as dr


jax.config.update("jax_enable_x64", True)

REVERSIBLE, DEFAULT = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
NETWORK = {
    "Tsit5": (dfx.Tsit5(), DEFAULT),
    "Dopri8": (dfx.Dopri8(), DEFAULT),
    "ALF4": (dr.ALF4(), REVERSIBLE),
    "ALF6": (dr.ALF6(), REVERSIBLE),
    "McCallumFoster(Tsit5())": (dr.McCallumFoster(dfx.Tsit5()), REVERSIBLE),
}
KEPLER = {
    "Tsit5, Kepler": (dfx.Tsit5(), DEFAULT),
    "BlanesMoan6, Kepler": (dr.BlanesMoan6(), REVERSIBLE),
}
QUICK = ("ALF4", "BlanesMoan6, Kepler")


def speed(t, p, args):
    return p


def force(t, q, args):
    return -args * q / jnp.sum(q**2) ** 1.5


def acceleration(t, y, args):
    q, p = y
    return p, force(t, q, args)


def problem(name: str):
    """The terms, the step, the initial state and the arguments."""
    if name in NETWORK:
        network = eqx.nn.MLP(4, 4, 16, 2, key=jax.random.key(0))
        return dfx.ODETerm(lambda t, y, f: f(y)), None, jnp.ones(4), network
    orbit = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    if name.startswith("Tsit5"):
        return dfx.ODETerm(acceleration), 0.01, orbit, jnp.array(1.0)
    terms = dfx.ODETerm(speed), dfx.ODETerm(force)
    return terms, 0.01, orbit, jnp.array(1.0)


def measure(name: str) -> None:
    """Print the seconds of tracing and compiling, and the first entry of the gradient."""
    terms, dt0, y0, args = problem(name)
    solver, adjoint = (NETWORK | KEPLER)[name]
    tolerances = dfx.PIDController(rtol=1e-4, atol=1e-6)
    controller = tolerances if dt0 is None else dfx.ConstantStepSize()

    def loss(inputs):
        y0, args = inputs
        sol = dfx.diffeqsolve(
            terms,
            solver,
            *(0.0, 1.0, dt0, y0, args),
            saveat=dfx.SaveAt(ts=jnp.linspace(0, 1, 5)),
            stepsize_controller=controller,
            adjoint=adjoint,
        )
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))

    # What JAX and Diffrax prepare only once is not measured.
    jax.jit(jax.grad(jnp.sin))(1.0)
    gradient: Any = eqx.filter_jit(eqx.filter_grad(loss))
    start = time.perf_counter()
    lowered = gradient.lower((y0, args))
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    leaf = jax.tree.leaves(compiled((y0, args)))[0]
    print(json.dumps((traced - start, end - traced, float(leaf.reshape(-1)[0]))))


def times(name: str, folder: str):
    cache = dict(JAX_COMPILATION_CACHE_DIR=folder, EQX_ON_ERROR="nan")
    command = [sys.executable, __file__, "--measure", name]
    environment = os.environ | cache
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    print("| gradient with | traced [s] | compiled [s] | both, next time [s] |")
    print("|---|---|---|---|")
    names = QUICK if "--quick" in sys.argv else (*NETWORK, *KEPLER)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            first, second = times(name, folder), times(name, folder)
        traced, compiled, gradient = first
        loaded = second[0] + second[1]
        print(f"| `{name}` | {traced:.1f} | {compiled:.1f} | {loaded:.1f} |", flush=True)
        assert gradient == second[2] and jnp.isfinite(gradient), (name, first, second)
        # The program was loaded, not compiled.
        assert second[1] < compiled / 2, (name, first, second)
    print("OK")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[-1])
    else:
        main()
