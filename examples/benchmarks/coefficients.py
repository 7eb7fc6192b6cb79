"""Search for compositions of asynchronous leapfrog with a small error per evaluation.

A composition is a palindrome of `s` sub-step lengths. The search imposes the order
conditions of all rooted trees up to the order, on both halves of the state `(z, v)`, and
minimises the residuals of the trees of the next order:

    E = s |tau_z|^(1/p),    |tau|^2 = sum over trees ((weight - exact weight) / symmetry)^2,

with `p` the order. The error of `n` evaluations is about `(E / n)^p`, so the evaluations
for an error are proportional to `E`. The search starts from random half-palindromes.
Levenberg-Marquardt steps lower conditions and residuals together, with growing weights on
the conditions. Newton steps then satisfy the conditions. The same seed gives the same
result.

- `E(v)`: the same for `v`, which decides where the flow contracts. By symmetry, it vanishes
    at the next order if the number of sub-steps is even.
- `imaginary`: the limit of stability along the imaginary axis, per evaluation. A step of
    `y' = i w y` is stable if `w h <= s * imaginary`. Compositions with less than
    `--stability` are left out.
- `|c|`: the sum of the absolute lengths, which tells how a step magnifies where the flow
    contracts.
- `trials`: errors of fixed steps, relative to those of this package's solver of the same
    order with as many evaluations: on a tanh network, Kepler's problem, and a problem that
    contracts.

    python coefficients.py                       # orders 4, 6 and 8; 15 minutes
    python coefficients.py --order 4 --sub-steps 10 --starts 400
    python coefficients.py --quick
"""

import argparse
import functools
import itertools as it
import math
import operator
from collections.abc import Callable
from typing import Any, cast, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import least_squares
from speed_problems import kepler, small_network

import diffrax_reversible as dr
from diffrax_reversible._coefficients.rooted_trees import density, rooted_trees, RootedTree


jax.config.update("jax_enable_x64", True)

TODAY = {4: dr.ALF4(), 6: dr.ALF6(), 8: dr.ALF8()}
# Numbers of sub-steps for each order. For order 8, sub-steps come in pairs.
SEARCHES = {4: (5, 7, 8, 9, 10, 11), 6: (14, 15, 16, 18, 20), 8: (30, 34, 38)}
STARTS = {4: 400, 6: 400, 8: 60}
# Evaluations of each trial.
EVALUATIONS = {4: (180, 6000, 360), 6: (360, 6000, 360), 8: (720, 6000, 720)}


@functools.cache
def symmetry(tree: RootedTree) -> int:
    """The number of permutations of its vertices that leave a tree unchanged."""
    repeated = (len(list(group)) for _, group in it.groupby(tree))
    return math.prod(map(math.factorial, repeated)) * math.prod(map(symmetry, tree))


class Conditions(NamedTuple):
    """The residuals of the order conditions, divided by the symmetry of each tree.

    - `up_to_order`: those of `z` and `v`, for every tree up to the order.
    - `z`, `v`: those for every tree of the next order.
    """

    up_to_order: Float[Array, " conditions"]
    z: Float[Array, " trees"]
    v: Float[Array, " trees"]


def conditions(sub_steps: Float[Array, " s"], order: int) -> Conditions:
    """The conditions of `ALFTableau`, in JAX so that they can be differentiated."""
    s = len(sub_steps)
    unit = jnp.eye(s + 1)
    z, v, rows = jnp.zeros(s + 1), unit[0], [jnp.zeros(s + 1)]
    for c, u in zip(sub_steps, unit[1:], strict=True):
        rows.append(z + c / 2 * v)
        z, v = z + c * u, 2 * u - v
    stages = jnp.stack(rows)
    summed: dict[RootedTree, Array] = {}
    z_off, v_off = [], []
    for n in range(1, order + 2):
        trees = rooted_trees(n)
        factors = ([summed[child] for child in tree] for tree in trees)
        phi = jnp.stack(
            [functools.reduce(operator.mul, f, jnp.ones(s + 1)) for f in factors], axis=1
        )
        summed |= dict(zip(trees, (stages @ phi).T, strict=True))
        weights = np.array([1 / symmetry(tree) for tree in trees])
        z_exact = np.array([1 / density(tree) for tree in trees])
        v_exact = np.array([math.prod(1 / density(t) for t in tree) for tree in trees])
        z_off.append(weights * (z @ phi - z_exact))
        v_off.append(weights * (v @ phi - v_exact))
    return Conditions(jnp.concatenate([*z_off[:-1], *v_off[:-1]]), z_off[-1], v_off[-1])


