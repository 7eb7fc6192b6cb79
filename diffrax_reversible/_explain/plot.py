"""The plot of an explanation."""

import textwrap
from typing import Any, TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from .explanation import Explanation


# The characters of a line of advice, which fill the width of the figure.
_line_width = 125
# In inches.
_line_height = 0.16


def draw(explanation: "Explanation") -> Any:
    """A `matplotlib.figure.Figure`: steps, errors of the backward pass, memory and advice,
    from top to bottom."""
    from matplotlib.figure import Figure  # Not needed otherwise.

    lines = _lines(explanation.advice)
    memory = {k: v for k, v in explanation.memory.items() if v is not None}
    heights = (4, 2, 1) if len(memory) > 0 else (4, 2)
    height = 0.9 * sum(heights) + _line_height * len(lines)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = [*figure.subplots(len(heights), 1, height_ratios=heights)]
    axes[1].sharex(axes[0])
    axes[0].tick_params(labelbottom=False)
    axes[0].set_title(explanation.title)
    _draw_steps(explanation, axes[0])
    _draw_misses(explanation, axes[1])
    if len(memory) > 0:
        _draw_memory(memory, axes[2])
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small")
    return figure


def _draw_steps(explanation: "Explanation", axes: Any) -> None:
    start, _, accepted = explanation.attempts
    sizes = explanation.attempts.sizes
    axes.semilogy(start[accepted], sizes[accepted], ".-", lw=0.7, label="accepted")
    if not np.all(accepted):
        rejected = start[~accepted], sizes[~accepted]
        axes.semilogy(*rejected, "x", color="tab:red", label="rejected")
    for i, t in enumerate(explanation.restart_times):
        label = "restart" if i == 0 else None
        axes.axvline(t, color="tab:orange", lw=0.7, alpha=0.7, label=label)
    axes.set_ylabel("step size")
    axes.legend(loc="best")


def _draw_misses(explanation: "Explanation", axes: Any) -> None:
    for repeated, style in ((False, "."), (True, "x")):
        known = [s for s in explanation.known_states if s["repeated"] == repeated]
        if len(known) > 0:
            label = "undone again" if repeated else "kept"
            misses = [max(s["miss"], 1e-6) for s in known]
            axes.semilogy([s["t"] for s in known], misses, style, label=label)
    axes.axhline(1, color="tab:red", lw=0.7, label="undone again or refused above")
    axes.set(xlabel="t", ylabel="miss / `drift_tol`", yscale="log")
    axes.legend(loc="best")


def _draw_memory(memory: dict[str, int], axes: Any) -> None:
    """Bars with their names inside, as the names are long."""
    rows = range(len(memory))
    axes.barh(rows, [size / 1e3 for size in memory.values()], color="lightsteelblue")
    for row, (what, size) in enumerate(memory.items()):
        axes.text(0, row, f" {what}: {size / 1e3:.1f} kB", va="center", fontsize="small")
    axes.set(xlabel="memory [kB]", yticks=[])
    axes.invert_yaxis()


def _lines(advice: list[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(_line_width, initial_indent="- ", subsequent_indent="  ")
    wrapped = [wrapper.wrap(sentence) for sentence in advice]
    return ["advice", *(line for lines in wrapped for line in lines)]
