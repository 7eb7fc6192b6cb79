"""Classify handwritten digits by a neural ODE of any depth, up to 2,000 solver steps.

A neural ODE moves the 64 pixels of an image by `y' = network(t, y)` from t = 0 to t = 1,
and a linear layer reads the digit off the result. The images are the 1,797 digits that
scikit-learn carries; 450 of them are held out. Everything is in float32.

The number of steps is the depth. With `ALF4` and `ReversibleAdjoint`, a gradient takes the
same memory at 10 and at 2,000 steps. The memory of a residual network that stores its
activations grows in proportion to its depth. With checkpoints, as in Diffrax's default
adjoint, it grows like the square root.

The script compares the neural ODE with residual networks of the same width: held-out
accuracy, and memory and time of one gradient against depth. It asserts that the held-out
accuracy exceeds 95 %, that 10 and 2,000 steps train alike, that the gradient through 2,000
steps equals that of the default adjoint to 1e-4, and that its memory exceeds that of 10
steps by less than 5 %.

Ten steps are enough for these images: a greater depth does not improve the accuracy.
Shallow networks do not need this package: below about 400 layers, checkpoints take less
memory than `ReversibleAdjoint`.

Run `python examples/01_any_depth.py` after `pip install ".[examples]"`. It takes two to
three minutes on two cores, and writes `01_any_depth.png`. `--quick` takes less than a
minute: it trains for fewer epochs, compares fewer depths, and takes 200 steps in place of
2,000 except where it measures memory.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
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
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PIXELS, CLASSES, BATCH, HELD_OUT = 64, 10, 64, 450
LEARNING_RATE = 1e-2
SHALLOW, DEEP, RESIDUAL_LAYERS = 10, 2000, 20

Images = Float[Array, "batch 64"]
Labels = Int[Array, " batch"]
Logits = Float[Array, "batch 10"]


class Digits(NamedTuple):
    """Pixels between -1 and 1. Each has a mean of zero over the training images."""

    images: Images
    labels: Labels
    held_out_images: Images
    held_out_labels: Labels


def read_digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    images, held_out, labels, held_out_labels = train_test_split(
        images / 16, labels, test_size=HELD_OUT, stratify=labels, random_state=0
    )
    mean = np.mean(images, axis=0)
    images, held_out = (jnp.asarray(x - mean, jnp.float32) for x in (images, held_out))
    return Digits(images, jnp.asarray(labels), held_out, jnp.asarray(held_out_labels))


class Network(eqx.Module):
    """One block for all depths, or a stack of blocks, and a linear readout."""

    block: eqx.nn.MLP
    readout: eqx.nn.Linear

    def field(self, t, y: Images, args=None) -> Images:
        del args
        return jax.vmap(lambda x: self.block(jnp.append(x, t)))(y)


def make_network(seed: int, layers: int | None = None) -> Network:
    """A network with one block per layer, or with one shared block."""
    key, readout_key = jr.split(jr.key(seed))
    make = lambda key: eqx.nn.MLP(PIXELS + 1, PIXELS, PIXELS, 1, jnp.tanh, key=key)
    block = eqx.filter_vmap(make)(jr.split(key, layers)) if layers else make(key)
    return Network(block, eqx.nn.Linear(PIXELS, CLASSES, key=readout_key))


class Method(NamedTuple):
    """A solver, and an adjoint to backpropagate through it."""

    name: str
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint


REVERSIBLE = Method("ALF4, ReversibleAdjoint", dr.ALF4(), dr.ReversibleAdjoint())
SAME_SOLVER = Method("ALF4, default adjoint", dr.ALF4(), dfx.RecursiveCheckpointAdjoint())
TSIT5 = Method("Tsit5, default adjoint", dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint())
DIRECT = Method("Tsit5, DirectAdjoint", dfx.Tsit5(), dfx.DirectAdjoint())
# One step of Euler's method is one residual layer.
EULER = Method(
    "residual layers, checkpoints", dfx.Euler(), dfx.RecursiveCheckpointAdjoint()
)

STACK = "residual layers, all stored"

Forward = Callable[[Network, Images], Logits]


def ode(method: Method, steps: int) -> Forward:
    """A neural ODE with steps of equal length."""

    def forward(network: Network, images: Images) -> Logits:
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, network: network.field(t, y)),
            method.solver,
            0.0,
            1.0,
            1 / steps,
            images,
            network,
            adjoint=method.adjoint,
            # Rounding may leave a short step at the end.
            max_steps=steps + 1,
        )
        assert sol.ys is not None
        return jax.vmap(network.readout)(sol.ys[-1])

    return forward


def residual(layers: int) -> Forward:
    """A residual network. All layers share one block unless the network has a stack."""

    def forward(network: Network, images: Images) -> Logits:
        blocks, static = eqx.partition(network.block, eqx.is_array)
        shared = blocks.layers[0].weight.ndim == 2

        def layer(y, t_and_own):
            t, own = t_and_own
            block = eqx.combine(blocks if shared else own, static)
            return y + Network(block, network.readout).field(t, y) / layers, None

        ts = jnp.arange(layers) / layers
        y, _ = jax.lax.scan(layer, images, (ts, None if shared else blocks))
        return jax.vmap(network.readout)(y)

    return forward


def loss(network: Network, forward: Forward, images: Images, labels: Labels):
    logits = forward(network, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@eqx.filter_jit
def accuracy(network: Network, forward: Forward, digits: Digits) -> Float[Array, ""]:
    """The fraction of held-out images that are classified correctly."""
    found = jnp.argmax(forward(network, digits.held_out_images), axis=-1)
    return jnp.mean(found == digits.held_out_labels)


def batches(digits: Digits, count: int):
    """Random batches. An epoch uses every image at most once."""
    rng, order = np.random.default_rng(0), np.array([], int)
    for _ in range(count):
        if len(order) < BATCH:
            order = rng.permutation(len(digits.images))
        batch, order = order[:BATCH], order[BATCH:]
        yield digits.images[batch], digits.labels[batch]


@functools.cache
def make_optimiser(updates: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, updates))


@eqx.filter_jit
def update(network: Network, state, forward: Forward, optimiser, images, labels):
    value, gradient = eqx.filter_value_and_grad(loss)(network, forward, images, labels)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(network, updates), state, value


def train(network: Network, forward: Forward, digits: Digits, updates: int, name: str):
    """Minimise the loss by Adam. Returns the network and the losses."""
    optimiser, losses = make_optimiser(updates), []
    state = optimiser.init(eqx.filter(network, eqx.is_array))
    progress = tqdm.tqdm(batches(digits, updates), desc=name, total=updates)
    for images, labels in progress:
        network, state, value = update(network, state, forward, optimiser, images, labels)
        losses.append(float(value))
        progress.set_postfix_str(f"loss {losses[-1]:.4f}")
    return network, losses


def compare_accuracy(digits: Digits, updates: int, seeds: int) -> list[float]:
    """Mean held-out accuracies of the neural ODE and of two residual networks."""
    n = RESIDUAL_LAYERS
    rows = (
        (f"neural ODE, {SHALLOW} steps", ode(REVERSIBLE, SHALLOW), None),
        (f"residual network, {n} shared layers", residual(n), None),
        (f"residual network, {n} layers", residual(n), n),
    )
    print(f"\nheld-out accuracy, mean of {seeds}        parameters   accuracy")
    means = []
    for name, forward, layers in rows:
        found = []
        for seed in range(seeds):
            network = make_network(seed, layers)
            network, _ = train(network, forward, digits, updates, name)
            found.append(float(accuracy(network, forward, digits)))
        means.append(float(np.mean(found)))
        arrays = jax.tree.leaves(eqx.filter(make_network(0, layers), eqx.is_array))
        print(f"{name:36}{sum(x.size for x in arrays):12,}{means[-1]:11.4f}")
    return means


def train_at_both_depths(digits: Digits, deep: int, updates: int):
    """Make the same few updates. Returns the losses at each depth, and the deep network."""
    print(f"\nthe first {updates} updates        loss before     after   accuracy")
    losses, networks = {}, {}
    for steps in (SHALLOW, deep):
        forward, name = ode(REVERSIBLE, steps), f"neural ODE, {steps:,} steps"
        network, found = train(make_network(0), forward, digits, updates, name)
        held_out = float(accuracy(network, forward, digits))
        print(f"{name:30}{found[0]:9.4f}{found[-1]:10.4f}{held_out:11.4f}")
        losses[steps], networks[steps] = found, network
    return losses, networks[deep]


def compiled_gradient(forward: Forward, digits: Digits):
    """The compiled gradient of a batch, as a function of the network's arrays."""
    params, static = eqx.partition(make_network(0), eqx.is_array)
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]

    def of_params(params):
        return loss(eqx.combine(params, static), forward, images, labels)

    return jax.jit(jax.grad(of_params)).lower(params).compile()