def palindrome(free: Float[Array, " n"], s: int, pairs: bool) -> Float[Array, " s"]:
    """A palindrome that sums to one. Its middle follows from the rest."""
    if pairs:
        return jnp.repeat(palindrome(free, s // 2, False) / 2, 2)
    middle = [1 - 2 * jnp.sum(free)] if s % 2 == 1 else 2 * [0.5 - jnp.sum(free)]
    return jnp.concatenate([free, jnp.stack(middle), free[::-1]])


def stable_along_imaginary_axis(sub_steps: np.ndarray) -> float:
    """The limit of `w h` up to which all steps are stable, per evaluation."""
    omegas = np.linspace(0, len(sub_steps), 4001)[1:]
    step = np.broadcast_to(np.eye(2, dtype=complex), (len(omegas), 2, 2))
    for c in sub_steps:
        # The map of `(z, h v)`.
        rows = [1 + 1j * omegas * c, c * c * 1j * omegas / 2, 2j * omegas]
        rows.append(1j * omegas * c - 1)
        step = np.stack(rows, axis=-1).reshape(-1, 2, 2) @ step
    unstable = np.abs(np.linalg.eigvals(step)).max(axis=1) > 1 + 1e-6
    last = np.argmax(unstable) if unstable.any() else len(omegas) - 1
    return float(omegas[last] / len(sub_steps))


class Found(NamedTuple):
    sub_steps: np.ndarray
    z_error: float
    v_error: float
    imaginary: float

    @staticmethod
    def judge(sub_steps: np.ndarray, order: int) -> "Found":
        _, z, v = conditions(jnp.asarray(sub_steps), order)

        def error(off):
            return len(sub_steps) * float(jnp.linalg.norm(off)) ** (1 / order)

        stable = stable_along_imaginary_axis(sub_steps)
        return Found(sub_steps, error(z), error(v), stable)


def search(order: int, s: int, starts: int, stability: float, seed: int = 0) -> list[Found]:
    """The compositions found, best first."""
    pairs = order == 8
    size = ((s // 2 if pairs else s) - 1) // 2

    @jax.jit
    def off(free, weight):
        all_, z, v = conditions(palindrome(free, s, pairs), order)
        return jnp.concatenate([weight * all_, z, 0.3 * v])

    @jax.jit
    def violated(free):
        return conditions(palindrome(free, s, pairs), order).up_to_order

    off_jac, violated_jac = jax.jit(jax.jacfwd(off)), jax.jit(jax.jacfwd(violated))
    rng, found = np.random.default_rng(seed), []
    for _ in range(starts):
        free = rng.normal(size=size) * rng.choice([0.2, 0.4, 0.7])
        for weight in (1.0, 30.0, 1e3, 1e5):
            free = least_squares(
                functools.partial(off, weight=weight),
                free,
                jac=cast(Any, functools.partial(off_jac, weight=weight)),
                method="lm",
                max_nfev=150,
            ).x
            if weight > 1 and np.max(np.abs(violated(free))) > 1e-2:
                break
        else:
            for _ in range(6):
                newton = np.linalg.lstsq(violated_jac(free), violated(free), rcond=1e-9)
                free = free - newton[0]
            if np.max(np.abs(violated(free))) < 1e-12:
                sub_steps = np.asarray(palindrome(jnp.asarray(free), s, pairs))
                found.append(Found.judge(sub_steps, order))
    found = sorted((f for f in found if f.imaginary >= stability), key=lambda f: f.z_error)
    same = lambda f, g: abs(f.z_error - g.z_error) < 1e-4
    return [f for i, f in enumerate(found) if i == 0 or not same(f, found[i - 1])]


def contracting(t, y, args):
    del args
    return jnp.stack([-3 * (y[0] - jnp.cos(t)), 0.3 * y[0] * y[1] - y[1] + jnp.sin(t)])


def trial_problems() -> list[tuple[Callable, Any, Any, float]]:
    network, orbit = small_network(), kepler()
    return [
        (network.field, network.y0, network.args, network.t1),
        (orbit.field, orbit.y0, orbit.args, orbit.t1),
        (contracting, jnp.array([0.3, 1.0]), None, 5.0),
    ]


def trials(solver: Any, order: int) -> list[float]:
    errors = []
    for problem, evaluations in zip(trial_problems(), EVALUATIONS[order], strict=True):
        field, y0, args, t1 = problem

        def final(solver, dt0, field=field, y0=y0, args=args, t1=t1):
            term = dfx.ODETerm(field)
            sol = dfx.diffeqsolve(term, solver, 0.0, t1, dt0, y0, args, max_steps=2**16)
            assert sol.ys is not None
            return sol.ys[-1]

        steps = max(1, round(evaluations / solver.tableau.stages))
        exact = final(dfx.Dopri8(), t1 / 4096)
        error = float(jnp.linalg.norm(final(solver, t1 / steps) - exact))
        # The error scaled to exactly `evaluations`.
        errors.append(error * (steps * solver.tableau.stages / evaluations) ** order)
    return errors


def report(found: Found, order: int, errors: list[float] | None) -> str:
    c = found.sub_steps
    row = f"{len(c):9} {found.z_error:7.4f} {found.v_error:7.4f} {found.imaginary:9.3f}"
    row += f" {np.abs(c).sum():6.2f}"
    if errors is not None:
        row += "  " + " ".join(f"{error:8.2g}" for error in errors)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--order", type=int, choices=list(TODAY))
    parser.add_argument("--sub-steps", type=int)
    parser.add_argument("--starts", type=int)
    parser.add_argument("--stability", type=float, default=0.08)
    options = parser.parse_args()
    if options.quick:
        # The three-stage method of McLachlan and Atela is the best of five sub-steps.
        best, *_ = search(4, 5, 40, options.stability)
        np.testing.assert_allclose(best.sub_steps, TODAY[4].tableau.sub_steps, atol=1e-9)
        print("OK")
        return
    for order in [options.order] if options.order else TODAY:
        today = TODAY[order]
        base = trials(today, order)
        print(f"order {order}")
        print("sub-steps       E    E(v) imaginary    |c|   network   Kepler contracting")
        known = Found.judge(np.asarray(today.tableau.sub_steps), order)
        print(report(known, order, [1.0, 1.0, 1.0]), type(today).__name__)
        sub_steps = (options.sub_steps,) if options.sub_steps else SEARCHES[order]
        for s in sub_steps:
            starts = options.starts or STARTS[order]
            for found in search(order, s, starts, options.stability)[:2]:
                errors = None
                try:
                    tableau = dr.ALFTableau(tuple(found.sub_steps), order=order)
                    errors = list(np.divide(trials(dr.ALF(tableau), order), base))
                except ValueError as e:
                    print(e)
                print(report(found, order, errors))
                print("   ", *(f"{c:.17g}" for c in found.sub_steps[: (s + 1) // 2]))


if __name__ == "__main__":
    main()
