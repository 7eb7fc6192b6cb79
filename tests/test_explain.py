"""`explain` reports what a solve and its gradient do, and its advice helps."""

import dataclasses
import re

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._explain.advice import advise
from diffrax_reversible._explain.gradient import Solve, sum_of_squares
from diffrax_reversible._explain.rivals import _other_precision

from .problems import cases, slow_manifold


PID = dfx.PIDController(rtol=1e-4, atol=1e-4)
CONTRACTING = dfx.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(t)))


def contracting(call, solver, t0=0.0, t1=3.0, **settings):
    settings = dict(stepsize_controller=PID, adjoint=dr.ReversibleAdjoint()) | settings
    # The flow contracts in the direction of the solve, which is why it restarts.
    rate = 40.0 if t1 > t0 else -40.0
    return call(CONTRACTING, solver, t0, t1, None, np.array([1.0]), rate, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("t1", cases((-3.0,), slow=(3.0,)))
def test_steps(t1):
    explanation = contracting(dr.explain, dr.ALF4(), t1=t1, rivals=())
    stats = contracting(dfx.diffeqsolve, dr.ALF4(), t1=t1).stats
    start, end, accepted = explanation.attempts
    assert np.sum(accepted) == stats["num_accepted_steps"]
    assert np.sum(~accepted) == stats["num_rejected_steps"]
    start, end = start[accepted], end[accepted]
    assert (start[0], end[-1]) == (0.0, t1)
    np.testing.assert_array_equal(start[1:], end[:-1])
    assert explanation.num_restarts == stats["num_restarts"]
    times = [state["t"] for state in explanation.known_states]
    assert times[-1] == 0 and all(min(0, t1) <= t <= max(0, t1) for t in times)
    assert min(t1 * t for t in times) == 0 < max(t1 * t for t in times)
    assert explanation.failed is None
    assert f"{np.sum(accepted)} accepted, {np.sum(~accepted)} rejected" in str(explanation)


@pytest.mark.slow
def test_known_states_and_checkpoints(tmp_path):
    """Every restart is reported, and the advised number of checkpoints suffices."""

    def explain(checkpoints):
        adjoint = dr.ReversibleAdjoint(checkpoints)
        return contracting(dr.explain, dr.ALF4(), adjoint=adjoint, rivals=())

    replaying = explain(1)
    restarted = {state["step"] for state in replaying.known_states if state["restarted"]}
    assert len(restarted) == replaying.num_restarts > 5
    assert replaying.known_states[-1]["step"] == 0
    assert replaying.replayed_steps > 0
    (checkpoints,) = re.findall(r"checkpoints=(\d+)", "".join(replaying.advice))
    enough = explain(int(checkpoints))
    assert enough.replayed_steps == 0
    assert not any("checkpoints=" in sentence for sentence in enough.advice)
    replaying.plot(tmp_path / "explained.png")
    assert (tmp_path / "explained.png").stat().st_size > 10_000


@pytest.mark.slow
def test_second_backward_pass():
    """It is told where a mode that has died out makes it necessary, and no other advice
    takes its steps for those of repeated segments."""
    problem = dfx.ODETerm(slow_manifold), dr.ALF4(), 0.0, 3.0, None
    y0 = np.array([1.0, 1 / 500])
    controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
    explanation = dr.explain(*problem, y0, 1.0, stepsize_controller=controller, rivals=())
    assert 0 < explanation.restarted_steps < explanation.undone_steps / 2
    assert f"{explanation.restarted_steps} restarted" in str(explanation)
    assert any("is done twice" in sentence for sentence in explanation.advice)
    assert not any("rounding errors grow" in sentence for sentence in explanation.advice)
    # Nor does any if the second pass has no restarts.
    without = dataclasses.replace(explanation, restarted_steps=0)
    advice = advise(without, dr.ALF4(), tolerance=1e-5, single=False)
    assert not any("rounding errors grow" in sentence for sentence in advice)


@pytest.mark.more
@pytest.mark.parametrize("throw", (True, False))
def test_refused(throw):
    adjoint = dr.ReversibleAdjoint(0, drift_tol=1e-18)
    settings = dict(adjoint=adjoint, throw=throw, rivals=())
    explanation = contracting(dr.explain, dr.ALF4(), **settings)
    assert explanation.failed is None
    assert "missed a known state" in explanation.refused
    assert explanation.refused in str(explanation)
    assert explanation.advice[0].startswith("The gradient is refused")


@pytest.mark.slow
def test_failed():
    explanation = contracting(dr.explain, dr.ALF4(), max_steps=10, rivals=())
    assert "max_steps" in explanation.failed
    assert explanation.failed in str(explanation)
    assert len(explanation.attempts.accepted) == 10
    assert explanation.advice[0].startswith("The solve itself does not succeed")


def kepler(t, y, args):
    q, v = y
    return v, -q / jnp.sum(q**2) ** 1.5


@pytest.mark.slow
def test_errors_of_rivals():
    y0 = jnp.array([0.4, 0.0]), jnp.array([0.0, 2.0])
    fine = dfx.PIDController(rtol=1e-8, atol=1e-8)
    explanation = dr.explain(
        dfx.ODETerm(kepler),
        dr.ALF4(),
        *(0.0, 2 * np.pi, None, y0),
        stepsize_controller=fine,
        rivals=(dr.ALF4(), dr.ALF6()),
    )
    *given, single = explanation.rivals
    assert single.dtype == "float32" and single.solver == dr.ALF4()
    # In float32, steps for an error of 1e-8 only add up rounding errors.
    assert 1e-7 < single.error < 1e-3 and single.milliseconds > 0
    assert "ALF4(), float32" in str(explanation)
    # After one period the planet is where it began.
    for rival in given:
        sol = dfx.diffeqsolve(
            dfx.ODETerm(kepler),
            rival.solver,
            *(0.0, 2 * np.pi, None, y0),
            stepsize_controller=fine,
        )
        off = [np.max(np.abs(y[-1] - y0)) for y, y0 in zip(sol.ys, y0, strict=True)]
        assert rival.error == pytest.approx(max(off) / 2, rel=0.01)
        assert rival.milliseconds > 0 and rival.bytes > 0


_decay = dfx.ODETerm(lambda t, y, args: -y)
_last = lambda sol: jnp.sum(sol.evaluate(sol.t1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, loss",
    (
        (dict(saveat=dfx.SaveAt(steps=True)), sum_of_squares),
        (dict(saveat=dfx.SaveAt(dense=True)), _last),
        (
            dict(
                saveat=dfx.SaveAt(ts=jnp.linspace(0, 1, 5)),
                event=dfx.Event(lambda t, y, args, **kwargs: y[0] < 0.5),
            ),
            sum_of_squares,
        ),
    ),
    ids=("steps", "dense", "event"),
)
def test_errors_of_other_outputs(settings, loss):
    """Solvers whose steps differ are compared where both have outputs."""
    explanation = dr.explain(
        *(_decay, dr.ALF4(), 0.0, 1.0, None, jnp.ones(2)),
        loss=lambda sol: jnp.nan_to_num(loss(sol), posinf=0.0),
        stepsize_controller=PID,
        rivals=(dr.ALF4(), dr.ALF6()),
        **settings,
    )
    assert all(rival.refused is None for rival in explanation.rivals)
    assert all(0 < rival.error < 1e-3 for rival in explanation.rivals)


@pytest.mark.more
def test_precision_by_times():
    """Diffrax promotes a state to the precision of times, which Python numbers have."""
    y0 = jnp.ones(2, jnp.float32)
    explanation = dr.explain(_decay, dr.ALF4(), 0, 1, 0.02, y0, rivals=(dr.ALF4(),))
    assert explanation.title.startswith("ALF4(), float64")
    double, single = explanation.rivals
    assert double.error < 1e-8 < single.error and single.dtype == "float32"


@pytest.mark.more
def test_own_solver_is_measured():
    """Whatever is compared, and with its own arguments. It loses the solution here."""
    own = dr.ALF2(compensated=True)
    explanation = contracting(dr.explain, own, t1=0.6, max_steps=500, rivals=(dr.ALF4(),))
    first, second, single = explanation.rivals
    assert (first.solver, first.dtype, second.solver) == (own, None, dr.ALF4())
    assert (single.solver, single.dtype) == (own, "float32")
    assert "max_steps" in first.refused and second.error < 1e-3
    advice = explanation.advice[1]
    assert advice.startswith("`ALF2(compensated=True)` does not restart, and loses")
    assert "`solver=ALF4()` takes" in advice
    assert "ALF2(compensated=True), float32" in str(explanation)


@pytest.mark.parametrize(
    "given, other",
    (
        ("float64", ("float32", "float32")),
        ("complex128", ("float32", "complex64")),
        ("float32", ("float64", "float64")),
        ("float16", (None, None)),
    ),
)
def test_other_precision(given, other):
    """Every number is cast, those of the settings too, and integers are not."""
    precision, dtype = other
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, 1.0, 3))
    args = dict(count=jnp.arange(2), rate=np.float64(1.0))
    y0 = jnp.ones(2, given)
    solve = Solve(
        *(CONTRACTING, dr.ALF4(), 0.0, 1.0, 0.1, y0, args, dict(saveat=saveat)),
        sum_of_squares,
    )
    assert _other_precision(solve) == precision
    if precision is not None:
        cast = solve.in_precision(precision)
        assert cast.y0.dtype == dtype
        assert cast.args["count"].dtype == args["count"].dtype
        times = cast.args["rate"], cast.settings["saveat"].subs.ts
        assert all(x.dtype == precision for x in times)


def test_traced():
    with pytest.raises(ValueError, match="outside of `jax.jit`"):
        jax.jit(lambda y0: dr.explain(CONTRACTING, dr.ALF4(), 0, 1, 0.1, y0, 40.0))(1.0)


def test_fields_are_documented():
    for field in dataclasses.fields(dr.Explanation):
        assert f"`{field.name}`" in dr.Explanation.__doc__
