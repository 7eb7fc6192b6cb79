"""How an option of XLA shortens gradients of problems with a few entries, on a CPU.

On a CPU, XLA compiles a loop as one function if an iteration accesses little memory, up to
a kilobyte. The operations of other loops are called one by one, and each call takes longer
than the arithmetic of a few entries. This option raises the limit. As it is no option of
`jax.jit`, it is set in `XLA_FLAGS` before JAX is imported, for the whole process:

    --xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1048576

Every gradient is timed in processes of its own: with the default limit, and with limits of
64 kB and 1 MB.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import diffrax_reversible as dr


jax.config.update("jax_enable_x64", True)

OPTION = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold={}"
LIMITS = {"default": None, "64 kB": 2**16, "1 MB": 2**20}
REVERSIBLE, DEFAULT = dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint()
METHODS = {
    "ALF4": (dr.ALF4(), REVERSIBLE),
    "ALF6": (dr.ALF6(), REVERSIBLE),
    "Tsit5": (dfx.Tsit5(), DEFAULT),
    "Dopri8": (dfx.Dopri8(), DEFAULT),
}
RUNS = 25


def lorenz(t, y, rate):
    x, y, z = y
    return jnp.stack([rate * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def kepler(t, y, mass):
    q, p = jnp.split(y, 2)
    return jnp.concatenate([p, -mass * q / jnp.sum(q**2) ** 1.5])


NETWORK = eqx.nn.MLP(4, 4, 32, 2, jnp.tanh, key=jax.random.key(0))
# The vector field, the initial state, the arguments, and the end time.
PROBLEMS = {
    "Lorenz": (lorenz, jnp.ones(3), jnp.array(10.0), 20.0),
    "Kepler": (kepler, jnp.array([0.4, 0.0, 0.0, 2.0]), jnp.array(1.0), 40.0),
    "network": (lambda t, y, f: f(y), jnp.ones(4), NETWORK, 10.0),
}


def measure(problem: str, method: str) -> None:
    """Print the median time in ms, the compile time in s, and the gradient."""
    field, y0, args, t1 = PROBLEMS[problem]
    solver, adjoint = METHODS[method]

    def loss(inputs):
        y0, args = inputs
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            *(0.0, t1, None, y0, args),
            stepsize_controller=dfx.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=adjoint,
        )
        return jnp.sum(sol.ys**2)  # pyright: ignore[reportOptionalOperand]

    gradient: Any = eqx.filter_jit(eqx.filter_grad(loss))
    start = time.perf_counter()
    compiled = gradient.lower((y0, args)).compile()
    compile_time, times = time.perf_counter() - start, []
    grad = compiled((y0, args))
    for _ in range(RUNS):
        start = time.perf_counter()
        grad = jax.block_until_ready(compiled((y0, args)))
        times.append(time.perf_counter() - start)
    entries = ravel_pytree(eqx.filter(grad, eqx.is_array))[0].tolist()
    print(json.dumps((1e3 * statistics.median(times), compile_time, entries)))


def run(problem: str, method: str, limit: int | None) -> tuple[float, float, list[float]]:
    flags = os.environ.get("XLA_FLAGS", "")
    if limit is not None:
        flags += " " + OPTION.format(limit)
    command = [sys.executable, __file__, "--measure", problem, method]
    environment = os.environ | {"XLA_FLAGS": flags}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    quick = "--quick" in sys.argv
    problems, methods = (("Kepler",), ("ALF6",)) if quick else (PROBLEMS, METHODS)
    columns = [f"{name} [ms]" for name in LIMITS]
    header = ["problem", "gradient with", *columns, "traced and compiled [s]"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for problem in problems:
        for method in methods:
            measured = [run(problem, method, limit) for limit in LIMITS.values()]
            times, compiled, (expected, *gradients) = zip(*measured, strict=True)
            row = [problem, f"`{method}`", *(f"{t:.2f}" for t in times)]
            row.append(", ".join(f"{c:.1f}" for c in compiled))
            print("| " + " | ".join(row) + " |", flush=True)
            for gradient in gradients:
                error = np.linalg.norm(np.subtract(gradient, expected))
                error /= np.linalg.norm(expected)
                # Only rounding may differ.
                assert error < 1e-6, (problem, method, error)
    print("OK")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(*sys.argv[-2:])
    else:
        main()
