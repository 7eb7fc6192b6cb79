"""Train models of the kinds in Diffrax's documentation, with two arguments changed.

They are a neural ODE, a latent ODE, a continuous normalising flow, a neural CDE and a
neural SDE, and with `--all` also a Kalman filter and a force that is learned at nodes.
Their sizes are about those used there. Each is trained with the solver that the
documentation uses, mostly `Tsit5`, and the default adjoint, and with `ALF4` and
`ReversibleAdjoint`. The SDE keeps `ReversibleHeun`, so only its adjoint changes.
Tolerances, step sizes, optimisers and float32 stay the same, and the adjoint has its
default settings.

Both trainings start from the same parameters and see the same batches. A third training,
with Diffrax's choice and another seed, shows how much the final loss depends on chance.
Before the first update and after the last, the gradient of `ReversibleAdjoint` is compared
with that of Diffrax's adjoint for the same solver, with a checkpoint for every step. Most
of the run time is for compiling, three gradients per model.

The script asserts that these gradients agree to 1e-3, and that the two arguments change the
held-out loss by less than half of what another seed does, or by less than 5 %.

Run `python examples/07_two_arguments.py` after `pip install ".[examples]"`. It takes two to
three minutes on two fast cores, and up to eight on slow ones, or a third more with `--all`,
and writes `07_two_arguments.png`. The committed figure is drawn with `--all`. `--quick`
trains only the neural ODE, for 20 updates. `--quick --all` trains all seven models, for
three updates, and does not ask whether they learn anything.
"""

import argparse
import concurrent.futures
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
import tqdm

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


HELD_OUT_BATCHES, KEY = 4, jr.key(0)
# More than the steps of any solve, so that Diffrax's adjoint replays none of them.
EVERY_STEP = dfx.RecursiveCheckpointAdjoint(checkpoints=1024)
DIFFRAX, OURS, SEED = "Diffrax's choice", "two arguments changed", "another seed"
ORANGE, BLUE, LIGHT_BLUE, GREY = "#f5a742", "#1f4e8c", "#8fb4dd", "0.75"
PID, HEUN = dfx.PIDController(rtol=1e-3, atol=1e-6), dfx.ReversibleHeun()


class Tutorial(NamedTuple):
    """A model, its data, and how it is trained."""

    init: Callable[[jax.Array], Any]
    # A function of a model, a batch of the data, and a random key.
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    data: tuple[jax.Array, ...]
    batch_size: int
    optimiser: optax.GradientTransformation
    updates: int


class Case(NamedTuple):
    """A model, and the solvers of both trainings."""

    make: Callable[[Any, Any], Tutorial]
    their_solver: dfx.AbstractSolver = dfx.Tsit5()
    our_solver: dfx.AbstractSolver = dr.ALF4()


def averaged(loss_of_sample):
    """The mean of a loss over a batch."""

    def loss(model, batch, key):
        keys = jr.split(key, len(batch[0]))
        return jnp.mean(jax.vmap(loss_of_sample, (None, 0, 0))(model, batch, keys))

    return loss


def bounded(size_in, size_out, width, depth, key, activation=jax.nn.softplus):
    return eqx.nn.MLP(size_in, size_out, width, depth, activation, jnp.tanh, key=key)


def new_field(size, width, key):
    return {"scale": jnp.array(1.0), "mlp": bounded(size, size, width, 2, key)}


def evaluate_field(t, y, field):
    return field["scale"] * field["mlp"](y)


def plane(z) -> jax.Array:
    """Complex numbers as vectors."""
    return jnp.asarray(np.stack([z.real, z.imag], axis=-1), jnp.float32)


