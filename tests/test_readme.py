"""What README, changelog and package metadata say is so."""

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import diffrax_reversible as dr

from .problems import SOLVERS, SPLITTINGS
from .test_refusals import REFUSALS


ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.S | re.M)[1]


def table(text):
    rows = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def command(marker):
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, re.S)[1]
    assert "\n" not in block, "each of the two commands is a single line"
    return block


def test_quick_example(tmp_path):
    """Runs as it stands, and prints the gradient of the default adjoint."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    default = code.replace(
        "adjoint=ReversibleAdjoint()", "adjoint=diffrax.RecursiveCheckpointAdjoint()"
    )
    assert default != code

    def numbers(code):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return [float(x) for x in re.findall(r"-?\d+\.\d+", run.stdout)]

    ours, theirs = numbers(code), numbers(default)
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_solver_table():
    first_table, *_ = section("Solvers").split("There is one more evaluation")
    rows = {row[0].strip("`"): row[1:] for row in table(first_table)}
    assert set(rows) == {type(solver).__name__ for solver in SOLVERS}
    for solver in SOLVERS:
        order, embedded, evaluations, dense, _ = rows[type(solver).__name__]
        tableau = solver.tableau
        assert int(order) == tableau.order == tableau.velocity_order
        assert int(embedded) == tableau.embedded_order
        assert int(evaluations) == tableau.stages
        extension = tableau.continuous_extension
        degree = 3 + len(extension.fractions) + extension.evaluates_midpoint
        assert dense == f"degree {degree}, order {extension.order}"


def test_hamiltonian_table():
    _, text = section("Solvers").split("### For separable Hamiltonian systems")
    text, *_ = text.split("\n### ")
    rows = {row[0].strip("`"): row[1:] for row in table(text)}
    assert set(rows) == {type(solver).__name__ for solver in SPLITTINGS}
    for solver in SPLITTINGS:
        order, embedded, evaluations, dense, _ = rows[type(solver).__name__]
        assert int(order) == solver.order(None)
        assert int(embedded) == solver.error_order(None) - 1
        assert int(evaluations) == solver.tableau.stages
        degree = {2: "cubic", 4: "cubic", 6: "quintic", 8: "septic"}[int(order)]
        assert dense == f"{degree}, order {order}"


def runs_by_default(test):
    """Whether some case of a test is not marked as slow."""
    marks = getattr(test, "pytestmark", [])
    cases = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    slow = lambda marked: any(mark.name == "slow" for mark in marked)
    of_case = lambda case: getattr(case, "marks", ())
    return not slow(marks) and all(
        any(not slow(of_case(case)) for case in several) for several in cases
    )


def test_support_table():
    """Every line has a test that is run by default, and what the table refuses is what
    `test_refusals.py` shows to be refused."""
    rows = table(section("What `ReversibleAdjoint` supports"))
    assert {answer for _, answer, _ in rows} == {"yes", "refused"}
    for what, answer, test in rows:
        file, function = test.strip("`").split("::")
        module = importlib.import_module(f"tests.{file.removesuffix('.py')}")
        assert runs_by_default(getattr(module, function)), what
        assert (file == "test_refusals.py") == (answer == "refused"), what
    refused = {what for what, answer, _ in rows if answer == "refused"}
    tested = {name for name, *_ in REFUSALS}
    by_others = {name for name in tested if "by the solver" in name or "settings" in name}
    assert refused == tested - by_others


def test_commands():
    assert command("example").endswith("examples/01_any_depth.py")
    assert command("tests").endswith("-m pytest --quiet")
    for marker in ("example", "tests"):
        assert command(marker).startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_version_and_changelog():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dr.__version__ == metadata["version"]
    versions = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == "Unreleased"
    assert versions[1] == metadata["version"]


def test_examples_table():
    listed = re.findall(r"\]\((\w+\.py)\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_every_public_name_is_documented():
    for name in dir(dr):
        if not name.startswith("_"):
            assert getattr(dr, name).__doc__, name
