"""The problems of `solutions.py`, with their initial states and tolerances."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y' = field(t, y, args)` from 0 to `t1`.

    - `cases`: pairs `(y0, args)` of the same shapes, which are solved one after another.
    - `sizes`: factors of the absolute tolerance, for each entry of an array, or one number
        for a state of several arrays.
    - `separate`: the two fields of a separable Hamiltonian system, for a state of two
        arrays.
    """

    field: Callable
    cases: dict[str, tuple[Any, Any]]
    t1: float
    sizes: Any = 1.0
    separate: tuple[Callable, Callable] | None = None


def _one(y0, args=None):
    return {"": (np.asarray(y0, float), args)}


# Linear problems in two dimensions, with eigenvalues all over the left half-plane, about a
# known solution: `z' = λ (z - g(t)) + g'(t)`.


def _rotation(t, y, matrix):
    return matrix @ (y - _orbit(t)) + _orbit_slope(t)


def _orbit(t):
    return jnp.stack([jnp.cos(t), jnp.sin(2 * t)])


def _orbit_slope(t):
    return jnp.stack([-jnp.sin(t), 2 * jnp.cos(2 * t)])


def _eigenvalue(size, angle):
    a, b = size * np.cos(np.deg2rad(angle)), size * np.sin(np.deg2rad(angle))
    return np.array([[a, -b], [b, a]])


def left_half_plane(sizes, angles):
    cases = {
        f"|λ| = {size:g}, {angle}°, y0 = {y0}": (np.array(y0), _eigenvalue(size, angle))
        for size in sizes
        for angle in angles
        for y0 in ((1.0, 0.0), (1.5, 0.3))
    }
    return Problem(_rotation, cases, 6.0)


# Entries of every size in one state: two that oscillate, and others that contract, follow,
# grow from zero, pass through zero, decay by a power, and stay zero.


def _entries(t, x, rate):
    c, s = x[0], x[1]
    return jnp.stack(
        [
            s,
            -c,
            -rate * x[2],
            -rate * (x[3] - c),
            2 * s**2 - 0.1 * x[4],
            -rate * x[5] + rate * (c - s) * jnp.cos(t),
            -rate * x[6] ** 3,
            -rate * x[7],
        ]
    )


_X0 = np.array([1.0, 0.0, 1.0, 0.2, 0.0, -0.5, 1.0, 0.0])


def heterogeneous(small, rates, split=False):
    """Entries of the sizes 1 and `small`."""
    sizes = np.where(np.arange(8) < 2, 1.0, small)

    def one(t, y, args):
        rate, sizes = args
        return sizes * _entries(t, y / sizes, rate)

    def several(t, y, args):
        rate, sizes = args
        x = jnp.concatenate([y["large"], y["small"]]) / sizes
        slopes = sizes * _entries(t, x, rate)
        return dict(large=slopes[:2], small=slopes[2:])

    y0 = sizes * _X0
    if split:
        y0 = dict(large=y0[:2], small=y0[2:])
    cases = {f"size {small:g}, rate {rate:g}": (y0, (rate, sizes)) for rate in rates}
    return Problem(several if split else one, cases, 4.0, small if split else sizes)


# Kinetics: a chain of reactions, and an epidemic counted in persons.


def _reactions(t, y, args):
    del t, args
    a, b, c = y
    forward, backward, loss = 0.04 * a, 1e2 * b * c, 3e3 * b**2
    return jnp.stack([backward - forward, forward - backward - loss, loss])


def _epidemic(t, y, args):
    del t, args
    s, e, i, r = y
    infected = 0.9 * s * i / jnp.sum(y)
    return jnp.stack([-infected, infected - 0.5 * e, 0.5 * e - 0.3 * i, 0.3 * i])


# Networks that contract, as trained ones do, and that expand.


class Network(eqx.Module):
    mlp: eqx.nn.MLP
    gate: eqx.nn.Linear

    def __init__(self, seed):
        keys = jax.random.split(jax.random.key(seed))
        self.mlp = eqx.nn.MLP(
            8, 8, 32, 2, activation=jnp.tanh, dtype=jnp.float64, key=keys[0]
        )
        self.gate = eqx.nn.Linear(8, 8, dtype=jnp.float64, key=keys[1])


def _network(sign):
    def field(t, y, args):
        network, rate = args
        gate = rate * jax.nn.sigmoid(network.gate(y))
        return sign * gate * (y - 2 * network.mlp(y)) + jnp.sin(t)

    return field