def neural_ode(solver, adjoint) -> Tutorial:
    """Learns an oscillator that slows down as it decays, from series of 100 samples."""
    ts = np.linspace(0, 10, 100)
    r0, angle = np.random.default_rng(0).uniform(
        [[[0.2]], [[0]]], [[[1.5]], [[6.3]]], (2, 512, 1)
    )
    phase = angle + 0.5 * ts + 0.6 * r0**2 * (1 - np.exp(-0.2 * ts))
    data = (plane(r0 * np.exp(-0.1 * ts + 1j * phase)),)
    ts = jnp.asarray(ts, jnp.float32)
    adaptive: dict[str, Any] = dict(saveat=dfx.SaveAt(ts=ts), stepsize_controller=PID)
    term = dfx.ODETerm(evaluate_field)

    @averaged
    def loss(field, sample, key):
        (ys,) = sample
        times = ts[0], ts[-1], ts[1] - ts[0]
        sol = dfx.diffeqsolve(
            term, solver, *times, ys[0], field, adjoint=adjoint, **adaptive
        )
        return jnp.mean((sol.ys - ys) ** 2)

    def init(key):
        return new_field(2, 64, key)

    return Tutorial(init, loss, data, 32, optax.adabelief(3e-3), 120)


def latent_ode(solver, adjoint) -> Tutorial:
    """A variational autoencoder of damped rotations, each at 20 irregular times."""
    rng = np.random.default_rng(1)
    ts = np.sort(rng.uniform(0, rng.uniform(2, 3, (4096, 1)), (4096, 20)))
    starts = rng.normal(size=(4096, 2)) @ [[1], [1j]]
    data = jnp.asarray(ts, jnp.float32), plane(starts * np.exp((-0.1 + 1.2j) * ts))
    term = dfx.ODETerm(evaluate_field)

    def init(key, size=16):
        keys = jr.split(key, 5)
        return {
            "encoder": eqx.nn.GRUCell(3, size, key=keys[0]),
            "to_code": eqx.nn.Linear(size, 2 * size, key=keys[1]),
            "to_state": eqx.nn.MLP(size, size, size, 2, key=keys[2]),
            "field": new_field(size, size, keys[3]),
            "to_data": eqx.nn.Linear(size, 2, key=keys[4]),
        }

    @averaged
    def loss(model, sample, key):
        ts, ys = sample
        series = jnp.concatenate([ts[:, None], ys], axis=1)[::-1]
        hidden, _ = jax.lax.scan(
            lambda h, x: (model["encoder"](x, h), None), jnp.zeros(16), series
        )
        mean, log_std = jnp.split(model["to_code"](hidden), 2)
        code = mean + jnp.exp(log_std) * jr.normal(key, mean.shape)
        y0, field, saveat = model["to_state"](code), model["field"], dfx.SaveAt(ts=ts)
        sol = dfx.diffeqsolve(
            term, solver, ts[0], ts[-1], 0.4, y0, field, saveat=saveat, adjoint=adjoint
        )
        errors = jax.vmap(model["to_data"])(sol.ys) - ys
        divergence = mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1
        return 0.5 * (jnp.sum(errors**2) + jnp.sum(divergence))

    return Tutorial(init, loss, data, 128, optax.adam(1e-2), 100)


def normalising_flow(solver, adjoint) -> Tutorial:
    """Learns the density of points around six centres, with the exact divergence."""
    rng = np.random.default_rng(2)
    points = 1.5 * np.exp(1j * np.pi / 3 * rng.integers(0, 6, 4096))
    data = (plane(points + 0.2 * rng.normal(size=(4096, 2)) @ [1, 1j]),)

    def field(t, state, mlp):
        def velocity(y):
            return mlp(jnp.append(y, t))

        y, _ = state
        return velocity(y), jnp.trace(jax.jacfwd(velocity)(y))

    @averaged
    def loss(mlp, sample, key):
        (point,) = sample
        y0, term = (point, 0.0), dfx.ODETerm(field)
        sol = dfx.diffeqsolve(term, solver, 1.0, 0.0, -0.05, y0, mlp, adjoint=adjoint)
        (y,), (change,) = sol.ys  # pyright: ignore[reportGeneralTypeIssues]
        return -change - jnp.sum(jax.scipy.stats.norm.logpdf(y))

    def init(key):
        return eqx.nn.MLP(3, 2, 64, 3, jnp.tanh, key=key)

    return Tutorial(init, loss, data, 64, optax.adamw(3e-3, weight_decay=1e-5), 60)


