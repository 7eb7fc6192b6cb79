"""Train on two machines, or on any number of them, with data parallelism.

Every process holds a share of the batch, solves it with its own steps, and undoes these in
the backward pass. One reduction per update adds up the gradients. The communication is
JAX's: `jax.distributed` connects the processes, and `jax.shard_map` gives each of them its
share. The model is a neural ODE, which learns a damped pendulum from its motion.

On a cluster, run this on machine number k of n:

    python 09_two_machines.py --processes n --process k --coordinator host-of-machine-0:1234

Without arguments the script trains in one process, then in two processes on this machine,
and compares. It uses float64, so that rounding cannot hide a mistake. It asserts that the
two processes make one reduction per update, and that the losses agree to rounding: to 1e-12
over ten updates, and to 1e-6 over all.

Run `python examples/09_two_machines.py` after `pip install ".[examples]"`. It takes about a
minute on two cores, or half of that with `--quick`, which makes fewer updates. It writes
`09_two_machines.png`.
"""

import argparse
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

MEMBERS, UPDATES, PROCESSES = 128, 200, 2
TS = np.linspace(0, 5, 26)


class Training(NamedTuple):
    """The result of a training.

    - `reductions`: the number of all-reduces per update.
    - `milliseconds`: the median time per update.
    """

    losses: list[float]
    reductions: int
    milliseconds: float


def solve(field, y0: Float[Array, "2"], args, solver, adjoint) -> Float[Array, "times 2"]:
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        TS[0],
        TS[-1],
        None,
        y0,
        args,
        saveat=dfx.SaveAt(ts=jnp.asarray(TS)),
        stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
        adjoint=adjoint,
    )
    assert sol.ys is not None
    return sol.ys


def pendulum(t, y, args):
    del t, args
    angle, velocity = y
    return jnp.stack([velocity, -jnp.sin(angle) - 0.3 * velocity])


def data() -> tuple[Float[np.ndarray, "members 2"], Float[np.ndarray, "members times 2"]]:
    """Initial states, and the motions from there."""
    y0s = np.random.default_rng(0).uniform(-2, 2, (MEMBERS, 2))
    adjoint = dfx.RecursiveCheckpointAdjoint()
    run = lambda y0: solve(pendulum, y0, None, dfx.Tsit5(), adjoint)
    return y0s, np.asarray(jax.jit(jax.vmap(run))(y0s))


def batch_loss(network: eqx.nn.MLP, y0s, targets):
    def one(y0):
        field = lambda t, y, network: network(y)
        return solve(field, y0, network, dr.ALF4(), dr.ReversibleAdjoint())

    return jnp.mean((jax.vmap(one)(y0s) - targets) ** 2)


def compile_update(mesh: Mesh, static, optimiser: optax.GradientTransformation, *args):
    """Compile an update that all processes make together."""

    def update(params, state, y0s, targets):
        def loss(params):
            return batch_loss(eqx.combine(params, static), y0s, targets)

        share = jax.value_and_grad(loss)(params)
        # One array needs only one reduction.
        flat, unravel = jax.flatten_util.ravel_pytree(share)
        value, gradient = unravel(jax.lax.pmean(flat, "batch"))
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    specs = P(), P(), P("batch"), P("batch")
    # Diffrax's loop does not pass JAX's check of values that vary between devices.
    sharded = jax.shard_map(
        update, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
    )
    return jax.jit(sharded).lower(*args).compile()


def train(updates: int) -> Training:
    """Train in all connected processes, each with its share of the data."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    # Every process could read its own files here.
    share = slice(jax.process_index(), None, jax.process_count())
    y0s, targets = (x[share] for x in data())
    network = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_array)
    optimiser = optax.adam(1e-2)
    put = jax.make_array_from_process_local_data
    split, everywhere = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    params, state = jax.tree.map(
        lambda x: put(everywhere, np.asarray(x)), (params, optimiser.init(params))
    )
    y0s, targets = put(split, y0s), put(split, targets)
    update = compile_update(mesh, static, optimiser, params, state, y0s, targets)
    text = update.as_text()
    assert text is not None
    reductions = len(re.findall(r" all-reduce(?:-start)?\(", text))

    losses, times = [], []
    silent = jax.process_index() > 0
    title = f"{jax.process_count()} process(es)"
    for _ in tqdm.trange(updates, desc=title, disable=silent):
        start = time.perf_counter()
        params, state, value = update(params, state, y0s, targets)
        losses.append(float(value))
        times.append(1e3 * (time.perf_counter() - start))
    return Training(losses, reductions, float(np.median(times)))


def train_in_processes(count: int, updates: int) -> Training:
    """Start a process for each share, as a cluster does on its machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        common = ["--processes", count, "--coordinator", coordinator]
        common += ["--updates", updates, "--result", result]
        processes = []
        for i in range(count):
            command = [sys.executable, __file__, *common, "--process", i]
            processes.append(subprocess.Popen([str(x) for x in command]))
        codes = [process.wait() for process in processes]
        assert codes == [0] * count, codes
        return Training(*json.loads(result.read_text()))


def be_a_process(options) -> None:
    jax.distributed.initialize(options.coordinator, options.processes, options.process)
    training = train(options.updates)
    if options.process == 0:
        print(f"final loss {training.losses[-1]:.3e}")
        if options.result is not None:
            options.result.write_text(json.dumps(training))


def plot(alone: Training, together: Training, path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.semilogy(alone.losses, color="C1", linewidth=6, alpha=0.5)
    axes.semilogy(together.losses, color="C0", linewidth=1.5)
    middle = len(alone.losses) // 2
    axes.annotate(
        "one process",
        (middle, alone.losses[middle]),
        (middle * 1.1, alone.losses[middle] * 4),
        color="C1",
        arrowprops=dict(arrowstyle="-", color="C1"),
    )
    axes.annotate(
        "two processes,\neach with half of the batch",
        (middle, together.losses[middle]),
        (middle * 0.2, together.losses[-1] * 1.5),
        color="C0",
        arrowprops=dict(arrowstyle="-", color="C0"),
    )
    off = np.max(np.abs(np.divide(together.losses, alone.losses) - 1))
    axes.set(xlabel="update", ylabel="loss")
    title = f"Two processes on one machine train as one: losses agree to {off:.0e}"
    axes.set_title(title, loc="left")
    figure.savefig(path, dpi=100)


def compare(updates: int) -> None:
    alone = train(updates)
    together = train_in_processes(PROCESSES, updates)
    print(f"\n{'':16}first loss    last loss   reductions   update [ms]")
    for name, training in (("one process", alone), ("two processes", together)):
        losses = f"{training.losses[0]:14.6e}{training.losses[-1]:13.6e}"
        print(f"{name:14}{losses}{training.reductions:13}{training.milliseconds:14.1f}")

    path = pathlib.Path(__file__).with_suffix(".png")
    plot(alone, together, path)
    print(f"\nplotted in {path.name}")
    assert together.reductions == 1, together.reductions
    # Sums over the batch run in another order, and every update adds to the difference.
    np.testing.assert_allclose(together.losses[:10], alone.losses[:10], rtol=1e-12)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-6)
    assert alone.losses[-1] < 0.2 * alone.losses[0], alone.losses
    print("OK")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="makes fewer updates")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--result", type=pathlib.Path, help="where to write the losses")
    options = parser.parse_args()
    if options.process is not None:
        be_a_process(options)
    else:
        compare(30 if options.quick else options.updates)


if __name__ == "__main__":
    main()
