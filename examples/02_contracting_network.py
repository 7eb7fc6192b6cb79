"""Train a network whose flow forgets its start, without storing its trajectory.

A continuous-time recurrent network of four states, `y' = λ (N(y, u) - y)`, learns a circuit
of four capacitors: the ladder filter of analogue synthesizers (Huovilainen 2004,
*Non-linear digital implementation of the Moog ladder filter*, DAFx-04). The data are noisy
voltages at irregular times, under inputs `u` of three tones. Recordings with other tones
are held out. The network is trained with `ALF4` and `ReversibleAdjoint`, and with `Tsit5`
and Diffrax's default adjoint.

The flow contracts: it forgets its initial state within a few of the 24 milliseconds of a
recording. Other reversible solvers fail on contraction by `exp(-λ T)` with `λ T` of about a
hundred, as here: forwards, backwards or both. They carry a second approximation, whose
error grows as the solution contracts, and a flow that contracts forwards expands when its
steps are undone. The script compares, on the trained network,

- reversible Heun (Kidger, Foster, Li & Lyons 2021, arXiv:2105.13493), as in Diffrax;
- the coupled Runge-Kutta steps of McCallum & Foster (arXiv:2410.11648), whose parameter
  `l < 1` buys stability forwards at the expense of the reconstruction;
- `ALF4`, which restarts, and `ReversibleAdjoint`, which stores some states at restarts.

It asserts that both trainings reach the same errors to 10 %, that the gradients of
`ReversibleAdjoint` equal those with stored states to 1e-6, and that the other reversible
solvers, although they evaluate the network more often, reconstruct no correct digit of the
initial state.

Times are in milliseconds, and voltages in units of the transistors' saturation voltage.

Run `python examples/02_contracting_network.py` after `pip install ".[examples]"`. It takes
two minutes on two cores, and writes `02_contracting_network.png`. `--quick` trains only
with `ALF4` and in fewer updates, so that it compares no errors of trainings, and leaves out
two of the coupled schemes.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Float

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

DURATION = 24.0
NOISE = 0.02
# Arrays, so that both share one compiled function.
TOLERANCE, REFERENCE_TOLERANCE = jnp.array(1e-6), jnp.array(1e-10)
# The relative error that a reconstruction may have by default.
DRIFT_TOLERANCE = 1e-6

State = Float[Array, "4"]


class Series(NamedTuple):
    """A recording, or several along a first axis."""

    # Amplitudes, frequencies and phases of the input.
    tones: Float[Array, "*batch 3 3"]
    ts: Float[Array, "*batch times"]
    ys: Float[Array, "*batch times 4"]
    y0: Float[Array, "*batch 4"]


class Circuit(eqx.Module):
    """Ladder filter: four low-pass stages, and feedback from the last to the input."""

    # In kilohertz.
    cutoff: float = 1.0
    feedback: float = 1.0

    def field(self, t, y: State, tones) -> State:
        u = input_voltage(t, tones) - self.feedback * y[3]
        before = jnp.concatenate([u[None], y[:3]])
        return 2 * jnp.pi * self.cutoff * (jnp.tanh(before) - jnp.tanh(y))


class Network(eqx.Module):
    """Each state decays at its own rate λ towards an output of the perceptron."""

    log_rates: State
    perceptron: eqx.nn.MLP

    def __init__(self, key):
        self.log_rates = jnp.log(2.0) * jnp.ones(4)
        self.perceptron = eqx.nn.MLP(5, 4, 16, 1, activation=jnp.tanh, key=key)

    def field(self, t, y: State, tones) -> State:
        target = self.perceptron(jnp.append(y, input_voltage(t, tones)))
        return jnp.exp(self.log_rates) * (target - y)


def input_voltage(t, tones: Float[Array, "3 3"]) -> Float[Array, ""]:
    amplitudes, frequencies, phases = tones
    return jnp.sum(amplitudes * jnp.sin(2 * jnp.pi * frequencies * t + phases))


class Method(NamedTuple):
    """An adaptive solver, and an adjoint to backpropagate through it."""

    name: str
    solver: dfx.AbstractSolver
    evaluations_per_step: int
    # To interpolate between the ends of a step.
    evaluations_per_output: int
    adjoint: dfx.AbstractAdjoint


WALK_BACK = dr.ReversibleAdjoint()
STORE = dfx.RecursiveCheckpointAdjoint()
REVERSIBLE = Method("ALF4, ReversibleAdjoint", dr.ALF4(), 5, 2, WALK_BACK)
# A checkpoint for every step. Steps that are replayed round differently, and restart at
# other times, which may change the gradient by 1e-5.
EVERY_STEP = dfx.RecursiveCheckpointAdjoint(checkpoints=1024)
STORED = Method("ALF4, RecursiveCheckpointAdjoint", dr.ALF4(), 5, 2, EVERY_STEP)
TSIT5 = Method("Tsit5, RecursiveCheckpointAdjoint", dfx.Tsit5(), 6, 0, STORE)


def solve(model: Circuit | Network, series: Series, method: Method, tolerance=TOLERANCE):
    """Voltages at the times of each series, and statistics of the solve."""

    def solve_one(series: Series):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(model.field),
            method.solver,
            0.0,
            DURATION,
            None,
            series.y0,
            series.tones,
            saveat=dfx.SaveAt(ts=series.ts),
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=method.adjoint,
            max_steps=4096,
        )
        assert sol.ys is not None
        return sol.ys, sol.stats

    return jax.vmap(solve_one)(series)


def record(seed: int, count=8, times=60) -> Series:
    """Noisy voltages of the circuit at random times."""
    rng = np.random.default_rng(seed)
    amplitudes = rng.uniform(0.5, 1, (count, 3))
    frequencies = rng.uniform(0.05, 0.5, (count, 3))
    phases = rng.uniform(0, 2 * np.pi, (count, 3))
    tones = jnp.asarray(np.stack([amplitudes, frequencies, phases], axis=1))
    ts = jnp.asarray(np.sort(rng.uniform(0, DURATION, (count, times))))
    y0 = jnp.asarray(rng.uniform(-1, 1, (count, 4)))
    series = Series(tones, ts, jnp.zeros((count, times, 4)), y0)
    ys, _ = eqx.filter_jit(solve)(Circuit(), series, TSIT5, REFERENCE_TOLERANCE)
    return series._replace(ys=ys + NOISE * rng.standard_normal(ys.shape))


def misfit(network: Network, series: Series, method: Method) -> Float[Array, ""]:
    """Mean squared distance from the recorded voltages."""
    ys, _ = solve(network, series, method)
    return jnp.mean((ys - series.ys) ** 2)


misfit_and_gradient = eqx.filter_jit(eqx.filter_value_and_grad(misfit))


def train(network: Network, series: Series, method: Method, steps: int):
    """Minimise the misfit by Adam. Returns the network and the misfit at every step."""
    rate = optax.warmup_cosine_decay_schedule(2e-3, 2e-2, 20, steps)
    # Solutions change abruptly during training, so Adam must forget gradients soon.
    optimiser = optax.adam(rate, b2=0.95)

    @eqx.filter_jit
    def update(network, state, gradient):
        updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(network, updates), state

    state = optimiser.init(eqx.filter(network, eqx.is_array))
    losses = []
    progress = tqdm.trange(steps, desc=method.name)
    for _ in progress:
        loss, gradient = misfit_and_gradient(network, series, method)
        network, state = update(network, state, gradient)
        losses.append(float(loss))
        progress.set_postfix_str(f"rms {losses[-1] ** 0.5:.4f}")
    return network, losses


Field = Callable[[Any, State], State]


class Scheme(NamedTuple):
    """A method with fixed steps that can be undone. Its state begins with `y`."""

    name: str
    evaluations: int
    start: Callable[[Field, Any, State], Any]
    step: Callable[[Field, Any, Any, Any], Any]
    undo: Callable[[Field, Any, Any, Any], Any]


def runge_kutta(field: Field, t0, t1, y: State) -> State:
    """The increment of one step of the classical method of order 4."""
    h, t = t1 - t0, (t0 + t1) / 2
    k1 = field(t0, y)
    k2 = field(t, y + h / 2 * k1)
    k3 = field(t, y + h / 2 * k2)
    k4 = field(t1, y + h * k3)
    return h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def mccallum_foster(l: float) -> Scheme:
    """Two solutions, `y` and `z`. Each moves by Runge-Kutta increments of the other."""

    def step(field: Field, t0, t1, state):
        y, z = state
        y = l * y + (1 - l) * z + runge_kutta(field, t0, t1, z)
        return y, z - runge_kutta(field, t1, t0, y)

    def undo(field: Field, t0, t1, state):
        y, z = state
        z = z + runge_kutta(field, t1, t0, y)
        return (y - (1 - l) * z - runge_kutta(field, t0, t1, z)) / l, z

    name = f"McCallum-Foster, RK4, l = {l}"
    return Scheme(name, 8, lambda field, t, y: (y, y), step, undo)


def reversible_heun() -> Scheme:
    solver = dfx.ReversibleHeun()

    def start(field: Field, t, y):
        return y, (y, field(t, y))

    def step(field: Field, t0, t1, state):
        term = dfx.ODETerm(lambda t, y, args: field(t, y))
        y, rest = state
        y, _, _, rest, _ = solver.step(term, t0, t1, y, None, rest, False)
        return y, rest

    def undo(field: Field, t0, t1, state):
        # The method is symmetric: a step from `t1` to `t0` undoes it.
        return step(field, t1, t0, state)

    return Scheme("ReversibleHeun", 1, start, step, undo)


def runge_kutta_alone() -> Scheme:
    """RK4 without coupling. Steps back in time undo it only up to their errors."""

    def step(field: Field, t0, t1, state):
        y, rest = state
        return y + runge_kutta(field, t0, t1, y), rest

    def undo(field: Field, t0, t1, state):
        return step(field, t1, t0, state)

    return Scheme("RK4, walked back by itself", 4, lambda field, t, y: (y, ()), step, undo)


# RK4 by itself is stable and accurate with each of these numbers of steps, and none takes
# fewer evaluations of the vector field than `ALF4`. On `y' = -λ y` the coupling is stable
# forwards with steps shorter than `-log(l) / λ`. With `l = 0.9`, 2500 steps suffice. With
# `l = 0.999`, it takes a hundred times as many, and the reconstruction is as bad, as its
# errors grow by a factor of at least `l ** -0.5` per step.
SCHEMES = (
    (reversible_heun(), 4000),
    (mccallum_foster(0.999), 500),
    (mccallum_foster(0.9), 500),
    (mccallum_foster(0.9), 2500),
    (runge_kutta_alone(), 1000),
)


class Walk(NamedTuple):
    """The forward pass and its reconstruction, for one series or several."""

    ends: Float[Array, "*batch ends"]
    path: Float[Array, "*batch ends 4"]
    path_back: Float[Array, "*batch ends 4"]
    # Gradients of the misfit: by reconstruction, and with the path stored.
    gradient: Network
    stored_gradient: Network


def there_and_back(network: Network, series: Series, scheme: Scheme, steps: int) -> Walk:
    """Steps have equal lengths, but also end at the times of the observations."""
    params, static = eqx.partition(network, eqx.is_inexact_array)
    ends = jnp.sort(jnp.concatenate([jnp.linspace(0, DURATION, steps + 1), series.ts]))
    intervals = ends[:-1], ends[1:]

    def field(params: Network) -> Field:
        return lambda t, y: eqx.combine(params, static).field(t, y, series.tones)

    def start(params, y0):
        return scheme.start(field(params), ends[0], y0)

    def step(params, state, t0, t1):
        return scheme.step(field(params), t0, t1, state)

    def path_misfit(path):
        return jnp.mean((path[jnp.searchsorted(ends, series.ts)] - series.ys) ** 2)

    def forward(params):
        def body(state, interval):
            state = step(params, state, *interval)
            return state, state[0]

        end, path = jax.lax.scan(body, start(params, series.y0), intervals)
        path = jnp.concatenate([series.y0[None], path])
        return path_misfit(path), (path, end)

    def backward(carry, inputs):
        state, (y_bar, rest_bar), gradient = carry
        t0, t1, more_y_bar = inputs
        state = scheme.undo(field(params), t0, t1, state)
        _, pull = jax.vjp(lambda p, s: step(p, s, t0, t1), params, state)
        more, state_bar = pull((y_bar + more_y_bar, rest_bar))
        return (state, state_bar, jax.tree.map(jnp.add, gradient, more)), state[0]

    stored_gradient, (path, end) = jax.grad(forward, has_aux=True)(params)
    zeros = jax.tree.map(jnp.zeros_like, (end, params))
    inputs = *intervals, jax.grad(path_misfit)(path)[1:]
    carry, path_back = jax.lax.scan(backward, (end, *zeros), inputs, reverse=True)
    _, pull = jax.vjp(start, params, path_back[0])
    gradient = jax.tree.map(jnp.add, carry[2], pull(carry[1])[0])
    path_back = jnp.concatenate([path_back, end[0][None]])
    return Walk(ends, path, path_back, gradient, stored_gradient)


def number(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.1e}" if np.isfinite(x) else "overflow"


class Comparison(NamedTuple):
    """A row of the table: the largest errors over several series."""

    name: str
    steps: int
    evaluations: int
    forward: float
    # Relative error of the reconstructed initial state; `None` without a reconstruction.
    back: float | None
    # Error of the gradient, relative to that with the same solution stored.
    gradient: float | None
    # Whether `back` is only an upper bound.
    bound: bool = False

    def __str__(self):
        back = "< " * self.bound + number(self.back)
        return (
            f"{self.name:34}{self.steps:6}{self.evaluations:13}{number(self.forward):>11}"
            f"{back:>11}{number(self.gradient):>11}"
        )


def relative_distance(a: Network, b: Network) -> float:
    """Of two gradients, relative to the second, in the Euclidean norm."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    distance = optax.global_norm([x - y for x, y in leaves])
    return float(distance / optax.global_norm(b))


