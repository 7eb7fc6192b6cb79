"""The advice of `explain` follows from what was counted and measured."""

import dataclasses
import re

import diffrax as dfx
import pytest

import diffrax_reversible as dr
from diffrax_reversible._explain.advice import advise, loses_solutions
from diffrax_reversible._explain.attempts import Attempts
from diffrax_reversible._explain.rivals import Rival


def explained(rivals):
    """One accepted step, and these measurements."""
    attempts = Attempts.of([(0.0, 1.0, True)], 1.0)
    return dr.Explanation("", None, attempts, 0, [], 1, 0, 0, None, {}, rivals, [])


SINGLE = Rival(dr.ALF4(), 3.0, 1, 5e-6, dtype="float32")


@pytest.mark.parametrize(
    "restarts, repeated, cause",
    ((0, False, "do not reach back"), (0, True, "Rounding errors grow"), (3, False, None)),
    ids=("record", "misses", "restarts"),
)
def test_cause_of_replays(restarts, repeated, cause):
    explanation = explained([])
    counts = dict(num_restarts=restarts, undone_steps=1, replayed_steps=1)
    explanation = dataclasses.replace(
        explanation, known_states=[{"repeated": repeated}], **counts
    )
    (sentence,) = advise(explanation, dr.ALF4(), tolerance=1e-4, single=False)
    assert sentence.count(". ") == 1 + (cause is not None)
    assert (cause or "") in sentence


@pytest.mark.parametrize(
    "own, others, advised",
    (
        (Rival(dr.ALF4(), 5.0, 1, 1e-5), [Rival(dr.ALF6(), 3.0, 1, 5e-6)], "ALF6()"),
        (Rival(dr.ALF4(), 5.0, 1, 1e-5), [Rival(dr.ALF6(), 4.9, 1, 5e-6)], None),
        (Rival(dr.ALF4(), 5.0, 1, 1e-5), [Rival(dr.ALF6(), 3.0, 1, 5e-3)], None),
        (Rival(dr.ALF4(), 5.0, 1, 1e-7), [Rival(dr.ALF6(), 3.0, 1, 5e-6)], "ALF6()"),
        (Rival(dr.ALF4(), refused="No."), [Rival(dr.ALF6(), 9.0, 1, 5e-6)], "ALF6()"),
        (Rival(dr.ALF4(), 5.0, 1, 1e-7), [SINGLE], "`solver=ALF4()` in float32"),
        (SINGLE, [Rival(dr.ALF6(), 1.0, 1, 1e-7)], None),
        (Rival(dr.ALF4(True), 5.0, 1, 1e-5), [Rival(dr.ALF4(), 3.0, 1, 5e-6)], "ALF4()"),
    ),
    ids=(
        *("faster", "as fast", "off", "within the tolerance", "refused"),
        *("another precision", "only in another precision", "variant"),
    ),
)
def test_advised_solver(own, others, advised):
    """Which solver is advised if the tolerance is 1e-4."""
    explanation = explained([own, *others])
    (sentence,) = advise(explanation, own.solver, tolerance=1e-4, single=False)
    assert ("`solver=" in sentence) == (advised is not None)
    assert advised is None or advised in sentence


HEUN = dfx.ReversibleHeun()


@pytest.mark.parametrize(
    "own, alf4, fastest, advised",
    (
        (Rival(dr.ALF2(), 9.0, 1, 1e-5), (1.0, 1e-5), (0.9, 1e-6), ("ALF4()",)),
        (Rival(dr.ALF2(), 9.0, 1, 1e-5), (1.0, 1e-5), (0.5, 1e-6), ("ALF4()", "ALF6()")),
        (Rival(dr.ALF2(), 2.0, 1, 1e-5), (1.9, 1e-5), (1.0, 1e-6), ("ALF6()",)),
        (Rival(dr.ALF2(), 1.0, 1, 1e-5), (3.0, 1e-6), (3.0, 1e-6), ()),
        # The solution is lost. Even a slower solver is better, unless it loses it too.
        (Rival(HEUN, 1.0, 1, 0.3), (3.0, 1e-4), (3.0, 1e-5), ("ALF4()",)),
        (Rival(HEUN, 1.0, 1, 0.3), (3.0, 0.2), (0.5, 0.2), ()),
        (Rival(HEUN, refused="No."), (3.0, 1e-5), (3.0, 1e-5), ("ALF4()",)),
        # Another solver of the same error is not said to lose the solution.
        (Rival(dr.ALF8(), 1.0, 1, 0.3), (3.0, 1e-4), (3.0, 1e-5), ()),
    ),
    ids=(
        *("faster", "another is faster", "as fast", "slower"),
        *("lost", "all lost", "refused", "restarts"),
    ),
)
@pytest.mark.parametrize("tolerance", (1e-4, float("inf")), ids=("tolerance", "steps"))
def test_advised_in_place_of_one_that_does_not_restart(
    own, alf4, fastest, advised, tolerance
):
    others = [
        Rival(solver, milliseconds, 1, error)
        for solver, (milliseconds, error) in ((dr.ALF4(), alf4), (dr.ALF6(), fastest))
    ]
    explanation = explained([own, *others])
    advice = advise(explanation, own.solver, tolerance=tolerance, single=False)
    assert tuple(re.findall(r"`solver=(\S+)`", "".join(advice))) == advised
    first, *others = advice
    assert ("loses the solution" in first) == ("ALF4()" in advised)
    assert not any("loses the solution" in sentence for sentence in others)


def test_lost_and_nothing_that_restarts_is_compared():
    own, other = Rival(dr.ALF2(), 1.0, 1, 0.3), Rival(dr.ALF6(), 3.0, 1, 1e-4)
    (sentence,) = advise(explained([own, other]), own.solver, tolerance=1e-4, single=False)
    assert "`solver=ALF6()` takes 3 ms" in sentence and "instead of 0.3" in sentence


@pytest.mark.parametrize(
    "solver, loses",
    (
        (dr.ALF2(), True),
        (dr.ALF(dr.ALF2.tableau), True),
        (dfx.ReversibleHeun(), True),
        (dfx.LeapfrogMidpoint(), True),
        (dr.ALF4(), False),
        (dr.McCallumFoster(dfx.Tsit5()), False),
        (dr.StormerVerlet(), False),
        (dr.Gauss4(), False),
    ),
)
def test_loses_solutions(solver, loses):
    assert loses_solutions(solver) is loses
