"""The result of `explain`."""

import dataclasses
from typing import Any

import numpy as np

from .attempts import Attempts
from .rivals import Rival


# A key of `Explanation.memory`.
default_gradient = "gradient with RecursiveCheckpointAdjoint"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A report on a solve and its gradient. `print` shows it as text; `plot` draws it.

    - `title`: the solver, the dtype and the step size controller.
    - `failed`: the reason why the solve itself failed, or `None`.
    - `attempts`: all attempted steps: `start`, `end` and `accepted`, NumPy arrays with one
        entry per step.
    - `num_restarts`: the number of restarts.
    - `known_states`: the known states of the backward pass, as the dictionaries of
        `ReversibleAdjoint(watch=...)`.
    - `undone_steps`, `replayed_steps`, `restarted_steps`: the numbers of
        `ReversibleAdjoint(report=...)`, or `None` if no gradient was attempted.
    - `refused`: the reason why there is no gradient, or `None`.
    - `memory`: compiled temporary memory in bytes, of the solve, of its gradient, and of
        the gradient under `RecursiveCheckpointAdjoint`, where XLA reports it.
    - `rivals`: time, memory and error of the same solve with the solvers of this package,
        and with its own in single or double precision, whichever it is not in.
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
            f"  restarts       {self.num_restarts}",
        ]

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
        lines = ["  solvers        gradient [ms]   memory [kB]     error"]
        for rival in self.rivals:
            precision = "" if rival.dtype is None else f", {rival.dtype}"
            name = solver_name(rival.solver) + precision
            if rival.refused is not None:
                lines.append(f"    {name:<24} {rival.refused[:60]}")
                continue
            memory = "" if rival.bytes is None else f"{rival.bytes / 1e3:.1f}"
            lines.append(
                f"    {name:<24}{rival.milliseconds:>6.3g}{memory:>14}{rival.error:>10.1e}"
            )
        return lines

    def plot(self, path: Any = None) -> Any:
        """Draw accepted and rejected steps, restarts, and the errors of the backward pass
        at known states.

        **Arguments:**

        - `path`: where to save the figure, or `None`.

        **Returns:**

        The `matplotlib.figure.Figure`. Matplotlib has to be installed.
        """
        from matplotlib.figure import Figure  # Not needed otherwise.

        figure = Figure(figsize=(8, 5), layout="constrained")
        steps, missed = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        self._plot_steps(steps)
        self._plot_misses(missed)
        steps.set_title(self.title)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _plot_steps(self, axes: Any) -> None:
        start, _, accepted = self.attempts
        sizes = self.attempts.sizes
        axes.semilogy(start[accepted], sizes[accepted], ".-", lw=0.7, label="accepted")
        if not np.all(accepted):
            rejected = start[~accepted], sizes[~accepted]
            axes.semilogy(*rejected, "x", color="tab:red", label="rejected")
        restarts = sorted({s["t"] for s in self.known_states if s["restarted"]})
        for i, t in enumerate(restarts):
            label = "restart" if i == 0 else None
            axes.axvline(t, color="tab:orange", lw=0.7, alpha=0.7, label=label)
        axes.set_ylabel("step size")
        axes.legend(loc="best")

    def _plot_misses(self, axes: Any) -> None:
        for repeated, style in ((False, "."), (True, "x")):
            known = [s for s in self.known_states if s["repeated"] == repeated]
            if len(known) > 0:
                label = "undone again" if repeated else "kept"
                misses = [max(s["miss"], 1e-6) for s in known]
                axes.semilogy([s["t"] for s in known], misses, style, label=label)
        axes.axhline(1, color="tab:red", lw=0.7, label="refused from here")
        axes.set(xlabel="t", ylabel="miss / `drift_tol`")
        axes.legend(loc="best")


def solver_name(solver: Any) -> str:
    """The constructor call of a solver, in short."""
    inner = getattr(solver, "solver", None)
    inside = "" if inner is None else type(inner).__name__ + "()"
    return f"{type(solver).__name__}({inside})"