def compare_scheme(network, series, scheme, steps, truth) -> tuple[Comparison, Walk]:
    walk = eqx.filter_jit(jax.vmap(there_and_back, in_axes=(None, 0, None, None)))(
        network, series, scheme, steps
    )
    observed = jax.vmap(jnp.searchsorted)(walk.ends, series.ts)
    ys = jnp.take_along_axis(walk.path, observed[..., None], axis=1)
    gradients = jax.tree.map(
        lambda x: jnp.mean(x, axis=0), (walk.gradient, walk.stored_gradient)
    )
    count = walk.ends.shape[1] - 1
    comparison = Comparison(
        scheme.name,
        count,
        count * scheme.evaluations,
        largest(ys - truth),
        largest(walk.path_back[:, 0] - series.y0) / largest(series.y0),
        relative_distance(*gradients),
    )
    return comparison, walk


def compare_method(network, series, method, truth) -> Comparison:
    ys, stats = eqx.filter_jit(solve)(network, series, method)
    steps, restarts = jnp.max(stats["num_steps"]), jnp.max(stats.get("num_restarts", 0))
    outputs = method.evaluations_per_output * series.ts.shape[1]
    # One or two evaluations at the start are not counted.
    evaluations = int(method.evaluations_per_step * steps + restarts + outputs)
    row = Comparison(method.name, int(steps), evaluations, largest(ys - truth), None, None)
    if method is not REVERSIBLE:
        return row
    # The adjoint uses no reconstruction with a larger error.
    error = gradient_error(network, series)
    return row._replace(back=DRIFT_TOLERANCE, gradient=error, bound=True)


