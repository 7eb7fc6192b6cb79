"""The READMEs, the changelog and the package metadata agree with the code."""

import importlib
import os
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
READMES = (
    "README.md",
    "examples/README.md",
    "examples/benchmarks/README.md",
    "tests/README.md",
)


def table(file, title):
    """The rows of the first table after the heading, without its header."""
    text = (ROOT / file).read_text()
    text = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.S | re.M)[1]
    rows = re.search(r"^(\|.*\n)+", text, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def solver_table(title):
    rows = table("examples/benchmarks/README.md", title)
    return {name.strip("`"): cells for name, *cells in rows}


def anchors(file):
    """The anchors of the headings of a file, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)", (ROOT / file).read_text(), re.M)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def command(marker):
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, re.S)[1]
    assert "\n" not in block, "each of the two commands is a single line"
    return block


@pytest.mark.slow
def test_quick_example(tmp_path):
    """The example runs as printed, and prints the gradient of the default adjoint."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    default = code.replace(
        "adjoint=ReversibleAdjoint()", "adjoint=diffrax.RecursiveCheckpointAdjoint()"
    )
    assert default != code

    def numbers(code):
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            # Compiling takes most of the time.
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return [float(x) for x in re.findall(r"-?\d+\.\d+", run.stdout)]

    ours, theirs = numbers(code), numbers(default)
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_solver_table():
    rows = solver_table("For any ordinary differential equation")
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
    rows = solver_table("For separable Hamiltonian systems")
    assert set(rows) == {type(solver).__name__ for solver in SPLITTINGS}
    for solver in SPLITTINGS:
        order, embedded, evaluations, dense, _ = rows[type(solver).__name__]
        assert int(order) == solver.order(None)
        assert int(embedded) == solver.error_order(None) - 1
        assert int(evaluations) == solver.tableau.stages
        degree = {2: "cubic", 4: "cubic", 6: "quintic", 8: "septic"}[int(order)]
        assert dense == f"{degree}, order {order}"


def test_gauss_table():
    rows = solver_table("For stiff oscillations")
    assert set(rows) == {"ImplicitMidpoint", "Gauss4", "Gauss6"}
    for name, (order, embedded, stages, dense) in rows.items():
        solver = getattr(dr, name)()
        assert int(order) == solver.order(None)
        assert int(embedded) == solver.error_order(None) - 1
        assert int(stages) == solver.tableau.stages
        assert dense == f"degree {stages}, order {stages}"


def runs(test):
    """Whether `.ci/run` runs some case of a test: by default or with `-m long`."""
    marks = getattr(test, "pytestmark", [])
    cases = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    left_out = lambda marked: any(mark.name in ("more", "slow") for mark in marked)
    of_case = lambda case: getattr(case, "marks", ())
    return not left_out(marks) and all(
        any(not left_out(of_case(case)) for case in several) for several in cases
    )


def test_support_table():
    """Every row has a test that `.ci/run` runs, and the table lists as refused what
    `test_refusals.py` tests."""
    rows = table("tests/README.md", "What `ReversibleAdjoint` supports")
    assert {answer for _, answer, _ in rows} == {"yes", "refused"}
    for what, answer, test in rows:
        file, function = test.strip("`").split("::")
        module = importlib.import_module(f"tests.{file.removesuffix('.py')}")
        assert runs(getattr(module, function)), what
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
    assert re.search(r"version = {(.*?)}", README)[1] == metadata["version"]


@pytest.mark.parametrize("file", READMES)
def test_links(file):
    """Links to files and headings of the repository have a target."""
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", (ROOT / file).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / file).parent / path if path else ROOT / file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_examples_table():
    listed = re.findall(r"\]\((\w+\.py)\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_every_public_name_is_documented():
    for name in dir(dr):
        if not name.startswith("_"):
            assert getattr(dr, name).__doc__, name
