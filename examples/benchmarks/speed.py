"""Time, memory and compile time of gradients, at equal errors of the gradient.

The solvers of this package and the methods available in Diffrax (`speed_methods.py`)
differentiate six problems (`speed_problems.py`), in one process, in float64.

- Points: a dry run of every solver, with 4, 8, ... fixed steps and with tolerances of
  1e-2, 1e-3, ..., finds the settings whose gradients have errors around 1e-3, 1e-5 and
  1e-7. Each of these is compiled separately and timed. It has room for its number of steps,
  rounded up to a power of two, and for its restarts in the same way, or as usual. Values
  are interpolated between measured errors, and never extrapolated.
- Errors: Euclidean, of the gradient with respect to the initial state and all parameters,
  relative to that of `Dopri8` with a tolerance of 1e-13.
- Times: medians of `--repeats` rounds. A round runs everything that is compiled for a
  problem in turn, and each round begins elsewhere. The time is that of the last of as many
  runs as fill 0.1 seconds, as in training, where runs follow each other: the first ones
  also wake threads, which can take as long as the run itself.
- Memory: temporary memory of the compiled gradient, by XLA. Compile times include tracing.
- Evaluations: accepted and rejected steps, times the evaluations per step, in the forward
  pass; for an ensemble, the mean.

"Memory-lean" rivals do not store every stage of every step. gradsolve does, and finds its
steps before it is timed. It is listed separately, as is `DirectAdjoint`. Where a method has
two variants (steps fixed or adaptive, checkpoints by default or one for every step), the
fastest counts. `speed.md` has the tables, `speed.json` all results.

`--device gpu` measures larger problems on an accelerator, in float32 and in float64
(`speed_accelerator.py`), and writes `speed_gpu.md` and `speed_gpu.json`. With `--quick` it
needs no accelerator: the same code runs on any device, at tiny sizes, and checks that
gradients are right.

    python speed.py                         # 50 minutes on two cores
    python speed.py --problem Kepler        # can be repeated for several problems
    python speed.py --quick                 # checks without meaningful times; a minute
    python speed.py --repeats 30 --output folder
    python speed.py --device gpu            # --problem, --repeats and --output as well
    python speed.py --device gpu --quick    # under 90 seconds on two cores
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np
import speed_accelerator
import speed_growth
import speed_report
import tqdm
from speed_measure import Candidate, compile_point, environment, measure, reference
from speed_methods import Bounds, BY_NAME, compile_gradient, gradsolve, METHODS, Setting
from speed_problems import PROBLEMS, small_network, wave


jax.config.update("jax_enable_x64", True)


def quick() -> None:
    """Check that gradients agree with the reference and memory does not grow with steps."""
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
    # At most two times are recorded per step.
    assert memory[1] - memory[0] <= 16 * (4096 - 64) + 4096
    assert memory[3] > 2 * memory[2]


def choose_device(platform: str, quick: bool) -> Any:
    """Make the first device of the platform, or for `quick` any, the default."""
    try:
        device = jax.devices(platform)[0]
    except RuntimeError as error:
        if not quick:
            raise SystemExit(
                f"`speed.py --device {platform}` found no such device: {error}\n"
                'Install JAX for your accelerator, as by `pip install "jax[cuda13]"` (see '
                "https://docs.jax.dev), until `jax.devices('gpu')` lists it. To check the "
                "same code at tiny sizes, on any device, add `--quick`."
            ) from error
        device = jax.devices()[0]
    jax.config.update("jax_default_device", device)
    print(f"device: {device.device_kind}")
    return device


def run(names: list[str], device: Any, repeats: int, output: pathlib.Path) -> None:
    """Measure the problems, and growth too if they are all, and write the results."""
    everything = len(names) == len(PROBLEMS)
    packages = dict(gradsolve=gradsolve())
    methods = [m for m in METHODS if m.solver is not None or packages["gradsolve"]]
    results = dict(environment(device, **packages), repeats=repeats, problems={})
    for name in tqdm.tqdm(names, desc="problems"):
        problem = PROBLEMS[name]()
        points = measure(problem, reference(problem), repeats, methods)
        results["problems"][name] = [row for row, _ in points]
        jax.clear_caches()
        # Save now, in case a later measurement is cut off.
        (output / "speed.json").write_text(json.dumps(results, indent=1))
    if everything:
        results["memories"] = speed_growth.memories()
        results["growth"] = speed_growth.growth(repeats)
        results["checkpoints"] = speed_growth.checkpoints(repeats)
        results["devices"] = speed_growth.devices()
    (output / "speed.json").write_text(json.dumps(results, indent=1))
    summary, details = speed_report.summary(results), speed_report.details(results)
    print(summary)
    (output / "speed.md").write_text(f"{summary}\n{details}")
    speed_report.plot(results, output)


def main() -> None:
    folder = pathlib.Path(__file__).parent
    suites = {"cpu": PROBLEMS, "gpu": speed_accelerator.CASES}
    every = dict.fromkeys(name for suite in suites.values() for name in suite)
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=list(suites), default="cpu")
    parser.add_argument("--problem", choices=list(every), action="append")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path, default=folder)
    options = parser.parse_args()
    names = options.problem or list(suites[options.device])
    for name in names:
        if name not in suites[options.device]:
            parser.error(f"`--device {options.device}` has no problem {name!r}")
    device = choose_device(options.device, options.quick)
    on_gpu = options.device == "gpu"
    if options.quick:
        speed_accelerator.quick(names, device) if on_gpu else quick()
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        measured = speed_accelerator.run if on_gpu else run
        measured(names, device, options.repeats, options.output)
    print("OK")


if __name__ == "__main__":
    main()
