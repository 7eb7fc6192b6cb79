"""Advice on a solve and its gradient."""

import math

from diffrax import AbstractSolver, LeapfrogMidpoint, ReversibleHeun

from .._solver.abstract_alf import AbstractALF
from .._solver.alf import ALF4
from .explanation import default_gradient, Explanation
from .names import solver_name
from .rivals import Rival


# Another solver is advised if its gradient takes less than this fraction of the time.
_faster = 0.8


def advise(
    explanation: Explanation, solver: AbstractSolver, tolerance: float, single: bool
) -> list[str]:
    """Advice as sentences, the most urgent first.

    **Arguments:**

    - `explanation`: the explanation, without advice.
    - `tolerance`: the requested error, relative to the state, or infinity if steps are
        fixed.
    - `single`: whether the state is in single precision or coarser.
    """
    sentences = [
        _of_failure(explanation),
        _of_refusal(explanation, single),
        *_of_solver(explanation.rivals, solver, tolerance),
        _of_rejected(explanation),
        _of_replays(explanation),
        _of_repeats(explanation, single),
        _of_dead_modes(explanation),
        _of_memory(explanation),
    ]
    told = [sentence for sentence in sentences if sentence is not None]
    return told if len(told) > 0 else ["Nothing to change."]


def _of_failure(explanation: Explanation) -> str | None:
    if explanation.failed is None:
        return None
    sentence = (
        "The solve itself does not succeed. `Explanation.plot` shows where its steps shrink"
    )
    others = ", and the table of solvers, which of them succeed"
    return sentence + (others if len(explanation.rivals) > 0 else "") + "."


def _of_refusal(explanation: Explanation, single: bool) -> str | None:
    if explanation.refused is None or explanation.failed is not None:
        return None
    if single:
        return "The gradient is refused, as above. Try float64 first."
    return "The gradient is refused. Its message, above, names the remedies."


def _of_rejected(explanation: Explanation) -> str | None:
    accepted = explanation.attempts.accepted
    if len(accepted) - sum(accepted) <= 0.3 * len(accepted):
        return None
    return (
        "More than 30 % of the steps are rejected. "
        "`PIDController(..., pcoeff=0.4, icoeff=0.2)` rejects fewer."
    )


def _of_replays(explanation: Explanation) -> str | None:
    replayed = explanation.replayed_steps or 0
    count = sum(explanation.attempts.accepted)
    if replayed <= 0.1 * count:
        return None
    restarts, cause = explanation.num_restarts, ""
    if any(known["repeated"] for known in explanation.known_states):
        cause = " Rounding errors grow too far between known states."
    elif restarts == 0:
        cause = " The recorded steps do not reach back to the start."
    return (
        f"The backward pass replays {replayed} steps of {count}.{cause} "
        f"`ReversibleAdjoint(checkpoints={max(2 * restarts, 128)})` replays fewer."
    )


def _of_repeats(explanation: Explanation, single: bool) -> str | None:
    undone = explanation.undone_steps or 0
    count = sum(explanation.attempts.accepted)
    again = any(known["repeated"] for known in explanation.known_states)
    if undone <= 1.2 * count or not again or explanation.restarted_steps:
        return None
    remedy = "float64 or " if single else ""
    return (
        f"The backward pass undoes {undone} steps of {count}, as rounding errors grow too "
        f"far between known states. Use {remedy}`compensated=True`, or more `checkpoints`."
    )


def _of_dead_modes(explanation: Explanation) -> str | None:
    if not explanation.restarted_steps:
        return None
    return (
        "The backward pass is done twice, with `McCallumFoster` three times, and restarts "
        "after the first: a fast mode that has died out in the solution would have spoilt "
        "the gradient. If steps exceed the stability limit of that mode, two more passes "
        "divide them. This takes time, but there is nothing to correct."
    )


def _of_memory(explanation: Explanation) -> str | None:
    ours, default = (explanation.memory.get(k) for k in ("gradient", default_gradient))
    if explanation.failed is not None or ours is None or default is None or ours <= default:
        return None
    return (
        "The state is so small, or the steps so few, that `RecursiveCheckpointAdjoint` "
        "takes less memory."
    )


def _of_solver(rivals: list[Rival], solver: AbstractSolver, tolerance: float) -> list[str]:
    """`ALF4` in place of a solver that does not restart, if it is better; and the fastest
    gradient with an error no larger, or within the tolerance."""
    given = [rival for rival in rivals if rival.dtype is None]
    own = next((rival for rival in given if rival.solver == solver), None)
    able = [rival for rival in rivals if math.isfinite(rival.error)]
    if own is None or len(able) == 0:
        return []
    enough = _allowed_error(own, tolerance)
    right = [rival for rival in able if rival.error <= enough]
    told, now = [], own
    restarting = [r for r in right if r.dtype is None and isinstance(r.solver, ALF4)]
    if loses_solutions(solver) and len(restarting) > 0:
        better = restarting[0]
        if own.error > enough or _is_faster(better, own):
            name, now = solver_name(solver), better
            told.append(
                f"`{name}` does not restart, and loses the solution where the flow "
                f"contracts. {_measured(better, own)}"
            )
    best = min(right, key=lambda rival: rival.milliseconds, default=now)
    worth = _is_faster(best, now) or now.error > enough >= best.error
    return [*told, _measured(best, own)] if worth else told


def loses_solutions(solver: AbstractSolver) -> bool:
    """Whether the solver loses the solution, with a successful result, where the flow
    contracts (see `ReversibleAdjoint`)."""
    if isinstance(solver, AbstractALF):
        return len(solver.tableau.sub_steps) == 1
    return isinstance(solver, ReversibleHeun | LeapfrogMidpoint)


def _allowed_error(own: Rival, tolerance: float) -> float:
    """The tolerance, or the solver's own error if that is larger. If the solver has no
    gradient, any error. If it has lost the solution, a tenth of its error."""
    if not math.isfinite(own.error):
        return math.inf
    known = math.isfinite(tolerance)
    if loses_solutions(own.solver) and own.error > 10 * (tolerance if known else 0.01):
        return own.error / 10
    return max(tolerance, own.error) if known else own.error


def _is_faster(rival: Rival, own: Rival) -> bool:
    """Whether it is worth a change. Anything is faster than no gradient."""
    if not math.isfinite(own.error):
        return math.isfinite(rival.error)
    return rival.milliseconds <= _faster * own.milliseconds


def _measured(rival: Rival, own: Rival) -> str:
    """The measurements of an advised solver, in comparison with the present one."""
    precision = "" if rival.dtype is None else f" in {rival.dtype}"
    time, error = f"{rival.milliseconds:.2g} ms for a gradient", f"{rival.error:.1g}"
    if math.isfinite(own.error):
        time += f", {rival.milliseconds / own.milliseconds:.2g} times as long"
        error += f" instead of {own.error:.1g}"
    name = solver_name(rival.solver)
    return f"`solver={name}`{precision} takes {time}, at an error of {error}."
