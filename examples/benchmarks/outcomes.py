"""The outcome of a gradient: right, or refused, but never wrong.

Solvers of all families differentiate problems that are conservative, contracting, chaotic
or unstable under the default `ReversibleAdjoint()`, in single and double precision, with
steps from far too long to very short. A gradient that is returned has to agree with the
stored gradient: that of the same solver with the same steps under
`RecursiveCheckpointAdjoint`, made to store the trajectory. The two agree

- within 400 times the drift that `ReversibleAdjoint` allows by default: within 4e-4 in
    float64, and 0.14 in float32;
- or, if the backward pass has restarted in place of the solve, the returned one is nearer
    to the gradient of the exact solution, as fast modes that have died out spoil the other,
    or at most a tenth further from it: steps that are too large for the solution have
    another gradient if some of them restart;
- or within three times the effect of rounding. This compares the distance of the returned
    gradient from the stored one in double precision with that of the stored gradient, and
    with those for initial states that differ by one or two units in the last place. A
    solver that cannot restart may grow to 1e80 where the solution is of order one; with
    sines in its vector field, only two digits of its gradient are determined, and in single
    precision not even its size.

The table has the smaller of the distances from the stored gradient and from that in double
precision, relative to the Euclidean norm, or the reason why there is none:

- `refused`: the backward pass missed the initial state or a known state, or met infinite
    values, or the gradient grew where the solution contracts;
- `false alarm`: a gradient was refused that is within 1e-3 of the stored one, which itself
    is within 0.1 of the gradient of the exact solution. Steps that are too large to be
    stable have gradients that are right for these steps and useless;
- `other`: the two forward passes, which are compiled separately and round differently, end
    further apart than ten times the square root of the machine epsilon, so that their
    gradients cannot be compared. Chaos causes this, above all in float32.

    python outcomes.py          # 50 minutes on one core
    python outcomes.py --quick  # a part of it
"""

import argparse
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import diffrax_reversible as dr


jax.config.update("jax_enable_x64", True)

# A refused gradient that is closer than `FALSE_ALARM` to the stored one is a false alarm,
# if the stored one is closer than `USEFUL` to the exact one.
FALSE_ALARM, USEFUL = 1e-3, 0.1
# A restarted gradient may be so many times as far from the exact one as the stored one.
AS_NEAR = 1.1


class Problem(NamedTuple):
    """`y' = field(t, y, parameter)` up to `t1`. The loss is a sum of squares."""

    field: Callable
    y0: Any
    parameter: Any
    t1: float


def relaxation(t, y, rate):
    a, b = y
    return jnp.stack([-rate * (a - jnp.cos(t)) + 0.3 * b, jnp.sin(a) - 0.1 * b])


def heat(t, y, conductivity):
    del t
    return conductivity * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1))


def lorenz(t, y, rayleigh):
    del t
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (rayleigh - c) - b, a * b - 8 / 3 * c])


def van_der_pol(t, y, mu):
    del t
    q, p = y
    return jnp.stack([p, mu * (1 - q**2) * p - q])


def kepler(t, y, mass):
    del t
    q, p = y[:2], y[2:]
    return jnp.concatenate([p, -mass * q / jnp.sum(q**2) ** 1.5])


def lotka_volterra(t, y, rate):
    del t
    a, b = y
    return jnp.stack([rate * a * (1.5 - b), b * (a - 3)])


def network(t, y, mlp):
    del t
    return 2 * mlp(y)


def explosion(t, y, rate):
    del t
    return rate * y**2


def _mlp():
    return eqx.nn.MLP(
        8, 8, 32, 2, activation=jnp.tanh, dtype=jnp.float64, key=jax.random.key(0)
    )


