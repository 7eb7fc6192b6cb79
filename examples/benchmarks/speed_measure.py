"""Dry runs, compiled points and times, for `speed.py` and `speed_accelerator.py`."""

import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from speed_methods import (
    Bounds,
    BY_NAME,
    compile_gradient,
    distance,
    ERRORS,
    flatten,
    Gradient,
    make_loss,
    Method,
    Setting,
)
from speed_problems import Problem


# The room of a dry run, and the seconds after which no longer ones are tried.
ROOM = Bounds(max_steps=2**13, restarts=64)
PATIENCE = 2.0
# The seconds for which runs are repeated, see `time_last`.
BUSY = 0.1
# Only errors below this are worth a measurement.
USEFUL = 0.1
FIXED = tuple(2**k for k in range(2, 14))
TOLERANCES = tuple(10.0**-k for k in range(2, 13))


class Candidate(NamedTuple):
    """A setting, with the error and the bounds found by its dry run."""

    setting: Setting
    error: float
    bounds: Bounds


def next_power_of_two(n: Any) -> int:
    return 1 << (int(n) - 1).bit_length()


def reference(problem: Problem) -> np.ndarray:
    setting, bounds = Setting(False, 1e-13), ROOM
    if problem.steps is not None:
        steps = 2 * max(problem.steps["Dopri8, all checkpoints"])
        setting, bounds = Setting(True, steps), Bounds(steps)
    run = compile_gradient(problem, BY_NAME["Dopri8"], setting, bounds).run
    return flatten(run()[0])


def dry_run(
    problem: Problem, method: Method, fixed: bool, exact: np.ndarray, errors=ERRORS
) -> list[Candidate]:
    """One candidate per setting, from the least work until errors are small enough. All
    settings share one compilation."""
    # With a smaller tolerance, steps would only be rejected.
    least = 4 * float(jnp.finfo(jnp.result_type(float)).eps)
    settings = FIXED if fixed else [tol for tol in TOLERANCES if tol > least]

    @jax.jit
    def gradient(value, y0, args):
        loss = make_loss(problem, method, Setting(fixed, value), ROOM, throw=False)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(y0, args)

    candidates = []
    for value in settings:
        inputs = jnp.asarray(float(value)), problem.y0, problem.args
        if not candidates:
            jax.block_until_ready(gradient(*inputs))
        start = time.perf_counter()
        grad, stats = jax.block_until_ready(gradient(*inputs))
        seconds = time.perf_counter() - start
        error = distance(flatten(grad), exact)
        steps, restarts = next_power_of_two(stats.steps), next_power_of_two(stats.restarts)
        bounds = Bounds(steps, max(Bounds(steps).restarts, restarts))
        candidates.append(Candidate(Setting(fixed, value), error, bounds))
        if error < min(errors) / 3 or seconds > PATIENCE:
            break
    return candidates


def choose(candidates: list[Candidate], errors=ERRORS) -> list[Candidate]:
    """At most three candidates, in order: the last above the largest error of interest, the
    first below the smallest, and one between."""
    useful = [c for c in candidates if c.error < USEFUL]
    above = [c for c in useful if c.error > max(errors)][-1:]
    below = [c for c in useful if c.error <= min(errors)][:1] or useful[-1:]
    between = [c for c in useful if c not in (*above, *below)]
    distance = lambda c: abs(np.log(c.error / errors[len(errors) // 2]))
    chosen = {*above, *below, *sorted(between, key=distance)[:1]}
    return [c for c in candidates if c in chosen]


def point(method: Method, setting: Setting, **kwargs) -> dict[str, Any]:
    """A row of the results."""
    return dict(
        method=method.name,
        group=method.group,
        fixed=setting.fixed,
        setting=str(setting),
        status="measured",
        seconds=[],
        **kwargs,
    )


def peak_memory() -> int | None:
    """The most bytes that the process has held on its device, if the device reports it."""
    (device,) = jnp.zeros(()).devices()
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def compile_point(
    problem: Problem, method: Method, candidate: Candidate, exact: np.ndarray
) -> tuple[dict[str, Any], Gradient | None]:
    """Compile a point and run it once. An error becomes its status."""
    setting, bounds = candidate.setting, candidate.bounds
    before = peak_memory()
    row = point(method, setting, **bounds._asdict())
    try:
        gradient = compile_gradient(problem, method, setting, bounds)
        grad, stats = gradient.run()
    except Exception as e:
        lines = [line for line in str(e).splitlines() if "Error: " in line]
        row["status"] = (lines or [f"{type(e).__name__}: {e}"])[-1].split("Error: ")[-1]
        return row, None
    row["error"] = distance(flatten(grad), exact)
    row["compile_time"], row["memory"] = gradient.compile_time, gradient.memory
    row["steps"], row["restarts"] = int(stats.steps), int(stats.restarts)
    row["evaluations"] = float(stats.evaluations)
    peak = peak_memory()
    row["peak"] = peak if peak != before else None
    if not np.isfinite(row["error"]):
        row["status"] = "not finite"
        return row, None
    return row, gradient


def candidates_of(problem: Problem, exact: np.ndarray, methods, errors=ERRORS) -> list:
    """The points to measure, as pairs of a method and a candidate."""
    dry, pairs = {}, []
    kinds = [(m, fixed) for m in methods for fixed in (True, False)]
    for method, fixed in tqdm.tqdm(kinds, desc="dry runs", leave=False):
        if not method.serves(problem, fixed):
            continue
        if problem.steps is not None:
            steps = problem.steps[method.name]
            chosen = [Candidate(Setting(True, n), np.nan, Bounds(n)) for n in steps]
        else:
            name = method.dry or method.name
            if (name, fixed) not in dry:
                dry[name, fixed] = dry_run(problem, BY_NAME[name], fixed, exact, errors)
            chosen = choose(dry[name, fixed], errors)
        pairs += [(method, candidate) for candidate in chosen]
    return pairs


def time_last(run: Callable[[], Any]) -> float:
    """The seconds of the last of as many runs as fill `BUSY` seconds."""
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        if end - begin > BUSY:
            return end - start


def measure(
    problem: Problem, exact: np.ndarray, repeats: int, methods, errors=ERRORS
) -> list[tuple[dict[str, Any], Gradient | None]]:
    """The row of every point, and its gradient unless that failed."""
    points = []
    pairs = candidates_of(problem, exact, methods, errors)
    for method, candidate in tqdm.tqdm(pairs, desc="compiling", leave=False):
        points.append(compile_point(problem, method, candidate, exact))
    runs = [(row, gradient.run) for row, gradient in points if gradient is not None]
    for i in tqdm.trange(repeats, desc="rounds", leave=False):
        first = i * len(runs) // repeats
        for row, run in runs[first:] + runs[:first]:
            row["seconds"].append(time_last(run))
    return points


def environment(device: Any, **packages: Any) -> dict[str, Any]:
    """The versions of JAX, Diffrax and `packages`, and the devices."""
    packages = dict(jax=jax, diffrax=dfx, **packages)
    versions = {n: m.__version__ for n, m in packages.items() if m is not None}
    versions["Python"] = platform.python_version()
    kinds = [str(d.device_kind) for d in jax.devices(device.platform)]
    machine = f"{platform.machine()}, {platform.system()}"
    return dict(versions=versions, device_kinds=kinds, machine=machine)