def neural_cde(solver, adjoint) -> Tutorial:
    """Learns in which direction a spiral turns, from 100 samples of it."""
    rng = np.random.default_rng(3)
    ts = np.linspace(0, 12, 100)
    directions = rng.choice([-1, 1], (512, 1))
    angles = 2 * directions * ts + rng.uniform(0, 2 * np.pi, (512, 1))
    spirals = plane(np.exp(1j * angles - 0.3 * ts))
    labels, ts = (
        jnp.asarray(directions[:, 0] > 0, jnp.float32),
        jnp.asarray(ts, jnp.float32),
    )
    ys = jnp.concatenate([jnp.broadcast_to(ts[:, None], (512, 100, 1)), spirals], axis=-1)
    splines = jax.jit(jax.vmap(lambda y: dfx.backward_hermite_coefficients(ts, y)))(ys)

    def init(key, size=8, width=128):
        keys = jr.split(key, 3)
        return {
            "initial": eqx.nn.MLP(3, size, width, 1, key=keys[0]),
            "field": bounded(size, 3 * size, width, 1, keys[1]),
            "readout": eqx.nn.Linear(size, "scalar", key=keys[2]),
        }

    def field(t, y, mlp):
        return mlp(y).reshape(8, 3)

    @averaged
    def loss(model, sample, key):
        label, *coefficients = sample
        control = dfx.CubicInterpolation(ts, tuple(coefficients))
        term = dfx.ControlTerm(field, control).to_ode()
        y0 = model["initial"](control.evaluate(ts[0]))
        args = ts[0], ts[-1], None, y0, model["field"]
        sol = dfx.diffeqsolve(term, solver, *args, stepsize_controller=PID, adjoint=adjoint)
        assert sol.ys is not None
        logit = model["readout"](sol.ys[-1])
        return optax.sigmoid_binary_cross_entropy(logit, label)

    return Tutorial(init, loss, (labels, *splines), 32, optax.adam(1e-2), 40)


def neural_sde(solver, adjoint) -> Tutorial:
    """Learns to generate paths whose drift and noise grow with time, by energy distance.

    Diffrax's documentation trains a discriminator instead, over 10,000 updates.
    """
    rng = np.random.default_rng(4)
    ts = jnp.arange(64.0)
    paths = [rng.uniform(-1, 1, 4096)]
    for i in range(63):
        noise = 0.8 * i / 63 * rng.normal(size=4096)
        paths.append(0.9 * paths[-1] + 0.02 * i + noise)
    data = (jnp.asarray(np.stack(paths, axis=-1), jnp.float32),)

    def init(key, size=16):
        keys = jr.split(key, 4)
        return {
            "initial": eqx.nn.MLP(5, size, size, 1, key=keys[0]),
            "drift": bounded(size + 1, size, size, 1, keys[1], jax.nn.silu),
            "diffusion": bounded(size + 1, 3 * size, size, 1, keys[2], jax.nn.silu),
            "readout": eqx.nn.Linear(size, "scalar", key=keys[3]),
        }

    def drift(t, y, mlps):
        return mlps[0](jnp.append(y, t))

    def diffusion(t, y, mlps):
        return mlps[1](jnp.append(y, t)).reshape(16, 3)

    def generate(model, key):
        key, path_key = jr.split(key)
        path = dfx.VirtualBrownianTree(ts[0], ts[-1], 0.5, (3,), path_key)
        terms = dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(diffusion, path))
        y0 = model["initial"](jr.normal(key, (5,)))
        args = ts[0], ts[-1], 1.0, y0, (model["drift"], model["diffusion"])
        sol = dfx.diffeqsolve(
            terms, solver, *args, saveat=dfx.SaveAt(ts=ts), adjoint=adjoint
        )
        return jax.vmap(model["readout"])(sol.ys)

    def distance(a, b):
        squares = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1) - 2 * a @ b.T
        # The diagonal is zero, where the root has no derivative.
        return jnp.mean(jnp.sqrt(jnp.maximum(squares / len(ts), 1e-4)))

    def loss(model, batch, key):
        (real,) = batch
        fake = jax.vmap(generate, (None, 0))(model, jr.split(key, len(real)))
        return distance(real, fake) - (distance(real, real) + distance(fake, fake)) / 2

    return Tutorial(init, loss, data, 128, optax.adam(1e-2), 30)