PROBLEMS = {
    "Kepler, e = 0.6, T = 30": Problem(kepler, [0.4, 0.0, 0.0, 2.0], 1.0, 30.0),
    "Kepler, e = 0.95, T = 30": Problem(kepler, [0.05, 0.0, 0.0, 39**0.5], 1.0, 30.0),
    "Lotka-Volterra, T = 20": Problem(lotka_volterra, [1.0, 1.0], 1.0, 20.0),
    "tanh network, T = 20": Problem(network, np.linspace(-1, 1, 8), _mlp(), 20.0),
    "relaxation, λT = 30": Problem(relaxation, [1.0, 0.5], 3.0, 10.0),
    "relaxation, λT = 200": Problem(relaxation, [1.0, 0.5], 10.0, 20.0),
    "relaxation, λT = 800": Problem(relaxation, [1.0, 0.5], 40.0, 20.0),
    "heat, λT = 400": Problem(heat, np.sin(np.arange(32.0)) ** 3, 1.0, 100.0),
    "van der Pol, μ = 5, T = 20": Problem(van_der_pol, [2.0, 0.0], 5.0, 20.0),
    "Lorenz, T = 3": Problem(lorenz, [1.0, 2.0, 20.0], 28.0, 3.0),
    "Lorenz, T = 10": Problem(lorenz, [1.0, 2.0, 20.0], 28.0, 10.0),
    "Lorenz, T = 20": Problem(lorenz, [1.0, 2.0, 20.0], 28.0, 20.0),
    "y' = y², to infinity": Problem(explosion, [1.0, 0.5], 1.0, 1.2),
}
SOLVERS = {
    "ALF2": dr.ALF2(),
    "ALF4": dr.ALF4(),
    "ALF6": dr.ALF6(),
    "ALF8": dr.ALF8(),
    "ALF4, compensated": dr.ALF4(compensated=True),
    "ALF4, bitwise": dr.ALF4(bitwise=True),
    "McCallumFoster, Tsit5": dr.McCallumFoster(dfx.Tsit5()),
    "ReversibleHeun": dfx.ReversibleHeun(),
    "LeapfrogMidpoint": dfx.LeapfrogMidpoint(),
}
STEPS = (30, 100, 300, 1000, 3000, 10_000)
DTYPES = (jnp.float64, jnp.float32)

MAX_STEPS = STEPS[-1] + 100
# Every step is stored. With fewer checkpoints this adjoint recomputes steps, which round
# differently, and on chaotic problems its own gradients are wrong.
STORE = dfx.RecursiveCheckpointAdjoint(checkpoints=MAX_STEPS)
RESTARTED: list[int] = []
WALK_BACK = dr.ReversibleAdjoint(report=lambda r: RESTARTED.append(r["restarted_steps"]))
ANYWAY = dr.ReversibleAdjoint(drift_tol=float("inf"))

FIXED: dfx.AbstractStepSizeController = dfx.ConstantStepSize()
ACCURATE = dfx.PIDController(rtol=1e-11, atol=1e-11)


def cast(tree, dtype):
    def to_dtype(x):
        return jnp.asarray(x, dtype) if eqx.is_inexact_array_like(x) else x

    return jax.tree.map(to_dtype, tree)


class Gradient(NamedTuple):
    grad: np.ndarray
    y1: np.ndarray
    restarted: bool


def gradient(
    problem: Problem,
    solver,
    adjoint,
    dtype,
    controller: dfx.AbstractStepSizeController = FIXED,
) -> Callable[[int], Gradient]:
    """The gradient as a function of the number of steps, compiled once."""
    y0 = jnp.asarray(problem.y0, dtype)
    params, static = eqx.partition(cast(problem.parameter, dtype), eqx.is_inexact_array)

    @jax.jit
    def run(steps):
        def loss(y0, params):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(problem.field),
                solver,
                jnp.zeros((), dtype),
                jnp.asarray(problem.t1, dtype),
                (problem.t1 / steps).astype(dtype),
                y0,
                eqx.combine(params, static),
                adjoint=adjoint,
                stepsize_controller=controller,
                max_steps=MAX_STEPS,
                throw=False,
            )
            assert sol.ys is not None
            return jnp.sum(sol.ys**2), sol.ys[0]

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(y0, params)

    def solve(steps) -> Gradient:
        grad, y1 = run(jnp.asarray(float(steps)))
        leaves = [np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grad)]
        restarted = False
        if adjoint is WALK_BACK:
            jax.effects_barrier()
            restarted = RESTARTED.pop() > 0
        return Gradient(np.concatenate(leaves), np.asarray(y1, np.float64), restarted)

    return solve


class Outcome(NamedTuple):
    """The outcome of one gradient."""

    text: str
    returned: bool
    wrong: bool = False
    false_alarm: bool = False


def distance(a: np.ndarray, b: np.ndarray) -> float:
    scale = np.max(np.abs(b))
    return float(np.linalg.norm(a / scale - b / scale) / np.linalg.norm(b / scale))


