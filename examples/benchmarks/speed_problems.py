"""The problems of `speed.py`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """`y' = field(t, y, args)` from 0 to `t1`, and a loss to differentiate.

    - `overhead`: whether the loop takes more time than the vector field.
    - `loss`: a function of the solution at `ts`, or at `t1` if `ts` is `None`.
    - `ensemble`: whether the first axes of `y0` and `args` are those of an ensemble whose
        members take their own steps.
    - `force`: for splitting methods, if `y = (q, p)`, `q' = p` and
        `p' = force(t, q, args)`. `split` and `merge` convert from and to `y`.
    - `steps`: the numbers of steps by method, where a dry run would take too long. Steps
        are then fixed.
    - `direct`: whether all steps may be stored several times over, by `DirectAdjoint`.
    - `fixed`: whether fixed steps are measured as well as adaptive ones.
    """

    field: Callable
    y0: Any
    args: Any
    t1: float
    overhead: bool
    loss: Callable
    ts: jax.Array | None = None
    ensemble: bool = False
    force: Callable | None = None
    split: Callable = lambda y: y
    merge: Callable = lambda y: y
    steps: dict[str, tuple[int, ...]] | None = None
    direct: bool = False
    fixed: bool = True


def sum_of_squares(y):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


def mlp(t, y, params):
    del t
    *hidden, (w, b) = params
    for weight, bias in hidden:
        y = jnp.tanh(y @ weight + bias)
    return y @ w + b


def mlp_params(*sizes: int, scale: float = 1.0) -> list[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(0)

    def layer(n, m):
        weight = scale * rng.normal(size=(n, m)) / np.sqrt(n)
        return jnp.asarray(weight), jnp.asarray(0.1 * rng.normal(size=m))

    return [layer(n, m) for n, m in zip(sizes, sizes[1:], strict=False)]


def small_network() -> Problem:
    params = mlp_params(8, 32, 32, 8, scale=1.5)
    y0 = jnp.linspace(-1, 1, 8)
    return Problem(mlp, y0, params, 5.0, True, sum_of_squares, direct=True)


def batched_network(batch: int = 128, sizes=(16, 128, 128, 16)) -> Problem:
    params = mlp_params(*sizes, scale=1.5)
    y0 = jnp.asarray(np.random.default_rng(1).normal(size=(batch, sizes[0])))
    return Problem(mlp, y0, params, 2.0, False, sum_of_squares)


def kepler_force(t, q, mass):
    del t
    return -mass * q / jnp.sum(q**2) ** 1.5


def kepler_field(t, y, mass):
    return jnp.concatenate([y[2:], kepler_force(t, y[:2], mass)])


def kepler() -> Problem:
    eccentricity, t1 = 0.6, 10 * np.pi
    speed = np.sqrt((1 + eccentricity) / (1 - eccentricity))
    return Problem(
        kepler_field,
        jnp.array([1 - eccentricity, 0.0, 0.0, speed]),
        jnp.array(1.0),
        t1,
        True,
        sum_of_squares,
        ts=jnp.asarray(np.sort(np.random.default_rng(0).uniform(0, t1, 100))),
        force=kepler_force,
        split=lambda y: (y[:2], y[2:]),
        merge=lambda y: jnp.concatenate(y, axis=-1),
        direct=True,
    )


def lorenz_field(t, y, rayleigh):
    del t
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (rayleigh - c) - b, a * b - 8 / 3 * c])


def lorenz(members: int = 1000) -> Problem:
    noise = np.random.default_rng(0).normal(size=(members, 3))
    y0 = jnp.array([1.0, 1.0, 20.0]) + jnp.asarray(noise)
    rayleigh = jnp.linspace(20.0, 35.0, members)
    return Problem(lorenz_field, y0, rayleigh, 2.0, True, sum_of_squares, ensemble=True)


def wave_force(t, u, squared_speed):
    """The force of a dispersive wave on a grid of spacing 1 with periodic boundaries."""
    del t
    neighbours = sum(jnp.roll(u, shift, axis) for axis in (0, 1) for shift in (-1, 1))
    return squared_speed * (neighbours - 4 * u) - u**3


def wave_field(t, y, squared_speed):
    u, v = y
    return v, wave_force(t, u, squared_speed)


def wave(shape: tuple[int, int] = (1000, 500)) -> Problem:
    """A wave whose speed at each grid point is a differentiated parameter."""
    x, y = (2 * np.pi * np.arange(n) / n for n in shape)
    x, y = x[:, None], y[None, :]
    waves = ((shape[0] // 10, 3), (7, shape[1] // 12), (shape[0] // 25, shape[1] // 20))
    u = sum(np.sin(k * x + l * y) for k, l in waves) / 2
    squared_speed = 1 + 0.3 * np.sin(2 * x) * np.cos(3 * y)
    steps = {
        "ALF4": (4, 8, 16, 32),
        "ALF6": (2, 4, 8),
        "BlanesMoan4": (4, 8, 16, 32),
        "BlanesMoan6": (2, 4, 8, 12),
        "Tsit5": (8, 16),
        "Tsit5, all checkpoints": (8, 16, 48),
        "Dopri8, all checkpoints": (4, 8, 12),
        "Tsit5, BacksolveAdjoint": (8, 16),
        "gradsolve Tsit5": (8, 16, 48),
    }
    return Problem(
        wave_field,
        (jnp.asarray(u), jnp.zeros(shape)),
        jnp.asarray(squared_speed),
        4.0,
        False,
        sum_of_squares,
        force=wave_force,
        steps=steps,
    )


def lennard_jones_force(t, q, params, length=None):
    """The forces between all pairs. In a periodic box of the given `length`, each pair
    counts once, by its nearest images. Its force goes to zero between 3/8 and half of the
    length, with two continuous derivatives: a jump would spoil the order of the solver."""
    del t
    epsilon, sigma = params
    distance = q[:, None] - q[None]
    if length is not None:
        distance -= length * jnp.round(distance / length)
    self = jnp.eye(len(q))
    square = jnp.sum(distance**2, axis=-1) + self
    sixth = (sigma**2 / square) ** 3 * (1 - self)
    pull = 24 * epsilon * sixth * (2 * sixth - 1) / square
    if length is not None:
        inner, outer = (3 * length / 8) ** 2, (length / 2) ** 2
        x = jnp.clip((outer - square) / (outer - inner), 0, 1)
        pull *= x**3 * (10 - 15 * x + 6 * x**2)
    return jnp.sum(pull[..., None] * distance, axis=1)


def lennard_jones(cells: int = 3, periodic: bool = False) -> Problem:
    """A melting cluster cut from a crystal, or a crystal that fills a periodic box."""
    length = 1.6 * cells if periodic else None
    force = functools.partial(lennard_jones_force, length=length)

    def field(t, y, params):
        q, p = y
        return p, force(t, q, params)

    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(*3 * [np.arange(cells)]), axis=-1).reshape(-1, 1, 3)
    basis = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    q = 1.6 * (corners + basis).reshape(-1, 3)
    p = rng.normal(size=q.shape)
    return Problem(
        field,
        (jnp.asarray(q), jnp.asarray(p - p.mean(axis=0))),
        (jnp.array(1.0), jnp.array(1.0)),
        0.4,
        False,
        sum_of_squares,
        force=force,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "small network": small_network,
    "batched network": batched_network,
    "Kepler": kepler,
    "Lorenz ensemble": lorenz,
    "wave equation": wave,
    "Lennard-Jones": lennard_jones,
}