def kalman_filter(solver, adjoint) -> Tutorial:
    """Learns how far a filter may trust its model of an oscillator, and its measurements.

    The model is wrong: the oscillator is damped less.
    """
    rng, rate = np.random.default_rng(5), -0.3 + 0.91**0.5 * 1j
    ts = np.arange(500) / 100
    waves = rng.normal(size=(64, 2)) @ [[1], [1j]] * np.exp(rate * ts)
    states = np.stack([waves.real, (rate * waves).real], axis=-1)
    observed = states[..., 1] + rng.normal(size=(64, 500))
    data = jnp.asarray(states, jnp.float32), jnp.asarray(observed, jnp.float32)
    ts, matrix = jnp.asarray(ts, jnp.float32), jnp.array([[0.0, 1.0], [-1.0, -1.4]])

    def init(key):
        return {"q_root": 0.1 * jnp.eye(2), "r_root": jnp.array(1.0)}

    def field(t, state, args):
        (x, p), (control, roots) = state, args
        gain = p[:, 1] / roots["r_root"] ** 2
        dx = matrix @ x + gain * (control.evaluate(t) - x[1])
        noise = roots["q_root"].T @ roots["q_root"]
        return dx, matrix @ p + p @ matrix.T + noise - jnp.outer(gain, p[1])

    @averaged
    def loss(roots, sample, key):
        states, observed = sample
        y0, control = (jnp.zeros(2), 10 * jnp.eye(2)), dfx.LinearInterpolation(ts, observed)
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver, ts[0], ts[-1], 0.01, y0, (control, roots)),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        estimates, _ = sol.ys  # pyright: ignore[reportGeneralTypeIssues]
        return jnp.mean((estimates - states) ** 2)

    return Tutorial(init, loss, data, 4, optax.adam(1e-2), 60)


def forcing(solver, adjoint) -> Tutorial:
    """Learns a force, at the nodes of a spline, from noisy records of what it moves."""
    nodes, ts = jnp.linspace(0, 10, 8), jnp.linspace(0, 10, 101)

    def field(t, y, force):
        return force.evaluate(t) - y

    def solution(points, solver, adjoint):
        spline = dfx.backward_hermite_coefficients(nodes, points)
        args, saveat = dfx.CubicInterpolation(nodes, spline), dfx.SaveAt(ts=ts)
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver, 0.0, 10.0, 0.1, 1.0, args),
            saveat=saveat,
            adjoint=adjoint,
        )
        assert sol.ys is not None
        return sol.ys

    rng = np.random.default_rng(6)
    points = jnp.asarray(rng.normal(size=8), jnp.float32)
    truth = solution(points, dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint())
    data = (truth + jnp.asarray(0.1 * rng.normal(size=(256, 101)), jnp.float32),)

    def loss(points, batch, key):
        (ys,) = batch
        return jnp.mean((ys - solution(points, solver, adjoint)) ** 2)

    def init(key):
        return jr.normal(key, (8,))

    return Tutorial(init, loss, data, 16, optax.adam(0.1), 60)


CASES = {
    "neural ODE": Case(neural_ode),
    "latent ODE": Case(latent_ode),
    "normalising flow": Case(normalising_flow),
    "neural CDE": Case(neural_cde),
    "neural SDE": Case(neural_sde, HEUN, our_solver=HEUN),
    "Kalman filter": Case(kalman_filter, dfx.Dopri5()),
    "forcing": Case(forcing),
}


def gradient_of(tutorial: Tutorial):
    """The loss and its gradient, as a function of parameters, batch and key."""
    _, static = eqx.partition(tutorial.init(KEY), eqx.is_inexact_array)

    def loss(params, batch, key):
        return tutorial.loss(eqx.combine(params, static), batch, key)

    return jax.value_and_grad(loss)


def compile_gradient(tutorial: Tutorial):
    params = eqx.filter(eqx.filter_jit(tutorial.init)(KEY), eqx.is_inexact_array)
    batch = tuple(x[: tutorial.batch_size] for x in tutorial.data)
    return jax.jit(gradient_of(tutorial)).lower(params, batch, KEY).compile()


