"""Are solutions as accurate as their tolerances? Errors relative to those of `Dopri5`.

Problems of all kinds (`solutions_problems.py`) are solved under
`PIDController(rtol=tol, atol=tol)`, in double and single precision. Where entries have
different sizes, `atol` is in proportion to them. The error is the largest of any entry at
any time, in units of what the tolerance allows this entry. It is measured at the ends of
steps and at 200 times between them. Each error is given as a multiple of that of `Dopri5`,
which counts as no smaller than rounding errors. The exact solution is that of `Dopri8` with
a tolerance of 1e-13.

For every family and every group of problems, the script prints the largest of these
multiples at steps and between them, and the number beyond 10. It then lists each solve
beyond 10. A solve that fails counts as beyond, unless that of `Dopri5` fails as well.

    python solutions.py          # twelve minutes on two cores
    python solutions.py --quick  # a part of it; none may be beyond
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from solutions_problems import DETEST, GROUPS, left_half_plane, Problem

import diffrax_reversible as dr


jax.config.update("jax_enable_x64", True)

BEYOND = 10
MAX_STEPS = 32_768
OUTPUTS = 200
TOLERANCES = {
    "float64": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8),
    "float32": (1e-1, 1e-2, 1e-3, 1e-4),
}
SOLVERS = {
    "ALF4": dr.ALF4(),
    "ALF6": dr.ALF6(),
    "ALF8": dr.ALF8(),
    "McCallumFoster(Dopri5)": dr.McCallumFoster(dfx.Dopri5()),
}
SPLITTINGS = {
    "BlanesMoan4": dr.BlanesMoan4(nystrom=True),
    "BlanesMoan6": dr.BlanesMoan6(nystrom=True),
    "KahanLi8": dr.KahanLi8(),
}
# The factor by which rounding errors may grow in the course of a solve.
ROUNDING = 100
QUICK = {
    "left half-plane": {"linear": left_half_plane((3, 100), (90, 135, 180))},
    "entries of many sizes": {
        name: GROUPS["entries of many sizes"][name] for name in ("two arrays, size 1e-10",)
    },
    "DETEST": {name: DETEST[name] for name in ("E2",)},
}


def cast(tree, dtype):
    def to_dtype(x):
        return jnp.asarray(x, dtype) if eqx.is_inexact_array_like(x) else x

    return jax.tree.map(to_dtype, tree)


def terms_of(problem: Problem, splits: bool):
    if splits:
        assert problem.separate is not None
        return tuple(map(dfx.ODETerm, problem.separate))
    return dfx.ODETerm(problem.field)


class Errors(NamedTuple):
    """Errors in units of the tolerance."""

    at_steps: float
    between: float


def exact(problem: Problem) -> Callable[[Any, Any], Any]:
    """The interpolated solution as a function of the case, compiled once."""

    @eqx.filter_jit
    def solve(y0, args):
        sol = dfx.diffeqsolve(
            terms_of(problem, splits=False),
            dfx.Dopri8(),
            0.0,
            problem.t1,
            None,
            y0,
            args,
            saveat=dfx.SaveAt(dense=True),
            stepsize_controller=dfx.PIDController(
                rtol=1e-13, atol=jnp.asarray(1e-13 * np.asarray(problem.sizes))
            ),
            max_steps=MAX_STEPS,
        )
        return sol.interpolation

    return solve


@eqx.filter_jit
def evaluate(interpolation, ts):
    return jax.vmap(interpolation.evaluate)(ts)


def errors_of(problem: Problem, solver, dtype) -> Callable[..., Errors]:
    """Errors as a function of the case, its exact solution and the tolerance, compiled
    once."""
    times = jnp.linspace(0, problem.t1, OUTPUTS + 2)[1:-1].astype(dtype)

    @eqx.filter_jit
    def solve(y0, args, tol):
        steps, ts = dfx.SubSaveAt(steps=True), dfx.SubSaveAt(ts=times)
        sol = dfx.diffeqsolve(
            terms_of(problem, isinstance(solver, tuple(map(type, SPLITTINGS.values())))),
            solver,
            jnp.zeros((), dtype),
            jnp.asarray(problem.t1, dtype),
            None,
            y0,
            args,
            saveat=dfx.SaveAt(subs=[steps, ts]),
            stepsize_controller=dfx.PIDController(
                rtol=tol, atol=tol * jnp.asarray(problem.sizes, dtype)
            ),
            max_steps=MAX_STEPS,
            throw=False,
        )
        assert sol.ts is not None and sol.ys is not None
        return sol.ts, sol.ys, sol.result == dfx.RESULTS.successful

    eps = float(jnp.finfo(dtype).eps)

    def errors(y0, args, solution, tol) -> Errors:
        y0, args = cast((y0, args), dtype)
        ts, ys, successful = solve(y0, args, jnp.asarray(tol, dtype))
        if not successful:
            return Errors(np.inf, np.inf)
        grid = jnp.linspace(0, problem.t1, 1001)
        leaves = jax.tree.leaves(evaluate(solution, grid))
        units = [
            (tol + ROUNDING * eps) * (np.max(np.abs(y), axis=0) + problem.sizes)
            for y in leaves
        ]
        found = []
        for t, y in zip(ts, ys, strict=True):
            # Unwritten times are infinite.
            known = np.isfinite(t)
            clipped = jnp.where(known, t, 0).astype(jnp.float64)
            true = jax.tree.leaves(evaluate(solution, clipped))
            parts = zip(jax.tree.leaves(y), true, units, strict=True)
            scaled = [np.max(np.abs(a - b)[known] / unit) for a, b, unit in parts]
            found.append(float(np.nan_to_num(np.max(scaled), nan=np.inf)))
        return Errors(*found)

    return errors


class Row(NamedTuple):
    """One solve, with its errors as multiples of those of `Dopri5`."""

    family: str
    group: str
    dtype: str
    case: str
    tol: float
    multiples: Errors


def multiple(error: float, other: float, floor: float) -> float:
    if np.isinf(other):
        return 0.0
    return error / max(other, floor)


def sweep(groups: dict[str, dict[str, Problem]]) -> Iterable[Row]:
    cells = [(g, n, p) for g, problems in groups.items() for n, p in problems.items()]
    for group, name, problem in tqdm.tqdm(cells):
        truth = exact(problem)
        solutions = {
            case: truth(*cast(start, jnp.float64)) for case, start in problem.cases.items()
        }
        solvers = SOLVERS if problem.separate is None else SOLVERS | SPLITTINGS
        for dtype, tolerances in TOLERANCES.items():
            beside = errors_of(problem, dfx.Dopri5(), dtype)
            others = {
                (case, tol): beside(*start, solutions[case], tol)
                for case, start in problem.cases.items()
                for tol in tolerances
            }
            for family, solver in solvers.items():
                ours = errors_of(problem, solver, dtype)
                for (case, tol), other in others.items():
                    errors = ours(*problem.cases[case], solutions[case], tol)
                    floor = ROUNDING * float(jnp.finfo(dtype).eps) / tol
                    multiples = (
                        multiple(a, b, floor) for a, b in zip(errors, other, strict=True)
                    )
                    label = f"{name} {case}".strip()
                    yield Row(family, group, dtype, label, tol, Errors(*multiples))
        jax.clear_caches()


def table(rows: list[Row]) -> str:
    header = ["family", "problems", "dtype", "solves", "at steps", "between", "beyond"]
    lines = [header, ["---"] * len(header)]
    groups: dict[tuple[str, str, str], list[Errors]] = {}
    for row in rows:
        key = row.family, row.group, row.dtype
        groups.setdefault(key, []).append(row.multiples)
    for key, found in groups.items():
        worst = np.max(found, axis=0)
        beyond = sum(max(errors) > BEYOND for errors in found)
        lines.append([*key, str(len(found)), *(f"{x:.1f}" for x in worst), str(beyond)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = list(sweep(QUICK if quick else GROUPS))
    print(table(rows))
    beyond = [row for row in rows if max(row.multiples) > BEYOND]
    print(f"\n{len(rows)} solves, of which {len(beyond)} beyond {BEYOND}")
    for row in beyond:
        at_steps, between = row.multiples
        print(
            f"{row.family}, {row.dtype}, {row.tol:.0e}, {row.group}, {row.case}: "
            f"{at_steps:.1f} at steps, {between:.1f} between"
        )
    if quick:
        assert len(beyond) == 0
    print("OK")


if __name__ == "__main__":
    main()