def _networks(sign, rates, t1):
    y0 = np.linspace(-1, 1, 8)
    cases = {
        f"rate {rate:g}, seed {seed}": (y0, (Network(seed), rate))
        for rate in rates
        for seed in (0, 1)
    }
    return Problem(_network(sign), cases, t1)


def _van_der_pol(t, y, mu):
    del t
    q, p = y
    return jnp.stack([p, mu * (1 - q**2) * p - q])


# The non-stiff problems of DETEST: Hull, Enright, Fellen & Sedgwick (1972), Comparing
# Numerical Methods for Ordinary Differential Equations, doi:10.1137/0709052.


def _torus(t, y, args):
    del t, args
    r = jnp.sqrt(y[0] ** 2 + y[1] ** 2)
    return jnp.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def _chain(weights):
    def field(t, y, args):
        del t, args
        out = jnp.asarray(weights, y.dtype) * y[:-1]
        zero = jnp.zeros_like(out[:1])
        return jnp.concatenate([zero, out]) - jnp.concatenate([out, zero])

    return field


def _diffusion(t, y, args):
    del t, args
    padded = jnp.pad(y, 1)
    return padded[:-2] - 2 * y + padded[2:]


def _unit(n):
    return np.eye(n)[0]


_MASSES = (
    9.54786104043e-4,
    2.85583733151e-4,
    4.37273164546e-5,
    5.17759138449e-5,
    2.77777777778e-6,
)
_SUN = 1.00000597682
_POSITIONS = (
    (3.42947415189, 3.35386959711, 1.35494901715),
    (6.64145542550, 5.97156957878, 2.18231499728),
    (11.2630437207, 14.6952576794, 6.27960525067),
    (-30.1552268759, 1.65699966404, 1.43785752721),
    (-21.1238353380, 28.4465098142, 15.3882659679),
)
_VELOCITIES = (
    (-0.557160570446, 0.505696783289, 0.230578543901),
    (-0.415570776342, 0.365682722812, 0.169143213293),
    (-0.325325669158, 0.189706021964, 0.0877265322780),
    (-0.0240476254170, -0.287659532608, -0.117219543175),
    (-0.176860753121, -0.216393453025, -0.0148647893090),
)


def _planets(t, y, args):
    del t, args
    q, p = y
    masses = jnp.asarray(_MASSES, q.dtype)
    sun = q / jnp.sum(q**2, axis=1, keepdims=True) ** 1.5
    apart = q[None] - q[:, None]
    distance = jnp.sum(apart**2, axis=2) + jnp.eye(5, dtype=q.dtype)
    pull = masses[None, :, None] * (apart / distance[..., None] ** 1.5 - sun[None])
    own = (_SUN + masses)[:, None] * sun
    others = jnp.sum(pull * (1 - jnp.eye(5, dtype=q.dtype))[..., None], axis=1)
    return jnp.stack([p, 2.95912208286 * (others - own)])


def _kepler(t, y, args):
    del t, args
    q, p = y
    return jnp.stack([p, -q / jnp.sum(q**2) ** 1.5])


def _ellipse(e):
    return _one([[1 - e, 0.0], [0.0, ((1 + e) / (1 - e)) ** 0.5]])


_BESSEL = 0.6713967071418030, 0.09540051444747446

