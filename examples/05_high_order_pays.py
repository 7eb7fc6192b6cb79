"""High order pays: train force fields on accurate orbits with far fewer evaluations.

A reversible solver trains a neural differential equation without storing its trajectory.
The first one for neural networks was the asynchronous leapfrog, which has order 2: here
`ALF2`. This script asks what order 4 and 6 save when the data are accurate.

Two force fields are learned from positions with noise of 1e-6. The first acts on planets
with eccentricities up to 0.8, and differs from Newton's law by the quadrupole of an oblate
star. The second acts between seven atoms, and adds a term in `r^-8` to the Lennard-Jones
energy. The known law is given, and a small network learns the difference.

- A convergence study finds the cheapest tolerance or step size at which the error of each
  solver is below a third of the noise. It counts evaluations of the force, for noise from
  1e-2 to 1e-6. The planets need adaptive steps, by `PIDController`; the atoms take
  constant steps.
- Each solver then trains the same network on the same data, for the same number of
  updates. An accurate solver judges every learned force on held-out trajectories.
- At noise of 1e-6, `ALF4` and `ALF6` need less than a fifth of the evaluations of `ALF2`,
  and the faster of the two trains at least five times as fast. At 1e-2 `ALF4` saves less
  than half of the evaluations, and `ALF6` needs more than `ALF2`.
- Larger steps do not help `ALF2`: at the cost of `ALF4` it learns a wrong force.

The script asserts the last two points. It also asserts that the held-out errors of the
forces learned with the other solvers stay below twice the noise.

High order does not need `ALF4` or `ALF6`. `Tsit5` with Diffrax's default adjoint finishes
sooner than both on the planets, and about as soon on the atoms. `BlanesMoan4` is the first
to finish on both. It is symplectic and needs a separable system, as these are.

`ALF2` is trained for the first updates only. Its remaining time is extrapolated from its
time per update, and dashed in the figure. All is in float64, as float32 rounds at 1e-7.

Run `python examples/05_high_order_pays.py` after `pip install ".[examples]"`. It takes two
to three minutes on two cores, or less than a minute with `--quick`, which trains the atoms
only, in fewer updates, and not with `ALF2` at full accuracy. It writes
`05_high_order_pays.png`.
"""

import argparse
import functools
import pathlib
import time
from typing import NamedTuple

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

NOISE = 1e-6
ACCURACIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Largest number of evaluations that the convergence study tries per solve.
MOST_EVALUATIONS = 1_000_000
MOST_STEPS = 2**20
QUADRUPOLE, C8 = 1e-4, 1e-2
OBSERVATIONS, FRAMES, DURATION = 30, 20, 2.0
ATOMS, TEMPERATURE = 7, 0.2
PAIRS = np.triu_indices(ATOMS, 1)

SOLVERS: dict[str, dfx.AbstractSolver] = {
    "ALF2": dr.ALF2(),
    "StormerVerlet": dr.StormerVerlet(),
    "ALF4": dr.ALF4(),
    "ALF6": dr.ALF6(),
    "BlanesMoan4": dr.BlanesMoan4(nystrom=True),
    "Tsit5": dfx.Tsit5(),
}
REFERENCE = dfx.Dopri8()
TRAINED = ("ALF2", "ALF4", "ALF6", "BlanesMoan4", "Tsit5")
COARSE = "ALF2 at the cost of ALF4"
COLOURS = {
    "ALF2": "#c0392b",
    COARSE: "#e59866",
    "ALF4": "#1f618d",
    "ALF6": "#5dade2",
    "BlanesMoan4": "#1e8449",
    "Tsit5": "#7f8c8d",
}

Positions = Float[Array, "..."]
State = tuple[Positions, Positions]


class PlanetForce(eqx.Module):
    """Newton's law, times one plus a small function of the distance."""

    network: eqx.nn.MLP | None

    def __call__(self, q: Positions) -> Positions:
        r2 = jnp.sum(q**2)
        if self.network is None:
            correction = QUADRUPOLE / r2
        else:
            correction = 10 * QUADRUPOLE * self.network(jnp.log(r2) / 2 + 0.5)
        return -q / r2**1.5 * (1 + correction)


class ClusterForce(eqx.Module):
    """The gradient of Lennard-Jones energies plus a small function of the distances."""

    network: eqx.nn.MLP | None

    def energy(self, q: Positions) -> Float[Array, ""]:
        r2 = jnp.sum((q[PAIRS[0]] - q[PAIRS[1]]) ** 2, axis=-1)
        if self.network is None:
            correction = -C8 * r2**-4
        else:
            correction = C8 * jax.vmap(self.network)(jnp.log(r2))
        return jnp.sum(4 * (r2**-6 - r2**-3) + correction)

    def __call__(self, q: Positions) -> Positions:
        return -jax.grad(self.energy)(q)


