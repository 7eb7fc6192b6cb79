"""How time and memory of gradients grow, and times of a gradient on eight devices.

Run as a script, this prints the times on eight devices. Its process has to see eight.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from speed_methods import Bounds, BY_NAME, compile_gradient, make_loss, Method, Setting
from speed_problems import batched_network, mlp, mlp_params, Problem, sum_of_squares, wave


PAIR = "ALF4", "Tsit5"
DEVICES = 8


def _problem(field, y0, args, t1: float) -> Problem:
    return Problem(field, y0, args, t1, False, sum_of_squares)


def _pendulum(t, y, frequency):
    del t
    q, p = y
    return jnp.stack([p, -frequency * jnp.sin(q)])


def _chain(t, y, frequency):
    """Pendulums, each coupled to the next."""
    del t
    q, p = y
    return jnp.stack([p, jnp.roll(q, 1) - 2 * q + jnp.roll(q, -1) - frequency * jnp.sin(q)])


def _network(batch: int, width: int) -> Problem:
    y0 = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16)))
    return _problem(mlp, y0, mlp_params(16, width, width, 16), 1.0)


def deep_network() -> Problem:
    """A network of sixteen layers."""
    params = mlp_params(16, *15 * [64], 16)
    return _problem(mlp, jnp.zeros((4096, 16)), params, 1.0)


def _oscillation(steps: int) -> Problem:
    return _problem(_pendulum, jnp.array([1.0, 0.0]), jnp.array(1.0), 0.1 * steps)


def _pendulums(size: int) -> Problem:
    y0 = jnp.stack([jnp.sin(jnp.arange(size / 2)), jnp.zeros(size // 2)])
    return _problem(_chain, y0, jnp.array(1.0), 1.0)


def cases() -> list[tuple[str, int, Problem, int]]:
    """What grows, its value, the problem, and the number of steps."""
    steps = [("steps", n, _oscillation(n), n) for n in (10**k for k in range(2, 7))]
    sizes = [("state", n, _pendulums(n), 64) for n in (10**k for k in range(2, 7))]
    batches = [("batch", n, _network(n, 64), 64) for n in (1, 10, 100, 1000)]
    widths = [(n, _network(1, n)) for n in (16, 64, 256, 1024)]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(p.args)) for _, p in widths]
    params = [
        ("parameters", count, problem, 64)
        for count, (_, problem) in zip(counts, widths, strict=True)
    ]
    return [*steps, *sizes, *batches, *params]


def median_time(run: Callable[[], Any], repeats: int) -> float:
    """The median of `repeats` runs, or of a third if the first exceeds a second."""
    seconds, count = [], repeats
    run()
    while len(seconds) < count:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        count = repeats if seconds[0] <= 1 else max(1, repeats // 3)
    return float(np.median(seconds))


def growth(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for what, value, problem, steps in tqdm.tqdm(cases(), desc="growth", leave=False):
        row: dict[str, Any] = dict(what=what, value=value, steps=steps)
        for name in PAIR:
            # The longest solve takes minutes with `Tsit5`.
            if name != PAIR[0] and steps > 100_000:
                continue
            setting, bounds = Setting(True, steps), Bounds(steps)
            gradient = compile_gradient(problem, BY_NAME[name], setting, bounds)
            seconds = median_time(gradient.run, repeats)
            row[name] = dict(seconds=seconds, memory=gradient.memory)
        rows.append(row)
        jax.clear_caches()
    return rows


def checkpoints(repeats: int, steps: int = 128) -> list[dict[str, Any]]:
    """Time and memory of `Tsit5` on the batched network, by number of checkpoints."""
    problem, setting = batched_network(), Setting(True, steps)
    choices = (4, 8, None, 32, 64, steps)
    gradients = []
    for count in tqdm.tqdm(choices, desc="checkpoints", leave=False):
        adjoint = dfx.RecursiveCheckpointAdjoint(count)
        method = BY_NAME["Tsit5"]._replace(adjoint=lambda s, m, a=adjoint: a)
        gradients.append(compile_gradient(problem, method, setting, Bounds(steps)))
    return [
        dict(checkpoints=c, seconds=median_time(g.run, repeats), memory=g.memory)
        for c, g in zip(choices, gradients, strict=True)
    ]


def memory(problem: Problem, names: tuple[str, ...], steps) -> list[dict[str, Any]]:
    """The memory of gradients that are compiled but not run."""
    rows = []
    pairs = [(name, n) for name in names for n in steps]
    for name, n in tqdm.tqdm(pairs, desc="memory", leave=False):
        gradient = compile_gradient(problem, BY_NAME[name], Setting(True, n), Bounds(n))
        rows.append(dict(method=name, steps=n, memory=gradient.memory))
    return rows


def memories() -> dict[str, list[dict[str, Any]]]:
    names = "ALF4", "ALF6", "Tsit5", "Dopri8"
    heun = "ReversibleHeun", "ReversibleHeun, ReversibleAdjoint"
    every = *names, "Tsit5, all checkpoints"
    return {
        "batched network": memory(batched_network(), every, (16, 128, 1024, 8192)),
        "deep network": memory(deep_network(), names, (100,)),
        "wave equation": memory(wave(), (*names, "BlanesMoan4", *heun), (1000,)),
    }


def devices() -> dict[str, dict[str, float]]:
    """`measure_devices` in a process that sees eight devices."""
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    run = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def _runge_kutta(problem: Problem, steps: int) -> Callable:
    """The loss by the classical Runge–Kutta method in a `lax.scan`."""
    h = problem.t1 / steps

    def loss(y0, args):
        def step(y, _):
            f = lambda y: problem.field(0.0, y, args)
            k1 = f(y)
            k2 = f(y + h / 2 * k1)
            k3 = f(y + h / 2 * k2)
            k4 = f(y + h * k3)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return problem.loss(lax.scan(step, y0, None, steps)[0])

    return loss


def _reversible(problem: Problem, method: Method, steps: int) -> Callable:
    loss = make_loss(problem, method, Setting(True, steps), Bounds(steps), throw=False)
    return lambda y0, args: loss(y0, args)[0]


def measure_devices(repeats: int = 10) -> dict[str, dict[str, float]]:
    """Seconds for a batch on one device, and split between eight: by its sharding, and by
    `pmap`."""
    problem = _network(4096, 64)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    sharded = jax.device_put((problem.y0, problem.args), (split, everywhere))
    parts = problem.y0.reshape(DEVICES, -1, *problem.y0.shape[1:])
    losses = {
        "ALF4, ReversibleAdjoint": _reversible(problem, BY_NAME["ALF4"], 32),
        "Runge-Kutta 4 in a scan": _runge_kutta(problem, 40),
    }
    times = {}
    for name, loss in losses.items():
        gradient = jax.grad(loss, argnums=(0, 1))

        def of_a_part(y0, args, gradient=gradient):
            y_bar, args_bar = gradient(y0, args)
            return y_bar, lax.psum(args_bar, "batch")

        pmapped = jax.pmap(of_a_part, axis_name="batch", in_axes=(0, None))
        jitted = jax.jit(gradient)
        runs = {
            "one device": lambda f=jitted: f(problem.y0, problem.args),
            "eight, sharded": lambda f=jitted: f(*sharded),
            "eight, pmap": lambda f=pmapped: f(parts, problem.args),
        }
        times[name] = {
            kind: median_time(lambda run=run: jax.block_until_ready(run()), repeats)
            for kind, run in runs.items()
        }
    return times


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(measure_devices()))
