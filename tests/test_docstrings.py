"""Examples in docstrings print what they say, with and without `jax_enable_x64`."""

import doctest
import inspect
import pathlib
import re

import jax
import pytest

import diffrax_reversible as dr

from .problems import NYSTROM, SOLVERS, SPLITTINGS


PUBLIC = {name: getattr(dr, name) for name in dir(dr) if not name.startswith("_")}
WITHOUT_EXAMPLE = {
    # Contracts, which only subclasses can show. `as_reversible` shows the adapter.
    "AbstractALF",
    "AbstractReversibleAdapter",
    "AbstractReversibleSolver",
    "AbstractReversibleStepSizeController",
    # `explain` returns them.
    "Attempts",
    "Explanation",
    "Rival",
}


def doctest_of(name):
    return doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, {}, name, None, 0)


EXAMPLES = tuple(name for name in PUBLIC if doctest_of(name).examples)


@pytest.fixture
def x64(request):
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", request.param)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(
    "x64", (True, pytest.param(False, marks=pytest.mark.slow)), indirect=True
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, x64):
    report = []
    results = doctest.DocTestRunner().run(doctest_of(name), out=report.append)
    assert results.attempted > 0 and results.failed == 0, "".join(report)


def test_every_class_has_an_example():
    classes = {name for name, value in PUBLIC.items() if inspect.isclass(value)}
    assert classes - set(EXAMPLES) <= WITHOUT_EXAMPLE <= PUBLIC.keys()


GAUSS = dr.ImplicitMidpoint(), dr.Gauss4(), dr.Gauss6()


@pytest.mark.parametrize(
    "solver",
    (*SOLVERS, *SPLITTINGS, *NYSTROM, *GAUSS),
    ids=lambda s: f"{type(s).__name__}{', nystrom' if s in NYSTROM else ''}",
)
def test_orders(solver):
    """The first order that a docstring names is that of the solver. The one that it calls
    embedded is that of the embedded method."""

    def stated(phrase):
        text = type(solver).__doc__
        return int(re.search(rf"\b{phrase} (\d+)", text, re.IGNORECASE)[1])

    assert stated("order") == solver.order(None)
    assert stated("embedded order") == solver.error_order(None) - 1


def test_plain_text():
    """Docstrings have no markup of documentation tools, as `help` shows them verbatim."""
    package = pathlib.Path(dr.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "??? " not in text and "`][]" not in text, file