def temporary_megabytes(compiled) -> float:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 1e6


def contenders(quick: bool) -> dict[str, Callable[[int], Forward]]:
    """The methods to compare at every depth."""
    methods = (REVERSIBLE, EULER) if quick else (REVERSIBLE, EULER, TSIT5, DIRECT)
    return {m.name: functools.partial(ode, m) for m in methods} | {STACK: residual}


def compile_all(digits: Digits, depths, quick: bool):
    """Compiled gradients for every depth, by method."""
    progress = tqdm.tqdm(contenders(quick).items(), desc="compiling gradients")
    return {
        name: [compiled_gradient(at_depth(n), digits) for n in depths]
        for name, at_depth in progress
    }


def median_times(gradients, params, repeats: int) -> list[float]:
    """Median wall times of interleaved runs in seconds, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        for gradient in gradients:
            start = time.perf_counter()
            jax.block_until_ready(gradient(params))
            times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (repeats + 1, -1))[1:], axis=0).tolist()


def print_table(title: str, depths, rows) -> None:
    print(f"\n{title:32}" + "".join(f"{n:9,}" for n in depths) + " steps or layers")
    for name, values in rows.items():
        print(f"{name:32}" + "".join(f"{x:9.3g}" for x in values))


def relative_distance(gradient, reference) -> float:
    """Relative to the reference, in the Euclidean norm."""
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True)
    distance = optax.global_norm([a - b for a, b in leaves])
    return float(distance / optax.global_norm(reference))


# The colour and the label of each line.
LABELS = {
    REVERSIBLE.name: ("C0", "neural ODE,\nReversibleAdjoint"),
    TSIT5.name: ("0.3", "neural ODE,\ndefault adjoint"),
    EULER.name: ("0.6", "residual layers,\ncheckpoints"),
    DIRECT.name: ("C4", "neural ODE,\nDirectAdjoint"),
    STACK: ("C3", "residual layers,\nall stored"),
}


def plot(depths, memory, timed, times, caption: str, path) -> None:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.8, 4.6), width_ratios=(1.5, 1), layout="constrained"
    )
    # Chosen by hand: two labels would overlap.
    offsets = {TSIT5.name: 7, EULER.name: -13, REVERSIBLE.name: -8}
    for name, (colour, label) in LABELS.items():
        if name not in memory:
            continue
        sizes, width = memory[name], 3.5 if name == REVERSIBLE.name else 1.5
        style = dict(color=colour, linewidth=width, markersize=4)
        left.loglog(depths, sizes, "o-", **style)
        right.loglog(timed, times[name], "o-", **style)
        left.annotate(
            f"{label} {sizes[-1]:.2g} MB",
            (depths[-1], sizes[-1]),
            xytext=(8, offsets.get(name, 0)),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    for axes, what, title in (
        (left, "memory of one gradient [MB]", "Memory does not grow with the depth ..."),
        (right, "time of one gradient [s]", "... time does, as ever"),
    ):
        axes.set(xlabel="depth: steps or layers", ylabel=what)
        axes.set_xticks(depths, [f"{n:,}" for n in depths])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11)
    figure.supxlabel(caption, fontsize=9)
    figure.savefig(path, dpi=100)


def check(means, losses, memory, distance: float) -> None:
    continuous, *residuals = means
    assert continuous > 0.95, means
    assert continuous > max(residuals) - 0.01, means
    # The deep network learns, with the same losses as the shallow one.
    shallow, deep = losses.values()
    assert deep[-1] < 0.9 * deep[0], losses
    assert np.allclose(deep, shallow, rtol=0.02), losses
    assert distance < 1e-4, distance
    ours, checkpoints, stored = (memory[m] for m in (REVERSIBLE.name, EULER.name, STACK))
    assert ours[-1] < 1.05 * ours[0], memory
    assert checkpoints[0] < ours[0] < ours[-1] < checkpoints[-1] / 2, memory
    assert ours[-1] < stored[-1] / 50 and stored[-1] > 100 * stored[0], memory
    if TSIT5.name in memory:
        assert ours[-1] < memory[TSIT5.name][-1] / 3, memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer epochs and depths")
    quick = parser.parse_args().quick
    digits = read_digits()
    epoch = len(digits.images) // BATCH

    means = compare_accuracy(digits, (6 if quick else 20) * epoch, 1 if quick else 3)
    deep = 200 if quick else DEEP
    losses, network = train_at_both_depths(digits, deep, 3 if quick else 2 * epoch)

    depths = (SHALLOW, DEEP) if quick else (SHALLOW, 100, 500, DEEP)
    gradients = compile_all(digits, depths, quick)
    memory = {k: [temporary_megabytes(g) for g in v] for k, v in gradients.items()}
    print_table("memory of one gradient [MB]", depths, memory)

    params = eqx.filter(network, eqx.is_array)
    timed = depths[:1] if quick else depths
    columns = [
        median_times([v[i] for v in gradients.values()], params, 5)
        for i in range(len(timed))
    ]
    times = dict(zip(gradients, np.transpose(columns), strict=True))
    print_table("time of one gradient [s]", timed, times)

    if deep in depths:
        gradient = gradients[REVERSIBLE.name][depths.index(deep)]
    else:
        gradient = compiled_gradient(ode(REVERSIBLE, deep), digits)
    ours = gradient(params)
    default = compiled_gradient(ode(SAME_SOLVER, deep), digits)(params)
    distance = relative_distance(ours, default)
    print(f"\ngradient through {deep:,} steps of ALF4, by both adjoints:")
    print(f"relative difference {distance:.1e}")

    path = pathlib.Path(__file__).with_suffix(".png")
    accuracies = "neural ODE {:.1%}, residual networks {:.1%} and {:.1%}".format(*means)
    shallow, last = losses[SHALLOW], losses[deep]
    caption = (
        f"held-out accuracy with {SHALLOW} steps or 20 layers: {accuracies}\n"
        f"training loss after {len(last)} updates: {shallow[-1]:.4f} with {SHALLOW} steps, "
        f"{last[-1]:.4f} with {deep:,}"
    )
    plot(depths, memory, timed, times, caption, path)
    print(f"\nplotted in {path.name}")
    check(means, losses, memory, distance)
    print("OK")


if __name__ == "__main__":
    main()
