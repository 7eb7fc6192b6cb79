"""The suite of `speed.py --device gpu`: problems that keep an accelerator busy.

Two networks are measured in float32, as in training, and three simulations in float32 and
in float64: an ensemble whose members take their own adaptive steps, a large state with a
cheap vector field, and all pairs of many atoms. Initial values and parameters are rounded
to float32, so that both precisions solve the same problem and share a reference in float64.

Points are found, compiled and timed as on the CPU. The results add

- `peak`: the most memory that the process has held on the device, in bytes. It never falls,
    so it is given only where the first run of a point raised it. CPUs do not report it.
- `kernels` and `synchronisations` of one gradient, by `speed_launches.py`, on GPUs only.

Products of float32 matrices have JAX's default precision for the device, which
`JAX_DEFAULT_MATMUL_PRECISION=highest` raises.
"""

import gc
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import speed_launches
import speed_report
import tqdm
from speed_measure import environment, measure, reference
from speed_methods import BY_NAME, ERRORS
from speed_problems import batched_network, lennard_jones, lorenz, Problem, wave


METHODS = (
    "ALF4",
    "ALF6",
    "BlanesMoan4",
    "BlanesMoan6",
    "Tsit5",
    "Dopri8",
    "Tsit5, all checkpoints",
    "Dopri8, all checkpoints",
)
SIMULATION = "float64", "float32"
TRAINING = ("float32",)
ERRORS_IN = {"float32": (1e-2, 1e-3, 1e-4), "float64": ERRORS}
# For `quick`: the errors that tolerances aim at, and bounds on errors with fixed steps.
QUICK_ERRORS = {"float32": (2e-2,), "float64": (2e-2,)}
BOUNDS = {"float32": 3e-4, "float64": 1e-5}


class Case(NamedTuple):
    make: Callable[[], Problem]
    precisions: tuple[str, ...]
    methods: tuple[str, ...] = METHODS


def _lorenz(members: int) -> Problem:
    """The ensemble with adaptive steps only."""
    return lorenz(members)._replace(fixed=False)


def _wave() -> Problem:
    """The wave equation with 1e7 unknowns."""
    problem = wave((2500, 2000))
    assert problem.steps is not None
    steps = dict(problem.steps, Tsit5=(8, 16, 48), Dopri8=(4, 8, 12))
    return problem._replace(steps=steps)


CASES = {
    "batched network": Case(batched_network, TRAINING),
    "wide network": Case(lambda: batched_network(1024, (64, 512, 512, 512, 64)), TRAINING),
    "Lorenz ensemble": Case(lambda: _lorenz(100_000), SIMULATION),
    "wave equation": Case(_wave, SIMULATION),
    # 2,048 atoms.
    "Lennard-Jones": Case(lambda: lennard_jones(8, periodic=True), SIMULATION),
}


