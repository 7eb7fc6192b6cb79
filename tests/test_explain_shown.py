"""The text and the plot of `explain` say where things happened, and what they cost."""

import dataclasses

import diffrax as dfx
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._explain.attempts import Attempts
from diffrax_reversible._explain.explanation import default_gradient
from diffrax_reversible._explain.names import solver_name


def synthetic(direction=1.0, **changes):
    """Accepted steps from 0 to `direction`, shorter from 0.5 to 0.6, and three rejected
    ones, two of them near 0.5."""
    ends = [0.0, 0.2, 0.4, *np.linspace(0.5, 0.6, 9), 0.8, 1.0]
    notes = [(a, b, True) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    notes += [(0.0, 0.7, False), (0.52, 0.6, False), (0.58, 0.7, False)]
    known = [
        dict(step=n, t=direction * t, restarted=restarted, miss=miss, repeated=miss > 1)
        for n, t, restarted, miss in (
            *((12, 0.8, True, 1e-3), (5, 0.525, False, 2.0), (5, 0.525, False, 1e-4)),
            *((2, 0.4, True, 1e-5), (0, 0.0, False, 1e-3)),
        )
    ]
    memory = {"solve": 1000, "gradient": 3000, default_gradient: 20_000}
    advice = ["Use less of it.", "Or more of it."]
    attempts = Attempts.of(notes, direction)
    explanation = dr.Explanation(
        *("A solve", None, attempts, 2, known, 13, 0, 0, None, memory, [], advice)
    )
    return dataclasses.replace(explanation, **changes)


@pytest.mark.parametrize("direction", (1.0, -1.0), ids=("forwards", "backwards"))
def test_where(direction):
    """Where most steps are rejected, and where most are accepted."""
    text = str(synthetic(direction))
    sign = "-" if direction < 0 else ""
    tenth = f"from t = {sign}0.5 to {sign}0.6"
    assert f"  accepted     8 of 13 {tenth}\n" in text
    assert f"  rejected     2 of 3 {tenth}\n" in text
    assert f"  restarts       2, at t = {sign}0.4, {sign}0.8\n" in text


def test_where_of_few():
    """Even steps are not crowded anywhere, and restarts may be unseen, or too many."""
    even = Attempts.of([(float(t), t + 1.0, True) for t in range(1000, 1010)], 1.0)
    known = [dict(step=n, t=1000.0 + n, restarted=True) for n in range(6)]
    explanation = synthetic(attempts=even, known_states=known, refused="No.")
    lines = [line.strip() for line in str(explanation).splitlines()]
    assert not any(line.startswith(("accepted", "rejected")) for line in lines)
    assert "restarts       2, at t = 1000, 1001, 1002, 1003, 1004, ..." in lines
    explanation = dataclasses.replace(explanation, num_restarts=9)
    assert "restarts       9, reached by the backward pass at t = 1000" in str(explanation)
    explanation = dataclasses.replace(explanation, known_states=[])
    assert "restarts       9\n" in str(explanation)
    none = Attempts.of([(0.0, 1.0, False), (0.0, 0.1, False)], 1.0)
    assert "none of 2 accepted" in str(synthetic(attempts=none))
    assert none.densest(False) == (2, 0.0, 0.0)


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("reported", (True, False), ids=("memory", "no memory"))
def test_plot(reported, tmp_path):
    """It shows what the text does."""
    path = tmp_path / "explained.png"
    explanation = synthetic()
    if not reported:
        nothing = dict.fromkeys(explanation.memory)
        explanation = dataclasses.replace(explanation, memory=nothing)
    figure = explanation.plot(path)
    steps, missed, *memory = figure.axes
    accepted, rejected, *restarts = steps.lines
    attempts = explanation.attempts
    np.testing.assert_array_equal(accepted.get_ydata(), attempts.sizes[attempts.accepted])
    np.testing.assert_array_equal(rejected.get_xdata(), [0.0, 0.52, 0.58])
    assert [line.get_xdata()[0] for line in restarts] == [0.4, 0.8]
    kept, again, limit = missed.lines
    np.testing.assert_array_equal(kept.get_ydata(), [1e-3, 1e-4, 1e-5, 1e-3])
    np.testing.assert_array_equal(again.get_ydata(), [2.0])
    assert limit.get_label() == "undone again or refused above"
    assert len(memory) == reported
    for axes in memory:
        assert [bar.get_width() for bar in axes.patches] == [1, 3, 20]
        assert [text.split(": ")[1] for text in texts(axes)] == [
            *("1.0 kB", "3.0 kB", "20.0 kB")
        ]
    lines = ["advice", *(f"- {sentence}" for sentence in explanation.advice)]
    assert figure.get_supxlabel().splitlines() == lines
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    "solver, name",
    (
        (dr.ALF4(), "ALF4()"),
        (dr.ALF4(compensated=True), "ALF4(compensated=True)"),
        (dr.BlanesMoan4(nystrom=True), "BlanesMoan4(nystrom=True)"),
        (dr.McCallumFoster(dfx.Tsit5()), "McCallumFoster(Tsit5())"),
        (dr.McCallumFoster(dfx.Tsit5(), 0.9), "McCallumFoster(Tsit5(), coupling=0.9)"),
        (dr.ALF(dr.ALF4.tableau), "ALF(tableau=ALFTableau(...))"),
        (dr.Gauss4(), "Gauss4()"),
        (dfx.Kvaerno5(), "Kvaerno5()"),
    ),
)
def test_solver_name(solver, name):
    assert solver_name(solver) == name
