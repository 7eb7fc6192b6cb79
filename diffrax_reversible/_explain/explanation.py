"""The result of `explain`."""

import dataclasses
import textwrap
from typing import Any

import numpy as np

from .attempts import Attempts
from .names import solver_name
from .plot import draw
from .rivals import Rival


# A key of `Explanation.memory`.
default_gradient = "gradient with RecursiveCheckpointAdjoint"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A report on a solve and its gradient. `print` shows it as text; `plot` draws it.

    - `title`: the solver, the dtype, the step size controller and the ends of the solve.
    - `failed`: the reason why the solve itself failed, or `None`.
    - `attempts`: all attempted steps: `start`, `end` and `accepted`, NumPy arrays with one
        entry per step.
    - `num_restarts`: the number of restarts.
    - `known_states`: the known states of the backward pass, as the dictionaries of
        `ReversibleAdjoint(watch=...)`, where `t` is the time itself also if `t1 < t0`.
    - `undone_steps`, `replayed_steps`, `restarted_steps`: the numbers of
        `ReversibleAdjoint(report=...)`, or `None` if there is no report: with another
        adjoint, or if the gradient is refused before it is computed.
    - `refused`: the reason why there is no gradient, or `None`.
    - `memory`: compiled temporary memory in bytes, of the solve, of its gradient, and of
        the gradient under `RecursiveCheckpointAdjoint`, where XLA reports it.
    - `rivals`: time, memory and error of the same solve, with its own solver first, then
        with those to compare, and with its own in single or double precision, whichever it
        is not in.
    - `advice`: what to change, as sentences.
    """

    title: str
    failed: str | None
    attempts: Attempts
    num_restarts: int
    known_states: list[dict[str, Any]]
    undone_steps: int | None
    replayed_steps: int | None
    restarted_steps: int | None
    refused: str | None
    memory: dict[str, int | None]
    rivals: list[Rival]
    advice: list[str]

    def __str__(self) -> str:
        lines = [self.title, *self._steps(), *self._backward_pass(), *self._memory()]
        if len(self.rivals) > 0:
            lines += self._rivals()
        lines += ["advice", *(f"  - {sentence}" for sentence in self.advice)]
        return "\n".join(lines)

    def _steps(self) -> list[str]:
        sizes = self.attempts.sizes[self.attempts.accepted]
        count, tried = len(sizes), len(self.attempts.accepted)
        failed = [] if self.failed is None else [f"  solve          {self.failed}"]
        if count == 0:
            return [*failed, f"  steps          none of {tried} accepted"]
        rejected = f"{tried - count} rejected ({(tried - count) / tried:.0%})"
        range_ = f"sizes from {np.min(sizes):.2g} to {np.max(sizes):.2g}"
        return [
            *failed,
            f"  steps          {count} accepted, {rejected}, {range_}",
            *self._crowded(),
            f"  restarts       {self._restarts()}",
        ]

    def _crowded(self) -> list[str]:
        """The tenth of the solve with most rejected steps, and that with most accepted ones
        if it has more than twice its share."""
        attempts, lines = self.attempts, []
        for accepted in (True, False):
            total = int(np.sum(attempts.accepted == accepted))
            count, *ends = attempts.densest(accepted)
            if total == 0 or (accepted and count <= max(2, 0.2 * total)):
                continue
            first, last = map(attempts.time, ends)
            what = "accepted" if accepted else "rejected"
            lines.append(f"    {what:<13}{count} of {total} from t = {first} to {last}")
        return lines

    @property
    def restart_times(self) -> list[float]:
        """The times of the restarts that the backward pass has reached, in the order of the
        solve."""
        reached = {s["step"]: s["t"] for s in self.known_states if s["restarted"]}
        return [reached[step] for step in sorted(reached)]

    def _restarts(self) -> str:
        times = self.restart_times
        if len(times) == 0:
            return str(self.num_restarts)
        # A refused gradient has not reached all of them.
        reached = "" if len(times) >= self.num_restarts else "reached by the backward pass "
        first = ", ".join(map(self.attempts.time, times[:5]))
        more = ", ..." if len(times) > 5 else ""
        return f"{self.num_restarts}, {reached}at t = {first}{more}"

    def _backward_pass(self) -> list[str]:
        if self.refused is not None:
            return [f"  gradient       refused: {self.refused}"]
        if self.undone_steps is None:
            return []
        kept = [known["miss"] for known in self.known_states if not known["repeated"]]
        worst = max(kept, default=0.0)
        again = sum(known["repeated"] for known in self.known_states)
        steps = f"{self.undone_steps} steps undone, {self.replayed_steps} replayed"
        if self.restarted_steps:
            steps += f", {self.restarted_steps} restarted"
        return [
            f"  backward pass  {steps}",
            f"  known states   {len(self.known_states)}, missed by at most {worst:.1g} of "
            f"`drift_tol`, and {again} segments undone again after a larger miss",
        ]

    def _memory(self) -> list[str]:
        sizes = [
            f"{what} {size / 1e3:.1f} kB"
            for what, size in self.memory.items()
            if size is not None
        ]
        return [f"  memory         {', '.join(sizes)}"] if len(sizes) > 0 else []

    def _rivals(self) -> list[str]:
        names = []
        for rival in self.rivals:
            precision = "" if rival.dtype is None else f", {rival.dtype}"
            names.append(solver_name(rival.solver) + precision)
        width = max(map(len, names)) + 1
        lines = [f"  {'solvers':<{width + 2}}gradient [ms]   memory [kB]     error"]
        for name, rival in zip(names, self.rivals, strict=True):
            if rival.refused is not None:
                why = textwrap.shorten(rival.refused, 60, placeholder=" ...")
                lines.append(f"    {name:<{width}}{why}")
                continue
            memory = "" if rival.bytes is None else f"{rival.bytes / 1e3:.1f}"
            time, error = f"{rival.milliseconds:.3g}", f"{rival.error:.1e}"
            lines.append(f"    {name:<{width}}{time:>13}{memory:>14}{error:>10}")
        return lines

    def plot(self, path: Any = None) -> Any:
        """Draw accepted and rejected steps, restarts, the errors of the backward pass at
        known states, the memory of the solve and of its gradient, and the advice.

        **Arguments:**

        - `path`: where to save the figure, or `None`.

        **Returns:**

        The `matplotlib.figure.Figure`. Matplotlib has to be installed.
        """
        figure = draw(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
