"""Every example runs, and ends by printing `OK` after it has checked its claims."""

import pathlib
import shutil
import subprocess
import sys

import pytest


FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    # A copy, so that what it plots does not end up in the source tree.
    script = tmp_path / path.name
    shutil.copy(path, script)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "OK"
    assert script.with_suffix(".png").stat().st_size > 10_000


def test_outcomes():
    """No gradient is wrong, in a part of the sweep."""
    script = FOLDER / "benchmarks" / "outcomes.py"
    command = [sys.executable, script, "--quick"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "OK"
