"""Gradients of batches by `jax.vmap`, which share the parameters of a network.

    python examples/benchmarks/batches.py [--quick]

For networks of three layers and batches of several sizes, in single precision and with
adaptive steps: the time and the memory of the gradient of a mean loss with `ALF4` and
`ReversibleAdjoint`, beside `Tsit5` and the default adjoint. Both gradients are compared
with one at much smaller tolerances. Prints the tables of `README.md`.
"""

import argparse
import statistics
import time

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tqdm

import diffrax_reversible as dr


STATE, T = 4, 4.0
SOLVERS = {
    "ALF4": (dr.ALF4(), dr.ReversibleAdjoint()),
    "Tsit5": (dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint()),
}
# (width, members)
SIZES = ((32, 32), (32, 512), (128, 32), (128, 512), (512, 128))


def make_loss(network, batch, name: str, tol: float):
    solver, adjoint = SOLVERS[name]
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def final(params, y0):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, params: eqx.combine(params, static)(y)),
            solver,
            *(0.0, T, 0.1, y0, params),
            stepsize_controller=dfx.PIDController(rtol=tol, atol=tol),
            adjoint=adjoint,
            max_steps=4096,
        )
        assert sol.ys is not None
        return sol.ys[0]

    def loss(params):
        return jnp.mean(jax.vmap(final, (None, 0))(params, batch) ** 2)

    return params, loss


def as_vector(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def measure(width: int, members: int, repeats: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds, megabytes, and the relative error of a gradient, by solver."""
    network = eqx.nn.MLP(STATE, STATE, width, 3, jnp.tanh, key=jr.key(0))
    batch = jr.normal(jr.key(1), (members, STATE))
    compiled, times = {}, {name: [] for name in SOLVERS}
    params, loss = make_loss(network, batch, "Tsit5", 1e-6)
    exact = as_vector(jax.jit(jax.grad(loss))(params))
    for name in SOLVERS:
        _, loss = make_loss(network, batch, name, 1e-3)
        compiled[name] = jax.jit(jax.grad(loss)).lower(params).compile()
    for _ in range(repeats):
        for name, gradient in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(params))
            times[name].append(time.perf_counter() - start)
    results = {}
    for name, gradient in compiled.items():
        error = np.linalg.norm(as_vector(gradient(params)) - exact) / np.linalg.norm(exact)
        megabytes = gradient.memory_analysis().temp_size_in_bytes / 1e6
        results[name] = (1e3 * statistics.median(times[name]), megabytes, error)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    sizes = SIZES[:1] if quick else SIZES
    rows = []
    for width, members in tqdm.tqdm(sizes):
        results = measure(width, members, 3 if quick else 15)
        (ms, mb, error), (other_ms, other_mb, other_error) = results.values()
        assert error < 3 * max(other_error, 1e-3), (width, members, error, other_error)
        rows.append(
            f"| {width} | {members} | {ms:.3g} | {other_ms:.3g} | {ms / other_ms:.2f} "
            f"| {mb:.3g} | {other_mb:.3g} | {mb / other_mb:.3f} "
            f"| {error:.0e}, {other_error:.0e} |"
        )
    names = tuple(SOLVERS)
    heads = [f"{name} [{unit}]" for unit in ("ms", "MB") for name in names]
    print(f"| width | members | {heads[0]} | {heads[1]} | ratio ", end="")
    print(f"| {heads[2]} | {heads[3]} | ratio | errors |")
    print("|--:" * 9 + "|", *rows, sep="\n")
    print("OK")


if __name__ == "__main__":
    main()