Force = PlanetForce | ClusterForce


class System(NamedTuple):
    """A force to learn, and its data. A setting is a tolerance or a step size."""

    name: str
    true_force: Force
    train_y0: State
    held_out_y0: State
    ts: np.ndarray
    adaptive: bool
    settings: np.ndarray
    reference: float
    updates: int
    slow_updates: int


def planets() -> System:
    def at_aphelion(eccentricities) -> State:
        e, zero = np.array(eccentricities), np.zeros(len(eccentricities))
        speed = np.sqrt((1 - e) / (1 + e))
        return jnp.stack([1 + e, zero], -1), jnp.stack([zero, speed], -1)

    train = at_aphelion([0.1, 0.3, 0.5, 0.65, 0.75, 0.8])
    held_out = at_aphelion([0.2, 0.4, 0.6, 0.7])
    ts = np.sort(np.random.default_rng(0).uniform(0, 2 * np.pi, OBSERVATIONS))
    tolerances = 10.0 ** -np.arange(2, 10.1, 0.5)
    return System(
        "planets", PlanetForce(None), train, held_out, ts, True, tolerances, 1e-12, 110, 6
    )


def atoms() -> System:
    """A pentagonal bipyramid at its minimum of energy, with random momenta."""
    force = ClusterForce(None)
    angles = 2 * np.pi * np.arange(5) / 5
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], -1)
    q = jnp.asarray(0.95 * np.concatenate([ring, [[0, 0, 0.6], [0, 0, -0.6]]]))
    q = jax.lax.fori_loop(0, 3000, lambda _, q: q + 2e-3 * force(q), q)
    p = np.random.default_rng(1).standard_normal((5, ATOMS, 3))
    p = p - np.mean(p, axis=1, keepdims=True)
    heat = np.sum(p**2, axis=(1, 2), keepdims=True) / (3 * ATOMS - 3)
    p = jnp.asarray(p * np.sqrt(TEMPERATURE / heat))
    q = jnp.broadcast_to(q, p.shape)
    ts = DURATION * np.arange(1, FRAMES + 1) / FRAMES
    per_frame = np.unique(np.round(1.25 ** np.arange(35)))
    dts = DURATION / FRAMES / per_frame
    train, held_out = (q[:3], p[:3]), (q[3:], p[3:])
    return System("atoms", force, train, held_out, ts, False, dts, dts[8], 80, 6)


def solve(system: System, solver, force, y0: State, setting, max_steps=MOST_STEPS):
    """Positions at `system.ts`, and the number of steps."""
    if isinstance(solver, dr.StormerVerlet | dr.BlanesMoan4):
        velocity = dfx.ODETerm(lambda t, p, force: p)
        terms = (velocity, dfx.ODETerm(lambda t, q, force: force(q)))
    else:
        terms = dfx.ODETerm(lambda t, y, force: (y[1], force(y[0])))
    if isinstance(solver, dfx.Tsit5 | dfx.Dopri8):
        adjoint = dfx.RecursiveCheckpointAdjoint()
    else:
        adjoint = dr.ReversibleAdjoint()
    if system.adaptive:
        controller, dt0 = dfx.PIDController(rtol=setting, atol=setting), None
    else:
        controller, dt0 = dfx.ConstantStepSize(), setting

    sol = dfx.diffeqsolve(
        terms,
        solver,
        0.0,
        system.ts[-1],
        dt0,
        y0,
        force,
        saveat=dfx.SaveAt(ts=jnp.asarray(system.ts)),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    assert sol.ys is not None
    return sol.ys[0], sol.stats["num_steps"]


def solve_all(system: System, solver, force, y0: State, setting, max_steps=MOST_STEPS):
    """Solve one trajectory after the other, so that time follows the evaluations."""
    return jax.lax.map(lambda y0: solve(system, solver, force, y0, setting, max_steps), y0)


def rms(x) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(x**2))


@functools.cache
def evaluations_per_step(solver) -> int:
    """Force evaluations, from the difference between solves of 10 and of 20 steps."""
    calls = []

    def count(q):
        calls.append(q)
        return q

    def force(q):
        return -jax.pure_callback(count, jax.ShapeDtypeStruct(q.shape, q.dtype), q)

    @jax.jit
    def toy(dt):
        zero = jnp.zeros(1), jnp.zeros(1)
        one = np.ones(1)
        system = System("", PlanetForce(None), zero, zero, one, False, one, 0, 0, 0)
        return solve(system, solver, force, (jnp.ones(1), jnp.ones(1)), dt)

    def evaluations(steps: int) -> int:
        calls.clear()
        jax.block_until_ready(toy(1 / steps))
        return len(calls)

    return (evaluations(20) - evaluations(10)) // 10


