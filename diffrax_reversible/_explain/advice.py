"""Advice on a solve and its gradient."""

import math

from diffrax import AbstractSolver

from .explanation import default_gradient, Explanation, solver_name
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
        _of_rejected(explanation),
        _of_replays(explanation),
        _of_repeats(explanation, single),
        _of_dead_modes(explanation),
        _of_memory(explanation),
        _of_solver(explanation.rivals, solver, tolerance),
    ]
    told = [sentence for sentence in sentences if sentence is not None]
    return told if len(told) > 0 else ["Nothing to change."]


def _of_failure(explanation: Explanation) -> str | None:
    if explanation.failed is None:
        return None
    return (
        "The solve itself does not succeed. See where its steps shrink, by "
        "`Explanation.plot`, and whether another solver of those below succeeds."
    )


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
        f"`ReversibleAdjoint(checkpoints={max(2 * restarts, 32)})` replays fewer."
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
        "The backward pass is done twice, with restarts the second time: a fast mode that "
        "has died out in the solution would have spoilt the gradient. This takes time, but "
        "there is nothing to correct."
    )


def _of_memory(explanation: Explanation) -> str | None:
    ours, default = (explanation.memory.get(k) for k in ("gradient", default_gradient))
    if ours is None or default is None or ours <= default:
        return None
    return (
        "The state is so small, or the steps so few, that `RecursiveCheckpointAdjoint` "
        "takes less memory."
    )


def _of_solver(rivals: list[Rival], solver: AbstractSolver, tolerance: float) -> str | None:
    """The fastest gradient with an error no larger, or within the tolerance."""
    given = [rival for rival in rivals if rival.dtype is None]
    own = [rival for rival in given if solver_name(rival.solver) == solver_name(solver)]
    able = [rival for rival in rivals if math.isfinite(rival.error)]
    if len(own) == 0 or len(able) == 0:
        return None
    own = own[0]
    works = math.isfinite(own.error)
    enough = tolerance if math.isfinite(tolerance) else 0.0
    if works:
        enough = max(enough, own.error)
    right = [rival for rival in able if rival.error <= enough] if works else able
    if len(right) == 0:
        return None
    best = min(right, key=lambda rival: rival.milliseconds)
    if works and best.milliseconds > _faster * own.milliseconds:
        return None
    precision = "" if best.dtype is None else f" in {best.dtype}"
    share = f", {best.milliseconds / own.milliseconds:.2g} times as long" if works else ""
    return (
        f"`solver={solver_name(best.solver)}`{precision} takes {best.milliseconds:.2g} ms "
        f"for a gradient{share}, at an error of {best.error:.1g}."
    )
