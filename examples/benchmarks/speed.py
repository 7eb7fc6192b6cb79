"""Time, memory and compile time of gradients, for the same error of the gradient.

Six problems (`speed_problems.py`) are differentiated by the solvers of this package, and by
the methods that there are in Diffrax (`speed_methods.py`), in one process, in float64.

- Points: a dry run of every solver, with 4, 8, ... fixed steps and with tolerances of
  1e-2, 1e-3, ..., finds those of which gradients have errors around 1e-3, 1e-5 and 1e-7.
  Each of these is compiled by itself, with room for the next power of two of the steps
  that it takes, and of the restarts if they are more than eight, and timed. Errors between
  them are interpolated, others never extrapolated.
- Errors: Euclidean, of the gradient with respect to the initial state and all parameters,
  relative to that of `Dopri8` with a tolerance of 1e-13.
- Times: medians of `--repeats` runs of everything that is compiled for a problem, in turns,
  each round beginning with another. Each time the last of as many runs as fill 0.1 seconds
  counts, as in training, where one follows the other: the first ones also wake threads,
  which takes as long as some of these.
- Memory: temporary memory of the compiled gradient, by XLA. Compile times include tracing.
- Evaluations: accepted and rejected steps, times the evaluations of a step, in the forward
  pass, and in the mean over an ensemble.

"Memory-lean" rivals do not store every stage of every step. gradsolve does, and finds its
steps before it is timed; it is shown apart, as is `DirectAdjoint`. Where there are two of
a kind, steps fixed or adaptive, checkpoints by default or one for every step, the fastest
counts. `speed.md` has the tables, `speed.json` all of it.

    python speed.py                     # 50 minutes on two cores
    python speed.py --problem Kepler    # and others, one of them each
    python speed.py --quick             # checks, but no times to speak of; a minute
    python speed.py --repeats 30 --output folder
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import speed_growth
import speed_report
import tqdm
from speed_methods import (
    Bounds,
    BY_NAME,
    compile_gradient,
    distance,
    flatten,
    Gradient,
    gradsolve,
    make_loss,
    Method,
    METHODS,
    Setting,
)
from speed_problems import Problem, PROBLEMS, small_network, wave


jax.config.update("jax_enable_x64", True)

# Of dry runs. Longer ones are not tried.
ROOM = Bounds(max_steps=2**13, restarts=64)
PATIENCE = 2.0
# In seconds.
BUSY = 0.1
# From there on an error is worth a measurement.
USEFUL = 0.1
FIXED = tuple(2**k for k in range(2, 14))
TOLERANCES = tuple(10.0**-k for k in range(2, 13))
ERRORS = (1e-3, 1e-5, 1e-7)


class Candidate(NamedTuple):
    """Of a dry run."""

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


def dry_run(problem, method: Method, fixed: bool, exact: np.ndarray) -> list[Candidate]:
    """Compiled once for all settings, from the least work to that which is enough."""

    @jax.jit
    def gradient(value, y0, args):
        loss = make_loss(problem, method, Setting(fixed, value), ROOM, throw=False)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(y0, args)

    candidates = []
    for value in FIXED if fixed else TOLERANCES:
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
        if error < min(ERRORS) / 3 or seconds > PATIENCE:
            break
    return candidates


def choose(candidates: list[Candidate]) -> list[Candidate]:
    """At the most three, in order: the last with more than the largest error of interest,
    the first with less than the smallest, and one between."""
    useful = [c for c in candidates if c.error < USEFUL]
    above = [c for c in useful if c.error > max(ERRORS)][-1:]
    below = [c for c in useful if c.error <= min(ERRORS)][:1] or useful[-1:]
    between = [c for c in useful if c not in (*above, *below)]
    distance = lambda c: abs(np.log(c.error / ERRORS[1]))
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


def compile_point(
    problem: Problem, method: Method, candidate: Candidate, exact: np.ndarray
) -> tuple[dict[str, Any], Gradient | None]:
    """And run it once. Whatever it raises is its result."""
    setting, bounds = candidate.setting, candidate.bounds
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
    if not np.isfinite(row["error"]):
        row["status"] = "not finite"
        return row, None
    return row, gradient


def candidates_of(problem: Problem, exact: np.ndarray, methods) -> list:
    """What to measure, as pairs of a method and a candidate."""
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
                dry[name, fixed] = dry_run(problem, BY_NAME[name], fixed, exact)
            chosen = choose(dry[name, fixed])
        pairs += [(method, candidate) for candidate in chosen]
    return pairs


def time_last(run: Callable[[], Any]) -> float:
    """Seconds of the last of the runs that it takes to keep the machine busy."""
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        if end - begin > BUSY:
            return end - start


def measure(problem: Problem, repeats: int, methods=METHODS) -> list[dict[str, Any]]:
    exact = reference(problem)
    if gradsolve() is None:
        methods = [m for m in methods if m.solver is not None]
    rows, runs = [], []
    pairs = candidates_of(problem, exact, methods)
    for method, candidate in tqdm.tqdm(pairs, desc="compiling", leave=False):
        row, gradient = compile_point(problem, method, candidate, exact)
        rows.append(row)
        if gradient is not None:
            runs.append((row, gradient.run))
    for i in tqdm.trange(repeats, desc="rounds", leave=False):
        first = i * len(runs) // repeats
        for row, run in runs[first:] + runs[:first]:
            row["seconds"].append(time_last(run))
    jax.clear_caches()
    return rows


def quick() -> None:
    """Gradients agree with the reference, and memory does not grow with steps."""
    problems = {
        "small network": small_network(),
        "wave equation": wave((40, 24)),
    }
    settings = {
        "small network": (("ALF4", Setting(False, 1e-9)), ("Tsit5", Setting(False, 1e-9))),
        "wave equation": (("BlanesMoan6", Setting(True, 16)), ("ALF4", Setting(True, 128))),
    }
    for name, problem in problems.items():
        exact = reference(problem)
        for method, setting in settings[name]:
            candidate = Candidate(setting, np.nan, Bounds(256))
            row, _ = compile_point(problem, BY_NAME[method], candidate, exact)
            print(f"{name:16} {method:12} {setting}: error {row['error']:.1e}")
            assert row["error"] < 1e-5, row
    wave_problem = problems["wave equation"]
    pairs = [(name, n) for name in ("ALF4", "Tsit5") for n in (64, 4096)]
    memory = [
        compile_gradient(wave_problem, BY_NAME[name], Setting(True, n), Bounds(n)).memory
        for name, n in pairs
    ]
    print(f"memory [kB], 64 and 4096 steps: {np.divide(memory, 1000)}, ALF4 and Tsit5")
    # Two times for every step.
    assert memory[1] - memory[0] <= 16 * (4096 - 64) + 4096
    assert memory[3] > 2 * memory[2]


def environment() -> dict[str, Any]:
    packages = dict(jax=jax, diffrax=dfx, gradsolve=gradsolve())
    versions = {n: m.__version__ for n, m in packages.items() if m is not None}
    devices = [str(device.device_kind) for device in jax.devices()]
    machine = f"{platform.machine()}, {platform.system()}"
    versions["Python"] = platform.python_version()
    return dict(versions=versions, device_kinds=devices, machine=machine)


def main() -> None:
    folder = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--problem", choices=list(PROBLEMS), action="append")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, default=folder)
    options = parser.parse_args()
    if options.quick:
        quick()
        print("OK")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = dict(environment(), repeats=options.repeats, problems={})
    for name in tqdm.tqdm(options.problem or list(PROBLEMS), desc="problems"):
        rows = measure(PROBLEMS[name](), options.repeats)
        results["problems"][name] = rows
        # Not to be lost if what follows is cut off.
        (options.output / "speed.json").write_text(json.dumps(results, indent=1))
    if options.problem is None:
        results["memories"] = speed_growth.memories()
        results["growth"] = speed_growth.growth(options.repeats)
        results["checkpoints"] = speed_growth.checkpoints(options.repeats)
        results["devices"] = speed_growth.devices()
    (options.output / "speed.json").write_text(json.dumps(results, indent=1))
    summary, details = speed_report.summary(results), speed_report.details(results)
    print(summary)
    (options.output / "speed.md").write_text(f"{summary}\n{details}")
    speed_report.plot(results, options.output)
    print("OK")


if __name__ == "__main__":
    main()
