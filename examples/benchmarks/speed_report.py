"""Tables and plots of the measurements of `speed.py`."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from speed_methods import APART, ERRORS, LEAN, OURS
from speed_problems import PROBLEMS


matplotlib.use("agg")
import matplotlib.pyplot as plt


Row = dict[str, Any]


class Sweep:
    """The points of one method, either with fixed or with adaptive steps."""

    def __init__(self, rows: list[Row]):
        self.method = rows[0]["method"]
        self.group = rows[0]["group"]
        self.kind = "fixed" if rows[0]["fixed"] else "adaptive"
        self.rows = [row for row in rows if row["status"] == "measured"]
        self.failed = [row for row in rows if row["status"] != "measured"]

    def __str__(self) -> str:
        return f"{self.method}, {self.kind}"

    def at(self, quantity: str, error: float) -> float:
        """The quantity interpolated at an error, NaN outside the measured errors."""
        if not self.rows:
            return np.nan
        # Where more work gives a larger error, the smaller error before it counts.
        errors = np.minimum.accumulate([row["error"] for row in self.rows])
        of_row = median if quantity == "seconds" else lambda row: row[quantity]
        values = [of_row(row) for row in self.rows]
        args = -np.log(error), -np.log(errors), np.log(values)
        return float(np.exp(np.interp(*args, left=np.nan, right=np.nan)))

    @property
    def compile_time(self) -> float:
        times = [row["compile_time"] for row in self.rows]
        return float(np.median(times)) if times else np.nan


def median(row: Row) -> float:
    return float(np.median(row["seconds"]))


def sweeps(rows: list[Row]) -> list[Sweep]:
    keys = dict.fromkeys((row["method"], row["fixed"]) for row in rows)
    return [Sweep([r for r in rows if (r["method"], r["fixed"]) == key]) for key in keys]


def fastest(rows: list[Row], group: str, error: float, prefix: str = "") -> Sweep | None:
    of_group = [
        sweep
        for sweep in sweeps(rows)
        if sweep.group == group and sweep.method.startswith(prefix)
    ]
    reached = [s for s in of_group if np.isfinite(s.at("seconds", error))]
    return min(reached, key=lambda s: s.at("seconds", error), default=None)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float, digits: int = 3) -> str:
    return f"{x:.{digits}g}" if np.isfinite(x) else "n/a"


def _big(x: float) -> str:
    """A number without an exponent."""
    return f"{x:,.0f}" if x >= 100 else number(x)


def _target(what: str, case: str, ours: str, rival: str, ratio: float, bound) -> list[str]:
    bound_text = "" if bound is None else f"{bound:.2f}"
    met = "" if bound is None else "n/a" if np.isnan(ratio) else _met(ratio <= bound)
    return [what, case, ours, rival, number(ratio), bound_text, met]


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _versus(what, case: str, quantity: str, sweeps, error: float, bound) -> list[str]:
    """Compare a sweep of ours with that of a rival; either may be `None`."""
    ratio = np.nan
    if None not in sweeps:
        ours, rival = (
            s.compile_time if quantity == "compile_time" else s.at(quantity, error)
            for s in sweeps
        )
        ratio = ours / rival
    ours, rival = ("n/a" if sweep is None else str(sweep) for sweep in sweeps)
    return _target(what, case, ours, rival, ratio, bound)


def compare(rows: list[Row], name: str, error: float) -> list[list[str]]:
    """The rows of a problem in the table of targets, at one error."""
    ours, lean = fastest(rows, OURS, error), fastest(rows, LEAN, error)
    stored = fastest(rows, APART, error, "gradsolve")
    case = f"{name}, {error:.0e}"
    bound = 0.5 if PROBLEMS[name]().overhead else {1e-3: 0.75, 1e-7: 1.0}.get(error)
    lines = [_versus("time", case, "seconds", (ours, lean), error, bound)]
    if stored is not None:
        gradsolve = (ours, stored)
        lines += [_versus("time, gradsolve", case, "seconds", gradsolve, error, 1.0)]
    if error == 1e-5:
        bound = 0.4 if name == "batched network" else None
        lines += [_versus("memory", case, "memory", (ours, lean), error, bound)]
        lines += [_versus("compile time", case, "compile_time", (ours, lean), error, 0.8)]
    return lines


def overview(problems: dict[str, list[Row]], errors=ERRORS) -> str:
    """The fastest of each group, and the ratios of their times."""
    header = ["problem", "error", "ours", "[ms]", "memory-lean rival", "[ms]", "ratio"]
    lines = []
    for name, rows in problems.items():
        default = [row for row in rows if row["method"] == "Tsit5"]
        for error in errors:
            groups = (rows, OURS), (rows, LEAN), (default, LEAN), (rows, APART, "gradsolve")
            best = [fastest(of, group, error, *prefix) for of, group, *prefix in groups]
            times = [np.nan if s is None else s.at("seconds", error) for s in best]
            names = ["n/a" if sweep is None else str(sweep) for sweep in best]
            ratios = [number(times[0] / time, 2) for time in times[1:]]
            line = [name, f"{error:.0e}", names[0], _big(1e3 * times[0]), names[1]]
            lines.append([*line, _big(1e3 * times[1]), *ratios])
    return table([*header, "of Tsit5's by default", "of gradsolve's"], lines)


def memory_targets(memories: dict[str, list[Row]]) -> list[list[str]]:
    """The rows of problems that were only compiled."""
    bounds = (
        ("batched network", 1024, "ALF4", "Tsit5", 0.4),
        ("deep network", 100, "ALF4", "Tsit5", 0.25),
        ("deep network", 100, "ALF4", "Dopri8", 0.15),
        ("wave equation", 1000, "ALF4", "Tsit5", 0.15),
        ("wave equation", 1000, "BlanesMoan4", "Tsit5", 0.15),
    )
    lines = []
    for name, steps, ours, rival, bound in bounds:
        used = {r["method"]: r["memory"] for r in memories[name] if r["steps"] == steps}
        ratio, case = used[ours] / used[rival], f"{name}, {steps} steps"
        names = f"{ours}, fixed", f"{rival}, fixed"
        lines.append(_target("memory", case, *names, ratio, bound))
    return lines


def targets(results: Row) -> str:
    header = ["what", "problem", "ours", "rival", "ratio", "target", "met"]
    lines = []
    for name, rows in results["problems"].items():
        lines += [line for error in ERRORS for line in compare(rows, name, error)]
    if "memories" in results:
        lines += memory_targets(results["memories"])
    return table(header, sorted(lines, key=lambda line: line[0]))


def equal_errors(rows: list[Row], errors=ERRORS) -> str:
    header = ["method", "group", *(f"time at {error:.0e} [ms]" for error in errors)]
    middle = errors[len(errors) // 2]
    header += [f"{what} at {middle:.0e}" for what in ("evaluations", "memory [kB]")]
    header += ["compile time [s]"]
    lines = []
    for sweep in sweeps(rows):
        times = [number(1e3 * sweep.at("seconds", error)) for error in errors]
        evaluations = _big(sweep.at("evaluations", middle))
        memory = _big(sweep.at("memory", middle) / 1e3)
        line = [str(sweep), sweep.group, *times, evaluations, memory]
        lines.append([*line, number(sweep.compile_time)])
    return table(header, lines)


def points(rows: list[Row], others: dict[str, Callable[[Row], float]] | None = None) -> str:
    """One row per point, with additional columns `others`."""
    others = others or {}
    header = ["method", "setting", "error", "time [ms]", "evaluations", "memory [kB]"]
    lines = []
    for row in rows:
        line = [row["method"], row["setting"]]
        if row["status"] == "measured":
            line += [f"{row['error']:.1e}", number(1e3 * median(row))]
            line += [_big(row["evaluations"]), _big(row["memory"] / 1e3)]
            line += [number(row["compile_time"])]
            line += [_big(column(row)) for column in others.values()]
        else:
            line += [row["status"].replace("|", " "), *(4 + len(others)) * ["n/a"]]
        lines.append(line)
    return table([*header, "compile time [s]", *others], lines)


def growth(rows: list[Row]) -> str:
    pair = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    header = ["what grows", "to", "steps"]
    for name in pair:
        header += [f"{name}: time [ms]", "a step [µs]", "memory [kB]"]
    lines = []
    for row in rows:
        line = [row["what"], f"{row['value']:,}", f"{row['steps']:,}"]
        for name in pair:
            if name not in row:
                line += 3 * ["not run"]
                continue
            seconds = row[name]["seconds"]
            line += [_big(1e3 * seconds), number(1e6 * seconds / row["steps"])]
            line += [_big(row[name]["memory"] / 1e3)]
        lines.append(line)
    return table(header, lines)


def memories(results: dict[str, list[Row]]) -> str:
    lines = [
        [name, row["method"], f"{row['steps']:,}", _big(row["memory"] / 1e3)]
        for name, rows in results.items()
        for row in rows
    ]
    return table(["problem", "method", "steps", "memory [kB]"], lines)


def checkpoints(rows: list[Row]) -> str:
    lines = [
        [
            "default" if row["checkpoints"] is None else str(row["checkpoints"]),
            number(1e3 * row["seconds"]),
            _big(row["memory"] / 1e3),
        ]
        for row in rows
    ]
    return table(["checkpoints", "time [ms]", "memory [kB]"], lines)


def devices(times: dict[str, dict[str, float]]) -> str:
    kinds = list(next(iter(times.values())))
    lines = [[n, *(number(1e3 * row[k]) for k in kinds)] for n, row in times.items()]
    return table(["time of a gradient [ms]", *kinds], lines)


def summary(results: Row) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    parts = [f"{results['machine']}, {versions}; medians of {results['repeats']} runs.\n"]
    parts += ["## Fastest\n", overview(results["problems"])]
    parts += ["## Targets\n", targets(results)]
    for name, rows in results["problems"].items():
        parts += [f"## {name}, at equal errors of the gradient\n", equal_errors(rows)]
    sections: dict[str, tuple[str, Callable[[Any], str]]] = {
        "growth": ("Growth", growth),
        "memories": ("Memory, compiled only", memories),
        "checkpoints": ("Checkpoints of Tsit5, batched network, 128 steps", checkpoints),
        "devices": ("A batch on one device, and split between eight", devices),
    }
    for key, (title, section) in sections.items():
        if key in results:
            parts += [f"## {title}\n", section(results[key])]
    return "\n".join(parts)


def details(results: Row) -> str:
    """Tables of every point."""
    parts = []
    for name, rows in results["problems"].items():
        parts += [f"## {name}, every point\n", points(rows)]
    return "\n".join(parts)


def plot(results: Row, folder: pathlib.Path) -> None:
    problems = results["problems"]
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    layout: dict[str, Any] = dict(layout="constrained", squeeze=False)
    fig, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4.5 * lines), **layout)
    for ax, (name, rows) in zip(axes.flat, problems.items(), strict=False):
        _plot_times(ax, rows)
        ax.set(title=name, xlabel="relative error of the gradient", ylabel="time [s]")
    fig.savefig(folder / "speed_time.png", dpi=150)
    if "memories" not in results:
        return
    fig, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    rows = results["memories"]["batched network"]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        style = "o-" if method.startswith("ALF") else ".--"
        steps, memory = zip(*((r["steps"], r["memory"]) for r in of_method), strict=True)
        ax.loglog(steps, memory, style, label=method)
    ax.set(title="batched network", xlabel="steps", ylabel="temporary memory [bytes]")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(folder / "speed_memory.png", dpi=150)


def _plot_times(ax, rows: list[Row]) -> None:
    """Times against errors: one colour per method, dotted lines for fixed steps."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, matplotlib.color_sequences["tab20"], strict=False))
    markers = {OURS: "o", LEAN: "s", APART: "x"}
    for sweep in sweeps(rows):
        if not sweep.rows:
            continue
        error, time = zip(*((r["error"], median(r)) for r in sweep.rows), strict=True)
        ax.loglog(
            *(error, time),
            ":" if sweep.kind == "fixed" else "-",
            marker=markers[sweep.group],
            markersize=4,
            color=colours[sweep.method],
            label=sweep.method,
        )
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    # One entry for both fixed and adaptive steps.
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), fontsize=6)