class Trial(NamedTuple):
    """Solves with the true force at one setting."""

    setting: float
    error: float
    evaluations: int
    most_steps: int


def convergence(system: System, solver, exact: Positions) -> list[Trial]:
    """Trials with ever smaller errors, until these are far below the noise."""

    @jax.jit
    def attempt(setting):
        ys, steps = solve_all(system, solver, system.true_force, system.train_y0, setting)
        return rms(ys - exact), jnp.sum(steps), jnp.max(steps)

    per_step, trials = evaluations_per_step(solver), []
    for setting in system.settings:
        error, steps, most = (x.item() for x in attempt(setting))
        trials.append(Trial(setting, error, per_step * steps, most))
        if error < ACCURACIES[-1] / 3 or trials[-1].evaluations > MOST_EVALUATIONS:
            break
    return trials


def cheapest(trials: list[Trial], accuracy: float) -> Trial:
    return min((t for t in trials if t.error < accuracy / 3), key=lambda t: t.evaluations)


class Data(NamedTuple):
    """Exact positions for training, and noisy ones for training and held out."""

    exact: Positions
    train: Positions
    held_out: Positions


def observe(system: System) -> Data:
    @jax.jit
    def exact_positions(y0: State):
        args = system, REFERENCE, system.true_force, y0, system.reference
        return solve_all(*args)[0]

    rng = np.random.default_rng(2)
    exact = [exact_positions(y0) for y0 in (system.train_y0, system.held_out_y0)]
    noisy = [x + NOISE * rng.standard_normal(x.shape) for x in exact]
    return Data(exact[0], *noisy)


def first_guess(system: System):
    """The known law: the network is zero at first."""
    width = 8
    network = eqx.nn.MLP("scalar", "scalar", width, 2, jnp.tanh, key=jr.key(0))
    network = eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias),
        network,
        replace_fn=jnp.zeros_like,
    )
    force = type(system.true_force)(network)
    params, static = eqx.partition(force, eqx.is_inexact_array)
    # JAX would compile the update again after a change of a weak type.
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), params), static


class Training:
    """A training with one solver: its costs, and the parameters after every update."""

    def __init__(self, name: str, system: System, data: Data, solver, trial: Trial):
        self.name, self.trial, self.seconds = name, trial, []
        params, static = first_guess(system)
        max_steps = 2 ** int(np.ceil(np.log2(2 * trial.most_steps)))

        def loss(params):
            force = eqx.combine(params, static)
            args = system, solver, force, system.train_y0, trial.setting, max_steps
            return jnp.mean(((solve_all(*args)[0] - data.train) / NOISE) ** 2)

        # With a line search by values alone, the gradient is compiled only once.
        optimiser = optax.chain(
            optax.scale_by_lbfgs(memory_size=20),
            optax.scale(-1.0),
            optax.scale_by_backtracking_linesearch(max_backtracking_steps=15),
        )

        def update(params, state):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = optimiser.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return optax.apply_updates(params, updates), state

        self.params, self.state = [params], optimiser.init(params)
        self.compiled = jax.jit(update).lower(params, self.state).compile()
        memory = self.compiled.memory_analysis()
        assert memory is not None
        self.memory = memory.temp_size_in_bytes
        # The first run is a warm-up.
        jax.block_until_ready(self.compiled(params, self.state))

    def step(self) -> None:
        start = time.perf_counter()
        params, self.state = jax.block_until_ready(
            self.compiled(self.params[-1], self.state)
        )
        self.seconds.append(time.perf_counter() - start)
        self.params.append(params)


def train(system: System, data: Data, trials, names) -> list[Training]:
    """Interleave the updates of all solvers, so that they run under the same load."""
    trainings = []
    for name in tqdm.tqdm(names, desc=f"{system.name}: compiling"):
        if name == COARSE:
            solver, budget = "ALF2", cheapest(trials["ALF4"], NOISE).evaluations
            trial = max(
                (t for t in trials[solver] if t.evaluations <= budget),
                key=lambda t: t.evaluations,
            )
        else:
            solver, trial = name, cheapest(trials[name], NOISE)
        trainings.append(Training(name, system, data, SOLVERS[solver], trial))
    for i in tqdm.trange(system.updates, desc=f"{system.name}: training"):
        for training in trainings:
            if training.name != "ALF2" or i < system.slow_updates:
                training.step()
    return trainings