DETEST = {
    "A1": Problem(lambda t, y, args: -y, _one([1.0]), 20.0),
    "A2": Problem(lambda t, y, args: -(y**3) / 2, _one([1.0]), 20.0),
    "A3": Problem(lambda t, y, args: y * jnp.cos(t), _one([1.0]), 20.0),
    "A4": Problem(lambda t, y, args: y / 4 * (1 - y / 20), _one([1.0]), 20.0),
    "A5": Problem(lambda t, y, args: (y - t) / (y + t), _one([4.0]), 20.0),
    "B1": Problem(
        lambda t, y, args: jnp.stack([2 * y[0] * (1 - y[1]), -y[1] * (1 - y[0])]),
        _one([1.0, 3.0]),
        20.0,
    ),
    "B2": Problem(
        lambda t, y, args: jnp.stack([y[1] - y[0], y[0] - 2 * y[1] + y[2], y[1] - y[2]]),
        _one([2.0, 0.0, 1.0]),
        20.0,
    ),
    "B3": Problem(
        lambda t, y, args: jnp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]),
        _one([1.0, 0.0, 0.0]),
        20.0,
    ),
    "B4": Problem(_torus, _one([3.0, 0.0, 0.0]), 20.0),
    "B5": Problem(
        lambda t, y, args: jnp.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]),
        _one([0.0, 1.0, 1.0]),
        20.0,
    ),
    "C1": Problem(_chain(np.ones(9)), _one(_unit(10)), 20.0),
    "C2": Problem(_chain(np.arange(1.0, 10.0)), _one(_unit(10)), 20.0),
    "C3": Problem(_diffusion, _one(_unit(10)), 20.0),
    "C4": Problem(_diffusion, _one(_unit(51)), 20.0),
    "C5": Problem(_planets, _one([_POSITIONS, _VELOCITIES]), 20.0),
    **{
        f"D{i}": Problem(_kepler, _ellipse(e), 20.0)
        for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), start=1)
    },
    "E1": Problem(
        lambda t, y, args: jnp.stack(
            [y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])]
        ),
        _one(_BESSEL),
        20.0,
    ),
    "E2": Problem(_van_der_pol, _one([2.0, 0.0], 1.0), 20.0),
    "E3": Problem(
        lambda t, y, args: jnp.stack(
            [y[1], y[0] ** 3 / 6 - y[0] + 2 * jnp.sin(2.78535 * t)]
        ),
        _one([0.0, 0.0]),
        20.0,
    ),
    "E4": Problem(
        lambda t, y, args: jnp.stack([y[1], 0.032 - 0.4 * y[1] ** 2]),
        _one([30.0, 0.0]),
        20.0,
    ),
    "E5": Problem(
        lambda t, y, args: jnp.stack([y[1], jnp.sqrt(1 + y[1] ** 2) / (25 - t)]),
        _one([0.0, 0.0]),
        20.0,
    ),
}


# Separable Hamiltonian systems, of one size and of several.


def _pull(t, q, args):
    del t, args
    return -q / jnp.sum(q**2) ** 1.5


def _oscillators(t, q, args):
    del t
    frequencies, sizes = args
    return -sizes * frequencies**2 * jnp.sin(q / sizes)


def _momentum(t, p, args):
    del t, args
    return p


def _hamiltonian(force, q0, p0, args=None, sizes=1.0):
    def field(t, y, args):
        return _momentum(t, y[1], args), force(t, y[0], args)

    y0 = np.array(q0, float), np.array(p0, float)
    return Problem(field, {"": (y0, args)}, 20.0, sizes, (_momentum, force))


_SIZES = np.array([1.0, 1e-6, 1e-3, 1e3])

HAMILTONIAN = {
    "Kepler, e = 0.3": _hamiltonian(_pull, [0.7, 0.0], [0.0, (1.3 / 0.7) ** 0.5]),
    "Kepler, e = 0.6": _hamiltonian(_pull, [0.4, 0.0], [0.0, 2.0]),
    "pendulums": _hamiltonian(
        _oscillators,
        _SIZES * [1.0, 0.5, 0.0, 2.0],
        _SIZES * [0.0, 0.3, 1.0, 0.0],
        (np.array([1.0, 2.0, 0.5, 3.0]), _SIZES),
        float(_SIZES.min()),
    ),
}


GROUPS: dict[str, dict[str, Problem]] = {
    "left half-plane": {
        "linear": left_half_plane(
            (1, 3, 10, 30, 100, 300), (90, 105, 120, 135, 150, 165, 180)
        )
    },
    "entries of many sizes": {
        f"{name}, size {small:g}": heterogeneous(small, (3.0, 22.0, 100.0), split)
        for name, split in (("one array", False), ("two arrays", True))
        for small in (1e-10, 1e-6, 1e-3, 1e3)
    },
    "kinetics": {
        "reactions": Problem(
            _reactions, _one([1.0, 0.0, 0.0]), 40.0, np.array([1, 1e-4, 1])
        ),
        "epidemic": Problem(_epidemic, _one([1e6, 0.0, 10.0, 0.0]), 60.0, 1e3),
    },
    "contracting": {
        "networks": _networks(-1, (2.0, 10.0, 50.0), 5.0),
        "van der Pol": Problem(
            _van_der_pol,
            {f"μ = {mu:g}": (np.array([2.0, 0.0]), mu) for mu in (1.0, 5.0, 20.0)},
            20.0,
        ),
    },
    "expanding": {"networks": _networks(1, (0.5, 1.0), 5.0)},
    "DETEST": DETEST,
    "Hamiltonian": HAMILTONIAN,
}
