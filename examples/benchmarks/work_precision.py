"""Errors and evaluations under `PIDController(rtol=tol, atol=tol)`.

The solvers of this package, and `Dopri5`, `Tsit5` and `Dopri8` of Diffrax, solve six
problems with tolerances from 1e-3 to 1e-10. The error is the largest of the final state,
relative to the largest entry of the final state of a reference (`Dopri8` with a tolerance
of 1e-14). Evaluations are those of accepted and rejected steps, of restarts, and of the
start.

For every solver and tolerance, the script prints

- the ratio of its error to that of `Dopri5` at the same tolerance, the largest over all
    problems, which has to be below 30 for the solvers of this package;
- the share of steps that were rejected;
- the evaluations for an error, interpolated between tolerances, as a multiple of the
    fewest, in the geometric mean over the problems.

The plot shows evaluations against errors.

The default controller looks only at the last error. Where the step size has to shrink
sharply, it rejects up to a third of the steps, whatever the solver. With `--pi` it looks at
the last two errors. The check is then that less than 15 % of the steps of the solvers of
this package are rejected, instead of the bound on errors.

    python work_precision.py          # a minute on two cores; writes work_precision.png
    python work_precision.py --pi     # with `pcoeff=0.4, icoeff=0.2`
    python work_precision.py --quick  # two of the problems, and three of the tolerances
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tqdm

import diffrax_reversible as dr


matplotlib.use("agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

TOLERANCES = 10.0 ** -np.arange(3, 11)
MAX_STEPS = 100_000
# Evaluations per step. For Diffrax's solvers the last does not count if it is the first of
# the next step.
SOLVERS: dict[str, tuple[Any, int]] = {
    "ALF4": (dr.ALF4(), 5),
    "ALF6": (dr.ALF6(), 20),
    "ALF8": (dr.ALF8(), 34),
    "Dopri5": (dfx.Dopri5(), 6),
    "Tsit5": (dfx.Tsit5(), 6),
    "Dopri8": (dfx.Dopri8(), 13),
}
OURS = ("ALF4", "ALF6", "ALF8")


class Problem(NamedTuple):
    field: Callable
    y0: Any
    t1: float


def kepler(t, y, args):
    del t, args
    q, p = y[:2], y[2:]
    return jnp.concatenate([p, -q / jnp.sum(q**2) ** 1.5])


def lotka_volterra(t, y, args):
    del t, args
    a, b = y
    return jnp.stack([a * (1.5 - b), b * (a - 3)])


def arenstorf(t, y, args):
    """Three bodies, one without mass, in a rotating frame: Hairer, Nørsett & Wanner (1993),
    *Solving Ordinary Differential Equations I*, section II.0."""
    del t, args
    mu = 0.012277471
    q, p = y[:2], y[2:]
    to_earth, to_moon = q + jnp.array([mu, 0.0]), q - jnp.array([1 - mu, 0.0])
    pull = (1 - mu) * to_earth / jnp.sum(to_earth**2) ** 1.5
    pull += mu * to_moon / jnp.sum(to_moon**2) ** 1.5
    coriolis = 2 * jnp.array([p[1], -p[0]])
    return jnp.concatenate([p, q + coriolis - pull])


def pendulum(t, y, args):
    del args
    q, p = y
    return jnp.stack([p, -jnp.sin(q) + 0.5 * jnp.cos(0.8 * t)])


def network(t, y, args):
    del args
    mlp = eqx.nn.MLP(8, 8, 32, 2, activation=jnp.tanh, key=jax.random.key(0))
    return 3 * mlp(y) + 0.5 * jnp.sin(3 * t)


def van_der_pol(t, y, args):
    del t, args
    q, p = y
    return jnp.stack([p, (1 - q**2) * p - q])


PROBLEMS = {
    "Kepler, e = 0.9": Problem(kepler, [0.1, 0.0, 0.0, np.sqrt(19.0)], 2 * np.pi),
    "Lotka–Volterra": Problem(lotka_volterra, [1.0, 1.0], 10.0),
    "Arenstorf": Problem(
        arenstorf, [0.994, 0.0, 0.0, -2.00158510637908252], 17.0652165601579625
    ),
    "forced pendulum": Problem(pendulum, [1.0, 0.0], 20.0),
    "tanh network": Problem(network, np.linspace(-1.0, 1.0, 8), 5.0),
    "van der Pol, μ = 1": Problem(van_der_pol, [2.0, 0.0], 20.0),
}


class Outcome(NamedTuple):
    y1: jax.Array
    num_steps: jax.Array
    num_rejected_steps: jax.Array
    num_restarts: jax.Array


def make_solve(problem: Problem, solver: Any, coeffs: dict) -> Callable[[float], Outcome]:
    """The solve as a function of the tolerance, compiled once."""
    reversible = isinstance(solver, dr.AbstractReversibleSolver)
    adjoint = dr.ReversibleAdjoint() if reversible else dfx.RecursiveCheckpointAdjoint()

    @jax.jit
    def solve(tol):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(problem.field),
            solver,
            0.0,
            problem.t1,
            None,
            jnp.array(problem.y0),
            stepsize_controller=dfx.PIDController(rtol=tol, atol=tol, **coeffs),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        restarts = sol.stats.get("num_restarts", jnp.array(0))
        steps, rejected = sol.stats["num_steps"], sol.stats["num_rejected_steps"]
        assert sol.ys is not None
        return Outcome(sol.ys[0], steps, rejected, restarts)

    return solve


def measure(
    problems: dict[str, Problem], tolerances, coeffs: dict
) -> dict[tuple[str, str], np.ndarray]:
    """For each problem and solver, one row per tolerance: error, evaluations, steps and
    rejected steps."""
    results = {}
    for name, problem in tqdm.tqdm(problems.items(), desc="problems", leave=False):
        exact = make_solve(problem, dfx.Dopri8(), {})(1e-14).y1
        for solver_name, (solver, stages) in SOLVERS.items():
            solve, rows = make_solve(problem, solver, coeffs), []
            for tol in tolerances:
                out = solve(tol)
                error = np.max(np.abs(out.y1 - exact)) / np.max(np.abs(exact))
                evaluations = stages * out.num_steps + out.num_restarts + 2
                rows.append((error, evaluations, out.num_steps, out.num_rejected_steps))
            results[name, solver_name] = np.array(rows, float)
    return results


def print_ratios(results, problems, tolerances):
    header = "".join(f"{tol:10.0e}" for tol in tolerances)
    print(f"error, in units of that of Dopri5: worst problem\n{'':8}{header}")
    worst = {}
    for solver in SOLVERS:
        ratios = [results[p, solver][:, 0] / results[p, "Dopri5"][:, 0] for p in problems]
        worst[solver] = np.max(ratios, axis=0)
        print(f"{solver:8}" + "".join(f"{ratio:10.2g}" for ratio in worst[solver]))
    print(f"\nrejected steps [%]\n{'':8}{header}")
    rejected = {}
    for solver in SOLVERS:
        totals = np.sum([results[p, solver][:, 2:] for p in problems], axis=0)
        rejected[solver] = shares = 100 * totals[:, 1] / totals[:, 0]
        print(f"{solver:8}" + "".join(f"{share:10.1f}" for share in shares))
    return worst, rejected


def evaluations_for(rows, error):
    """The evaluations interpolated at an error, NaN outside the measured errors."""
    log_error, log_evaluations = np.log(rows[:, 0]), np.log(rows[:, 1])
    # Where more work gives a larger error, the smaller error before it counts.
    log_error = np.minimum.accumulate(log_error)
    args = -np.log(error), -log_error, log_evaluations
    return np.exp(np.interp(*args, left=np.nan, right=np.nan))


def print_evaluations(results, problems, errors):
    header = "".join(f"{error:10.0e}" for error in errors)
    print(f"\nevaluations for an error, in units of the fewest\n{'':8}{header}")
    table = np.array(
        [
            [[evaluations_for(results[p, s], error) for error in errors] for p in problems]
            for s in SOLVERS
        ]
    )
    # Problems on which every solver reached that error.
    covered = np.all(np.isfinite(table), axis=0)
    with np.errstate(invalid="ignore"):
        logs = np.where(covered, np.log(table), 0).sum(axis=1) / covered.sum(axis=0)
    for solver, row in zip(SOLVERS, np.exp(logs - logs.min(axis=0)), strict=True):
        print(f"{solver:8}" + "".join(f"{x:10.2f}" for x in row))


def plot(results, problems, path):
    fig, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained", squeeze=False)
    for ax, problem in zip(axes.flat, problems, strict=False):
        for solver in SOLVERS:
            error, evaluations = results[problem, solver][:, :2].T
            style = "o-" if solver in OURS else ".--"
            ax.loglog(error, evaluations, style, label=solver)
        ax.invert_xaxis()
        ax.set(title=problem, xlabel="relative error", ylabel="evaluations")
        ax.grid(alpha=0.3)
    axes.flat[0].legend()
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pi", action="store_true")
    options = parser.parse_args()
    quick, coeffs = options.quick, dict(pcoeff=0.4, icoeff=0.2) if options.pi else {}
    problems, tolerances = PROBLEMS, TOLERANCES
    if quick:
        problems = {name: PROBLEMS[name] for name in ("Lotka–Volterra", "tanh network")}
        tolerances = TOLERANCES[:5:2]
    results = measure(problems, tolerances, coeffs)
    ratios, rejected = print_ratios(results, problems, tolerances)
    errors = 10.0 ** -np.arange(2, 6 if quick else 10)
    print_evaluations(results, problems, errors)
    if not (quick or options.pi):
        plot(results, problems, pathlib.Path(__file__).with_suffix(".png"))
    checked, bound = (rejected, 15) if options.pi else (ratios, 30)
    worst = max(np.max(checked[solver]) for solver in OURS)
    assert worst < bound, worst
    print("OK")