def held_out_errors(system: System, data: Data, trainings: list[Training]):
    """Held-out errors after every update of each training, by an accurate solver."""
    _, static = first_guess(system)

    @jax.jit
    def error(params):
        force = eqx.combine(params, static)
        args = system, REFERENCE, force, system.held_out_y0, system.reference
        return rms(solve_all(*args)[0] - data.held_out)

    return {t.name: np.array([float(error(p)) for p in t.params]) for t in trainings}


def print_evaluations(system: System, study) -> None:
    heads = "".join(f"{x:>10.0e}" for x in ACCURACIES)
    print(f"\n{system.name}: evaluations, noise {heads}")
    for name, trials in study.items():
        row = [cheapest(trials, x).evaluations for x in ACCURACIES]
        print(f"{name:30}" + "".join(f"{x:10,}" for x in row))
    for name in ("ALF4", "ALF6"):
        row = [ratio(study, name, x) for x in ACCURACIES]
        print(f"{'ALF2 / ' + name:30}" + "".join(f"{x:10.1f}" for x in row))


def ratio(study, name: str, accuracy: float) -> float:
    counts = [cheapest(study[n], accuracy).evaluations for n in ("ALF2", name)]
    return counts[0] / counts[1]


def print_trainings(system: System, trainings: list[Training], errors) -> None:
    print(f"\n{system.name}: {system.updates} updates at noise {NOISE:.0e}")
    print(
        f"{'':26}evaluations   update [ms]   memory [kB]   held-out error"
        f"   all [s]   to {2 * NOISE:.0e} [s]"
    )
    for t in trainings:
        unfinished = len(t.seconds) < system.updates
        mark, error = ("*", "-") if unfinished else (" ", f"{errors[t.name][-1]:.2e}")
        reached = seconds_to(2 * NOISE, t, system, errors)
        print(
            f"{t.name:26}{t.trial.evaluations:11,}{1e3 * np.median(t.seconds):14.1f}"
            f"{t.memory / 1e3:14.1f}{error:>17}{clock(t, system)[-1]:10.1f}{mark}"
            f"{f'{reached:.1f}' if np.isfinite(reached) else '-':>12}{mark}"
        )
    if any(len(t.seconds) < system.updates for t in trainings):
        print(f"* extrapolated from {system.slow_updates} updates")
    faster = speedups(system, trainings)
    if not faster:
        return
    for name, times in faster.items():
        print(f"ALF2 trains {times:.1f} times as long as {name}")
    ends = {t.name: clock(t, system)[-1] for t in trainings}
    finished = min((name for name in ends if name != COARSE), key=lambda name: ends[name])
    least = min(trainings, key=lambda t: seconds_to(2 * NOISE, t, system, errors)).name
    print(f"first to finish: {finished}; first below twice the noise: {least}")
    tsit5 = ends["Tsit5"] / ends["ALF4"]
    print(f"Tsit5 with the default adjoint takes {tsit5:.2f} of the time of ALF4")


def clock(training: Training, system: System) -> np.ndarray:
    """The time after every update. Updates not made take as long as the median of those
    made."""
    missing = system.updates - len(training.seconds)
    later = missing * [float(np.median(training.seconds))]
    return np.cumsum([*training.seconds, *later])


def learning_curve(training: Training, errors) -> np.ndarray:
    """Held-out errors after every update. Where `ALF2` stops, those of `ALF4` go on."""
    found = errors[training.name]
    return np.concatenate([found, errors["ALF4"][len(found) :]])[1:]


def seconds_to(target: float, training: Training, system: System, errors) -> float:
    """When the held-out error first falls below the target."""
    below = learning_curve(training, errors) < target
    return clock(training, system)[np.argmax(below)] if np.any(below) else np.inf


def speedups(system: System, trainings: list[Training]) -> dict[str, float]:
    """How many times as long as `ALF4` and `ALF6` the whole training takes with `ALF2`."""
    seconds = {t.name: float(clock(t, system)[-1]) for t in trainings}
    if "ALF2" not in seconds:
        return {}
    return {name: seconds["ALF2"] / seconds[name] for name in ("ALF4", "ALF6")}