class Run:
    """One training in progress."""

    def __init__(self, tutorial: Tutorial, seed: int, compiled=None):
        self.tutorial = tutorial
        model = eqx.filter_jit(tutorial.init)(jr.key(seed))
        self.params = eqx.filter(model, eqx.is_inexact_array)
        self.state = tutorial.optimiser.init(self.params)
        self.rng, self.key = np.random.default_rng(seed), jr.key(seed)
        self.losses: list[float] = []
        self.times: list[float] = []
        self.compiled = compiled or self.compile()

    def compile(self):
        gradient = gradient_of(self.tutorial)

        def update(params, state, batch, key):
            value, grad = gradient(params, batch, key)
            updates, state = self.tutorial.optimiser.update(grad, state, params)
            return optax.apply_updates(params, updates), state, value, grad

        batch = self.batch(np.arange(self.tutorial.batch_size))
        return jax.jit(update).lower(self.params, self.state, batch, self.key).compile()

    def batch(self, indices):
        return tuple(x[indices] for x in self.tutorial.data)

    def advance(self) -> None:
        """Draws a batch, and updates the parameters."""
        size, count = self.tutorial.batch_size, len(self.tutorial.data[0])
        batch = self.batch(self.rng.integers(HELD_OUT_BATCHES * size, count, size))
        self.key, key = jr.split(self.key)
        begin = time.perf_counter()
        self.params, self.state, value, _ = jax.block_until_ready(
            self.compiled(self.params, self.state, batch, key)
        )
        self.times.append(time.perf_counter() - begin)
        self.losses.append(float(value))

    def held_out(self) -> float:
        """Loss on batches that no update has seen."""
        size, losses = self.tutorial.batch_size, []
        for i in range(HELD_OUT_BATCHES):
            batch = self.batch(np.arange(i * size, (i + 1) * size))
            losses.append(self.compiled(self.params, self.state, batch, jr.key(i))[2])
        return float(np.mean(losses))

    def gradient_error(self, reference) -> float:
        """Relative distance between the gradient and that of `reference`."""
        batch = self.batch(np.arange(self.tutorial.batch_size))
        got = self.compiled(self.params, self.state, batch, KEY)[3]
        _, expected = reference(self.params, batch, KEY)
        got, expected = (jax.flatten_util.ravel_pytree(g)[0] for g in (got, expected))
        return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


class Result(NamedTuple):
    """By run. `before` is our held-out loss before the first update."""

    losses: dict[str, list[float]]
    before: float
    held_out: dict[str, float]
    milliseconds: dict[str, float]
    megabytes: dict[str, float]
    gradient_errors: list[float]


def train(name: str, updates: int | None) -> Result:
    """Trains with both pairs of arguments, interleaved so that times can be compared."""
    make, their_solver, our_solver = CASES[name]
    theirs, ours = (
        make(their_solver, dfx.RecursiveCheckpointAdjoint()),
        make(our_solver, dr.ReversibleAdjoint()),
    )
    # Compiling takes longer than many of the trainings, and can be done in parallel.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stored = pool.submit(compile_gradient, make(our_solver, EVERY_STEP))
        compiling = [pool.submit(Run, tutorial, seed=0) for tutorial in (theirs, ours)]
        run, our_run = (x.result() for x in compiling)
        reference = stored.result()
    runs = {DIFFRAX: run, OURS: our_run, SEED: Run(theirs, 1, run.compiled)}
    errors, before = [our_run.gradient_error(reference)], our_run.held_out()
    progress = tqdm.trange(updates or runs[OURS].tutorial.updates, desc=name)
    for _ in progress:
        for run in runs.values():
            run.advance()
        progress.set_postfix_str(f"loss {runs[OURS].losses[-1]:.4f}")
    errors.append(runs[OURS].gradient_error(reference))
    return Result(
        {k: run.losses for k, run in runs.items()},
        before,
        {k: run.held_out() for k, run in runs.items()},
        {k: 1e3 * float(np.median(run.times)) for k, run in runs.items()},
        {k: temporary_megabytes(run.compiled) for k, run in runs.items()},
        errors,
    )