def outcome(
    ours: Gradient,
    anyway: Callable[[], Gradient],
    stored: Gradient,
    reference: Gradient,
    nudged: Callable[[], list[Gradient]],
    exact: Gradient,
    dtype,
) -> Outcome:
    """Judge a gradient. `anyway` returns it without refusals, `reference` is the stored
    gradient in double precision, `nudged` returns stored ones for initial states that
    differ by rounding, and `exact` is the gradient of the exact solution."""
    precision = float(jnp.finfo(dtype).eps) ** 0.5
    allowed = max(precision, 1e-6)
    # Distances from non-finite values are NaN, and fail every comparison.
    with np.errstate(invalid="ignore"):
        if np.any(np.isnan(ours.grad)):
            refused = anyway()
            same = distance(refused.y1, stored.y1) <= 10 * precision
            error = distance(refused.grad, stored.grad)
            useful = distance(stored.grad, exact.grad) <= USEFUL
            if same and useful and error <= FALSE_ALARM:
                return Outcome(f"false alarm: {error:.0e}", False, false_alarm=True)
            return Outcome("refused", False)
        if not distance(ours.y1, stored.y1) <= 10 * precision:
            return Outcome("other", True)
        error = distance(ours.grad, stored.grad)
        true_error = distance(ours.grad, reference.grad)
        rounding = distance(stored.grad, reference.grad)
        right = error <= 400 * allowed or true_error <= 3 * rounding
        if ours.restarted:
            allowed = AS_NEAR * distance(stored.grad, exact.grad)
            right = right or distance(ours.grad, exact.grad) <= allowed
        if not right:
            others = [distance(other.grad, reference.grad) for other in nudged()]
            right = true_error <= 3 * max(others)
    smaller = np.nanmin([error, true_error, np.inf])
    return Outcome("WRONG: " * (not right) + f"{smaller:.0e}", True, not right)


def nudge(problem: Problem, solver, dtype, steps: int) -> list[Gradient]:
    """Stored gradients for initial states that differ in the last bits."""
    y0 = np.asarray(problem.y0, jnp.dtype(dtype))
    states = (y0 + ulps * np.spacing(y0) for ulps in (-2, -1, 1, 2))
    return [gradient(problem._replace(y0=y), solver, STORE, dtype)(steps) for y in states]


def sweep(problems, solvers, steps) -> list[tuple[str, str, str, list[Outcome]]]:
    rows = []
    cells = [(p, s) for p in problems for s in solvers]
    for name, solver_name in tqdm.tqdm(cells):
        problem, solver = PROBLEMS[name], SOLVERS[solver_name]
        exact = gradient(problem, dfx.Dopri8(), STORE, jnp.float64, ACCURATE)(1000)
        reference = gradient(problem, solver, STORE, jnp.float64)
        for dtype in DTYPES:
            nudged = ft.partial(nudge, problem, solver, dtype)
            ours, anyway, stored = (
                gradient(problem, solver, adjoint, dtype)
                for adjoint in (WALK_BACK, ANYWAY, STORE)
            )
            row = [
                outcome(
                    ours(n),
                    ft.partial(anyway, n),
                    stored(n),
                    reference(n),
                    ft.partial(nudged, n),
                    exact,
                    dtype,
                )
                for n in steps
            ]
            rows.append((name, solver_name, jnp.dtype(dtype).name, row))
        jax.clear_caches()
    return rows


def table(rows, steps) -> str:
    header = ["problem", "solver", "dtype", *(f"{n} steps" for n in steps)]
    lines = [header, ["---"] * len(header)]
    for *names, row in rows:
        lines.append([*names, *(o.text for o in row)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    problems = list(PROBLEMS)[5:6] if quick else list(PROBLEMS)
    solvers = list(SOLVERS)[1:2] if quick else list(SOLVERS)
    steps = STEPS[1::2] if quick else STEPS
    rows = sweep(problems, solvers, steps)
    print(table(rows, steps))
    outcomes = [o for *_, row in rows for o in row]
    returned, wrong = sum(o.returned for o in outcomes), sum(o.wrong for o in outcomes)
    alarms = sum(o.false_alarm for o in outcomes)
    print(
        f"\n{len(outcomes)} gradients, of which {returned} returned and {wrong} wrong, and "
        f"{alarms} refused by a false alarm"
    )
    assert wrong == 0
    print("OK")


if __name__ == "__main__":
    main()