def plot(panels, path) -> None:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(9, 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    faster = {}
    for axis, (system, trainings, errors) in zip(axes[0], panels, strict=True):
        axis.axhline(NOISE, color="black", linewidth=0.8, linestyle=":")
        for t in trainings:
            draw(axis, system, t, errors)
        list_times(axis, system, trainings)
        at_right = dict(transform=axis.get_yaxis_transform(), ha="right", va="top", size=8)
        axis.text(0.99, 0.93 * NOISE, "noise of the data", **at_right)
        axis.set(xscale="log", yscale="log", xlabel="time of training [s]")
        axis.set_ylim(6e-7, 5e-2)
        faster = speedups(system, trainings)
        ratios = " and ".join(f"{name} {x:.0f}×" for name, x in faster.items())
        title = f"{system.name}: {ratios} faster than ALF2" if faster else system.name
        axis.set_title(title, size=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out error")
    figure.suptitle(
        "At noise of 1e-6, orders 4 and 6 train many times faster than order 2\n"
        "(dashed: ALF2 is extrapolated from its first updates)"
        if faster
        else "At the same cost, order 4 learns a force that order 2 does not",
        size=12,
    )
    figure.savefig(path, dpi=100)


def list_times(axis, system: System, trainings: list[Training]) -> None:
    """The legend: when each training ends, the first on top."""
    notes = {"ALF2": " (extrapolated)", "Tsit5": ", default adjoint"}
    ends = {t.name: clock(t, system)[-1] for t in trainings if t.name != COARSE}
    for i, name in enumerate(sorted(ends, key=lambda name: ends[name])):
        axis.text(
            0.99,
            0.99 - 0.05 * i,
            f"{name}{notes.get(name, '')}: {ends[name]:.{0 if ends[name] > 10 else 1}f} s",
            transform=axis.transAxes,
            color=COLOURS[name],
            size=8.5,
            ha="right",
            va="top",
            weight="bold",
        )


def draw(axis, system: System, t: Training, errors) -> None:
    """Dashed: the errors of ALF4 after as many updates, at the time that ALF2 needs."""
    n, seconds, curve = len(t.seconds), clock(t, system), learning_curve(t, errors)
    style = dict(color=COLOURS[t.name], linewidth=1.6)
    axis.plot(seconds[:n], curve[:n], **style)
    axis.plot(seconds[n - 1 :], curve[n - 1 :], linestyle=(0, (3, 2)), **style)
    if t.name == COARSE:
        style = dict(ha="center", va="top", size=8, weight="bold", color=COLOURS[COARSE])
        axis.text(0.85 * seconds[-1], 0.8 * curve[-1], "ALF2 at\nALF4's cost", **style)


def check(system: System, study, trainings: list[Training], errors) -> None:
    assert ratio(study, "ALF4", NOISE) >= 5 and ratio(study, "ALF6", NOISE) >= 5
    assert ratio(study, "ALF4", NOISE) > 2 * ratio(study, "ALF4", 1e-3)
    assert ratio(study, "ALF4", 1e-2) < 2 and ratio(study, "ALF6", 1e-2) < 1
    for t in trainings:
        if t.name == COARSE:
            assert errors[t.name][-1] > 4 * errors["ALF4"][-1], errors[t.name]
        elif t.name == "ALF2":
            # Its extrapolation assumes that the first updates agree.
            difference = np.log(errors["ALF2"] / errors["ALF4"][: len(errors["ALF2"])])
            assert np.max(np.abs(difference)) < 0.1, difference
            faster = speedups(system, trainings)
            assert max(faster.values()) >= 5, faster


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="trains fewer solvers")
    quick = parser.parse_args().quick
    panels = []
    systems = (atoms()._replace(updates=50),) if quick else (planets(), atoms())
    for system in systems:
        data = observe(system)
        solvers = {n: SOLVERS[n] for n in (("ALF2", "ALF4", "ALF6") if quick else SOLVERS)}
        progress = tqdm.tqdm(solvers.items(), desc=f"{system.name}: convergence")
        study = {n: convergence(system, s, data.exact) for n, s in progress}
        print_evaluations(system, study)
        names = ("ALF4", COARSE) if quick else (*TRAINED, COARSE)
        trainings = train(system, data, study, names)
        errors = held_out_errors(system, data, trainings)
        print_trainings(system, trainings, errors)
        panels.append((system, trainings, errors))
        check(system, study, trainings, errors)
        accurate = [errors[t.name][-1] for t in trainings if t.name not in (COARSE, "ALF2")]
        assert max(accurate) < 2 * NOISE, accurate
    path = pathlib.Path(__file__).with_suffix(".png")
    plot(panels, path)
    print(f"\nplotted in {path.name}")
    print("OK")


if __name__ == "__main__":
    main()