def _few(problem: Problem, steps: int, *methods: str) -> Problem:
    """The problem with `steps` fixed steps only, which the reference takes as well."""
    counts = {name: (steps,) for name in methods}
    return problem._replace(steps={"Dopri8, all checkpoints": (steps // 2,), **counts})


def _tiny(
    make: Callable[[], Problem], steps: int, precisions: tuple[str, ...], *methods: str
) -> Case:
    return Case(lambda: _few(make(), steps, *methods), precisions, methods)


# Every problem at a tiny size. Together they cover each kind of method and each precision.
TINY = {
    "batched network": _tiny(
        lambda: batched_network(4, (4, 8, 8, 4)), 64, TRAINING, "Tsit5, all checkpoints"
    ),
    "wide network": _tiny(
        lambda: batched_network(8, (4, 16, 16, 16, 4)), 64, TRAINING, "ALF4", "Tsit5"
    ),
    "Lorenz ensemble": Case(lambda: _lorenz(8), TRAINING, ("ALF4",)),
    "wave equation": _tiny(lambda: wave((25, 20)), 32, ("float64",), "BlanesMoan6"),
    "Lennard-Jones": _tiny(
        lambda: lennard_jones(2, periodic=True), 64, TRAINING, "BlanesMoan6"
    ),
}


def cast(problem: Problem, dtype: str) -> Problem:
    y0, args, ts = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), (problem.y0, problem.args, problem.ts)
    )
    return problem._replace(y0=y0, args=args, ts=ts)


def _double(on: bool) -> None:
    """Switch 64 bits on or off. In float32, times and integers have 32 bits as well."""
    jax.config.update("jax_enable_x64", on)


def measure_case(case: Case, repeats: int, errors) -> dict[str, list[dict[str, Any]]]:
    """The rows of a problem, by precision."""
    _double(True)
    problem = cast(cast(case.make(), "float32"), "float64")
    exact = reference(problem)
    methods = [BY_NAME[name] for name in case.methods]
    results = {}
    for precision in case.precisions:
        _double(True)
        at_precision = cast(problem, precision)
        _double(precision == "float64")
        points = measure(at_precision, exact, repeats, methods, errors[precision])
        for row, gradient in points:
            if gradient is not None:
                row |= speed_launches.launches(gradient.run)._asdict()
        results[precision] = [row for row, _ in points]
        jax.clear_caches()
    _double(True)
    return results


def _per_step(row: dict[str, Any], what: str) -> float:
    return np.nan if row[what] is None else row[what] / row["steps"]


def _peak(row: dict[str, Any]) -> float:
    return np.nan if row["peak"] is None else row["peak"] / 1e6


COLUMNS = {
    "peak [MB]": _peak,
    "kernels per step": lambda row: _per_step(row, "kernels"),
    "synchronisations per step": lambda row: _per_step(row, "synchronisations"),
}


def report(results: dict[str, Any], by_precision) -> str:
    """Tables at the errors of each precision."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    precision_of_products = results["matmul_precision"] or "default"
    parts = [
        f"{results['device_kind']} ({results['machine']}), {versions}; medians of "
        f"{results['repeats']} runs; products of matrices with precision "
        f"`{precision_of_products}`.\n"
    ]
    for precision, errors in by_precision.items():
        problems = {
            name: rows[precision]
            for name, rows in results["problems"].items()
            if precision in rows
        }
        if problems:
            overview = speed_report.overview(problems, errors)
            parts += [f"## Fastest, {precision}\n", overview]
        for name, rows in problems.items():
            title = f"## {name}, {precision}"
            parts += [f"{title}, at equal errors of the gradient\n"]
            parts += [speed_report.equal_errors(rows, errors)]
            parts += [f"{title}, every point\n", speed_report.points(rows, COLUMNS)]
    return "\n".join(parts)


def start(device: Any, repeats: int) -> dict[str, Any]:
    return dict(
        environment(device),
        device_kind=device.device_kind,
        matmul_precision=jax.config.values["jax_default_matmul_precision"],
        repeats=repeats,
        problems={},
    )


def run(names: list[str], device: Any, repeats: int, output: pathlib.Path) -> None:
    """Measure the problems and write `speed_gpu.md` and `speed_gpu.json`."""
    results = start(device, repeats)
    for name in tqdm.tqdm(names, desc="problems"):
        results["problems"][name] = measure_case(CASES[name], repeats, ERRORS_IN)
        # Save now, in case a later measurement is cut off.
        (output / "speed_gpu.json").write_text(json.dumps(results, indent=1))
    text = report(results, ERRORS_IN)
    print(text)
    (output / "speed_gpu.md").write_text(text)


def quick(names: list[str], device: Any) -> None:
    """Run the suite at tiny sizes with few methods, and check that gradients are right."""
    speed_launches.check()
    # Both take more time than they save here.
    jax.config.update("jax_disable_most_optimizations", True)
    gc.disable()
    results = start(device, 1)
    for name in names:
        results["problems"][name] = measure_case(TINY[name], 1, QUICK_ERRORS)
    print(report(results, QUICK_ERRORS))
    for name, by_precision in results["problems"].items():
        for precision, rows in by_precision.items():
            assert all(row["status"] == "measured" for row in rows), rows
            for method in TINY[name].methods:
                of_method = [row for row in rows if row["method"] == method]
                least = min(of_method, key=lambda row: row["error"])
                bounds = BOUNDS[precision], max(QUICK_ERRORS[precision])
                assert least["error"] < bounds[not least["fixed"]], (name, least)
