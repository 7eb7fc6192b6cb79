"""Every example checks its claims and then prints `OK`; some run in part, with `--quick`.
Every example has a figure that is small enough to commit."""

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


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    # Run a copy, so that its figure does not end up in the source tree.
    script = tmp_path / path.name
    shutil.copy(path, script)
    quick = ["--quick"] if "--quick" in path.read_text() else []
    flags = quick_flags(optimised=path.name == RUNNING)
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, script, *quick]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "OK"
    assert script.with_suffix(".png").stat().st_size > 10_000


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
# - `solutions.py`: no error exceeds 10 times that of `Dopri5`, at and between steps.
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