def largest(x: Array) -> float:
    """The largest magnitude, or infinity if any entry is NaN."""
    size = jnp.max(jnp.abs(x))
    return float(jnp.where(jnp.isnan(size), jnp.inf, size))


def gradient_error(network: Network, series: Series) -> float:
    """Relative difference of `ReversibleAdjoint` from storing the same solution."""
    gradients = [misfit_and_gradient(network, series, m)[1] for m in (REVERSIBLE, STORED)]
    return relative_distance(*gradients)


def contraction(network: Network, series: Series, walk: Walk) -> Float[Array, " batch"]:
    """λ T: the logarithm of the contraction, averaged over directions."""

    def of_one(series: Series, ends, path):
        jacobians = jax.vmap(jax.jacfwd(network.field, argnums=1), (0, 0, None))
        traces = jnp.trace(jacobians(ends, path, series.tones), axis1=1, axis2=2)
        return -jnp.trapezoid(traces / path.shape[1], ends)

    return jax.vmap(of_one)(series, walk.ends, walk.path)


def plot(series: Series, walks: dict[str, Walk], model: Walk, path) -> None:
    """Plot the first of the series."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    below |= dict(fontsize=9, columnspacing=1.0)
    for node, colour in ((0, "C0"), (3, "C1")):
        name, ys = f"capacitor {node + 1}", series.ys[0, :, node]
        left.plot(series.ts[0], ys, ".", color=colour, label=f"{name}, recorded")
        ys = model.path[0, :, node]
        left.plot(model.ends[0], ys, color=colour, label=f"{name}, network")
    left.set(xlabel="time [ms]", ylabel="voltage")
    left.set_title("The trained network follows a held-out recording")
    left.legend(**below)
    for name, walk in walks.items():
        sizes = jnp.max(jnp.abs(walk.path[0]), axis=-1)
        errors = jnp.max(jnp.abs(walk.path_back - walk.path)[0], axis=-1) / sizes
        right.semilogy(walk.ends[0], errors, label=name)
    right.axhline(DRIFT_TOLERANCE, color="black", linestyle="--")
    bound = "ALF4, ReversibleAdjoint:\nonly its bound is drawn,\nno larger error is used"
    right.text(0, DRIFT_TOLERANCE / 10, bound, va="top", fontsize=9)
    right.set(xlabel="time [ms]", ylabel="relative error of the reconstructed state")
    right.set(ylim=(1e-17, 1e13))
    right.set_title("Walking back, from right to left, other solvers lose every digit")
    right.legend(**below)
    figure.savefig(path, dpi=100)


def compare(
    network: Network, series: Series, schemes
) -> tuple[list[Comparison], dict[str, Walk]]:
    truth, _ = eqx.filter_jit(solve)(network, series, TSIT5, REFERENCE_TOLERANCE)
    rows = [compare_method(network, series, m, truth) for m in (TSIT5, REVERSIBLE)]
    walks = {}
    for scheme, steps in schemes:
        row, walk = compare_scheme(network, series, scheme, steps, truth)
        rows.append(row)
        walks[f"{row.name}, {row.steps} steps"] = walk
    return rows, walks


def check(rms, gradient_errors, depth: float, rows: list[Comparison], quick) -> None:
    before, *ours = rms[REVERSIBLE.name]
    for a in ours:
        # A model error as large as the noise would give 1.4 times the noise. The rest of
        # the margins is for other processors: rounding and truncation errors make Adam end
        # at networks that are a few per cent apart.
        assert before > 20 * NOISE
        assert a < (before / 3 if quick else 2 * NOISE), (a, before)
    if not quick:
        assert np.allclose(ours, rms[TSIT5.name][1:], rtol=0.1), rms
    # Only rounding, whose size depends on the processor: a margin of a hundred.
    assert max(gradient_errors) < 1e-6, gradient_errors
    # Enough to lose all digits of a float64, `exp(-36)`, more than twice.
    assert depth > 80, depth
    tsit5, alf4, heun, *coupled, fine, alone = rows
    # `ALF4` is less accurate than `Tsit5` at the same tolerance, but the noise is larger.
    assert alf4.forward < NOISE / 10 and tsit5.forward < NOISE / 10, (alf4, tsit5)
    assert alf4.gradient is not None and alf4.gradient < 1e-6, alf4
    # RK4 itself is accurate, and its steps are short enough.
    assert alone.forward < 1e-3 and fine.forward < 1e-3, (alone, fine)
    rivals = (heun, *coupled, fine)
    assert all(row.evaluations > alf4.evaluations for row in rivals), rows
    # Voltages are about one, and at relative errors of one no digit is right.
    for row in (heun, *coupled):
        assert row.forward > 1, row
    for row in (*rivals, alone):
        assert row.back is not None and row.back > 1, row
        assert row.gradient is not None and not row.gradient < 1, row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer updates and schemes")
    quick = parser.parse_args().quick
    training, held_out = record(seed=0), record(seed=1)
    initial = Network(jr.key(0))
    networks, rms = {}, {}
    for method in (REVERSIBLE,) if quick else (REVERSIBLE, TSIT5):
        network, losses = train(initial, training, method, 50 if quick else 350)
        networks[method.name] = network
        ends = (misfit_and_gradient(network, s, method)[0] for s in (training, held_out))
        rms[method.name] = [float(loss) ** 0.5 for loss in (losses[0], *ends)]

    print(f"\nroot mean square distance (noise {NOISE}) before      training    held out")
    for name, values in rms.items():
        print(f"{name:34}" + "".join(f"{value:12.5f}" for value in values))

    network = networks[REVERSIBLE.name]
    gradient_errors = [gradient_error(n, training) for n in (initial, network)]
    print("\ngradient of ALF4, walking back against storing: relative difference")
    print("{:.1e} before the training, {:.1e} after it".format(*gradient_errors))

    schemes = (SCHEMES[0], *SCHEMES[3:]) if quick else SCHEMES
    rows, walks = compare(network, held_out, schemes)
    # RK4 alone is accurate forwards.
    *_, accurate = walks.values()
    depths = contraction(network, held_out, accurate)
    print(
        f"\nlargest errors, held out, λ T = {jnp.min(depths):.0f} to {jnp.max(depths):.0f}"
    )
    print(f"{'':35}steps  evaluations    forward       back   gradient")
    for row in rows:
        print(row)

    path = pathlib.Path(__file__).with_suffix(".png")
    plot(held_out, walks, accurate, path)
    print(f"\nplotted in {path.name}")
    check(rms, gradient_errors, float(jnp.min(depths)), rows, quick)
    print("OK")


if __name__ == "__main__":
    main()