def temporary_megabytes(compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def print_table(results: dict[str, Result]) -> None:
    print(
        "\nheld-out loss         Diffrax      ours  other seed    gradient: first      last"
    )
    for name, r in results.items():
        losses = "".join(f"{r.held_out[run]:10.5f}" for run in (DIFFRAX, OURS, SEED))
        print(
            f"{name:19}{losses}" + "".join(f"{error:14.0e}" for error in r.gradient_errors)
        )
    print("\nof an update         time [ms]      ours  ratio   memory [MB]   ours  ratio")
    for name, r in results.items():
        row = f"{name:20}"
        for values in (r.milliseconds, r.megabytes):
            a, b = values[DIFFRAX], values[OURS]
            row += f"{a:10.2f}{b:10.2f}{b / a:7.2f}"
        print(row)


def plot_losses(axes, name: str, result: Result) -> None:
    """The loss curves on top of each other, and the held-out losses at their end."""
    styles = ((SEED, GREY, 1, 5), (DIFFRAX, ORANGE, 3.5, 8), (OURS, BLUE, 1, 4))
    count = len(result.losses[OURS])
    for run, colour, linewidth, markersize in styles:
        axes.plot(result.losses[run], color=colour, linewidth=linewidth, label=run)
        axes.plot(1.06 * count, result.held_out[run], "o", color=colour, ms=markersize)
    if name != "normalising flow":
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_title(name, fontsize=10)


def plot_ratios(axes, results: dict[str, Result]) -> None:
    """Time and memory of an update, as multiples of Diffrax's."""
    rows = np.arange(len(results))
    for shift, kind, colour in ((-0.18, "time", BLUE), (0.18, "memory", LIGHT_BLUE)):
        field = "milliseconds" if kind == "time" else "megabytes"
        values = [getattr(r, field) for r in results.values()]
        ratios = [v[OURS] / v[DIFFRAX] for v in values]
        bars = axes.barh(rows + shift, ratios, 0.34, color=colour, label=kind, zorder=2)
        # The numbers cover the line.
        box = dict(facecolor="white", edgecolor="none", pad=0.8)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=3, bbox=box, zorder=3)
    axes.axvline(1, color=ORANGE, linewidth=2, zorder=1)
    axes.set_yticks(rows, list(results))
    axes.invert_yaxis()
    axes.set_title("an update, Diffrax's = 1", fontsize=10)
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    axes.legend(fontsize=8, frameon=False, **below)


def plot(results: dict[str, Result], path: pathlib.Path) -> None:
    # The legend takes the last panel of the losses.
    rows = min(2, len(results))
    columns = len(results) // rows + 1
    size = 2.2 * columns + 3.2, 4.8
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=(*[1] * columns, 1.25))
    panels = [figure.add_subplot(grid[i, j]) for i in range(rows) for j in range(columns)]
    *panels, last = panels
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        plot_losses(axes, name, result)
    ratios = figure.add_subplot(grid[:, -1])
    plot_ratios(ratios, results)
    for axes in (*panels, ratios):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "training loss by updates\n(dots: held-out loss)"
    style = dict(fontsize=9, title_fontsize=9, frameon=False)
    last.legend(handles, labels, loc="center", title=title, **style)
    last.axis("off")
    figure.suptitle("Two arguments changed, and the same training", weight="bold")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one model, few updates")
    parser.add_argument("--all", action="store_true", help="seven models, not five")
    options = parser.parse_args()
    names = list(CASES)[: len(CASES) if options.all else 1 if options.quick else 5]
    updates = (3 if options.all else 20) if options.quick else None
    results = {name: train(name, updates) for name in names}
    print_table(results)
    path = pathlib.Path(__file__).with_suffix(".png")
    plot(results, path)
    print(f"\nplotted in {path.name}")

    for name, result in results.items():
        assert all(np.all(np.isfinite(x)) for x in result.losses.values()), name
        assert max(result.gradient_errors) < 1e-3, (name, result.gradient_errors)
        theirs, ours, other = (result.held_out[run] for run in (DIFFRAX, OURS, SEED))
        # The arguments matter less than the seed. Two seeds may happen to agree, so a
        # difference of 5 % always passes.
        allowed = max(0.5 * abs(other - theirs), 0.05 * theirs)
        assert abs(ours - theirs) < allowed, (name, result.held_out)
        if not (options.quick and options.all):
            assert ours < 0.8 * result.before, (name, result.before, result.held_out)
    print("OK")


if __name__ == "__main__":
    main()
