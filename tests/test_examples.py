"""Every example checks its claims and then prints `OK`: in part, with `--quick`, and in
full. Every example has a figure that is small enough to commit."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from .conftest import quick_flags
from .problems import cases


FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

# Its kernels are compiled with optimisations, as it spends most of its time running.
RUNNING = "03_argon.py"


IN_FULL = [path.name for path in EXAMPLES if "--quick" in path.read_text()]


def run_example(name, arguments, folder, environment):
    # Run a copy, so that its figure does not end up in the source tree.
    script = folder / name
    shutil.copy(FOLDER / name, script)
    command = [sys.executable, script, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "OK"
    assert script.with_suffix(".png").stat().st_size > 10_000


def quickly_compiled(name):
    return os.environ | {"XLA_FLAGS": quick_flags(optimised=name == RUNNING)}


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    quick = ["--quick"] if path.name in IN_FULL else []
    run_example(path.name, quick, tmp_path, quickly_compiled(path.name))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FULL, ids=lambda name: f"{name} in full")
def test_in_full(name, tmp_path):
    """Compiled as users do, as most of the time is for running."""
    run_example(name, [], tmp_path, os.environ)


@pytest.mark.slow
def test_all_of_two_arguments(tmp_path):
    """`--all` adds two models."""
    name = "07_two_arguments.py"
    run_example(name, ["--quick", "--all"], tmp_path, quickly_compiled(name))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_figure(path):
    name = f"figures/{path.stem}.png"
    assert 10_000 < (FOLDER / name).stat().st_size < 100_000
    rows = re.findall(r"^\|.*$", (FOLDER / "README.md").read_text(), re.M)
    (row,) = (row for row in rows if f"]({path.name})" in row)
    assert name in row


# The benchmarks assert:
# - `outcomes.py`: no gradient is wrong.
# - `work_precision.py`: no error exceeds 30 times that of `Dopri5` at the same tolerance.
# - `speed.py`: gradients are right, and their memory does not grow.
# - `speed.py --device gpu`: gradients are right on any device, in float32 and float64.
# - `coefficients.py`: the search finds the coefficients of `ALF4`.
# - `solutions.py`: with `--quick`, and only then, no error exceeds 10 times that of
#   `Dopri5`, at and between steps.
# - `error_weights.py`: the package's error estimates are at least a quarter of the error.
# - `stiff_oscillation.py`: solutions are right to 1e-4.
# - `compile_time.py`: programs are loaded from JAX's cache, and give the same gradient.
# - `small_states.py`: an option of XLA does not change a gradient.
# - `batches.py`: gradients are as accurate as those with `Tsit5`.
# - `refusals.py`: hardly any right gradient is refused, or worse than a stored one.
BENCHMARKS = cases(
    ("coefficients.py", "error_weights.py"),
    slow=(
        "outcomes.py",
        "work_precision.py",
        "speed.py",
        "speed.py --device gpu",
        "solutions.py",
        "stiff_oscillation.py",
        "compile_time.py",
        "small_states.py",
        "batches.py",
        "refusals.py",
    ),
)


@pytest.mark.long
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark(name):
    """Every benchmark runs in part, with `--quick`. Arguments may follow its name."""
    script, *arguments = name.split()
    path = FOLDER / "benchmarks" / script
    command = [sys.executable, path, *arguments, "--quick"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "OK"
