"""Weigh Neptune, and find its orbit, from the motion of Uranus alone.

In 1846 Le Verrier computed from the irregular motion of Uranus where an unseen planet had
to be, and Galle found Neptune within one degree of that place. This script repeats the
computation with gradients through an N-body simulation.

The data are directions of Uranus as seen from the Sun, at irregular dates between 1900 and
2050, from JPL's ephemeris DE421. `BlanesMoan6` integrates the Sun, Jupiter, Saturn, Uranus,
the unknown planet and Pluto over 150 years. The unknowns are the mass of the planet, its
six orbital elements, and the initial state of Uranus. The fit starts with no mass, on a
circle of 38.8 astronomical units, which was Le Verrier's first guess. The derivative with
respect to the mass, at every fifth degree of that circle, tells where to begin. BFGS does
the rest; `ReversibleAdjoint` computes its gradients, and the Jacobians for its scales and
for the error bars.

The masses of the other bodies, and the initial states of all but Uranus and Neptune, are
those of DE421. The Sun and the four inner planets count as one body in their centre of
mass. Relativity, asteroids and satellites are left out. DE421 is itself a simulation that
was fitted to observations. It has no noise, so a last fit adds some, of 0.1 arcseconds.

The error of the mass is a block jackknife: the fit is repeated, linearised, without each of
ten blocks of 15 years. It covers errors of the model and of the solver, as far as they
differ between blocks. It excludes errors of the other masses and of the other initial
states. With noise, it follows from the size of the noise and the curvature at the minimum.

The script prints the orbit found beside that of DE421: the ellipse on which the planet
would move from 1900 on if only the Sun attracted it.

It asserts that the planet's mass is right within three standard errors, its longitude
within 0.01 degrees (3 degrees with noise), and without noise its semi-major axis within
0.01 astronomical units, its eccentricity within 0.001 and its inclination within 0.01
degrees. Without a planet, residuals exceed 30 arcseconds; with the planet found, they are
below a thousandth of an arcsecond.

Run `python examples/08_hidden_planet.py` after `pip install ".[examples]"`. It takes about
two minutes on two idle cores, or less than one with `--quick`, which uses fewer dates and
adds no noise. It writes `08_hidden_planet.png`.
"""

import argparse
import pathlib
import time
from typing import NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.optimize
import skyfield_data
import tqdm
from jaxtyping import Array, Float
from jplephem.spk import SPK

import diffrax_reversible as dr


matplotlib.use("Agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

# GM in km^3/s^2, and the astronomical unit in km: Folkner, Williams & Boggs (2009), The
# Planetary and Lunar Ephemeris DE421, IPN Progress Report 42-178. Keys are SPK's numbers.
INNER = {10: 132712440040.944, 1: 22032.09, 2: 324858.592, 3: 403503.236, 4: 42828.375214}
OUTER = {5: 126712764.8, 6: 37940585.2, 7: 5794548.6, 8: 6836535.0, 9: 977.0}
AU, DAYS = 149597870.6996262, 365.25
GM_UNIT = AU**3 / (DAYS * 86400) ** 2
# Rows of a state.
SUN, URANUS, NEPTUNE = 0, 3, 4
JD_1900, YEARS, DT = 2415020.5, 150.0, 0.5
BODE, NOISE = 38.8, 0.1
ARCSECONDS = np.rad2deg(1) * 3600
# Unknowns: the mass of the planet in Neptunes, corrections to the initial state of Uranus,
# and the elements of the planet.
MASS, ORBIT_OF_URANUS, ELEMENTS = slice(0, 1), slice(1, 7), slice(7, 13)
KNOWN_ORBIT, EVERYTHING = slice(0, 7), slice(0, 13)

Unknowns = Float[Array, "13"]
Bodies = Float[Array, "bodies 3"]


class Data(NamedTuple):
    """Years since 1900, unit vectors to Uranus and on the sky, and noise in arcseconds."""

    ts: np.ndarray
    direction: np.ndarray
    east: np.ndarray
    north: np.ndarray
    noise: np.ndarray


def ephemeris(ts) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities of the six bodies, in the ecliptic of 2000."""
    path = pathlib.Path(skyfield_data.__file__).parent / "data" / "de421.bsp"
    tilt = np.deg2rad(84381.448 / 3600)
    c, s = np.cos(tilt), np.sin(tilt)
    rotation = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    kernel = SPK.open(str(path))

    def state(body):
        q, v = kernel[0, body].compute_and_differentiate(JD_1900 + np.asarray(ts) * DAYS)
        return np.stack([rotation @ q / AU, rotation @ v / AU * DAYS])

    sun = sum(gm * state(body) for body, gm in INNER.items()) / sum(INNER.values())
    states = np.stack([sun, *map(state, OUTER)], axis=1)
    kernel.close()
    q, v = np.moveaxis(states, 2, -1)
    return np.moveaxis(q, 0, -2), np.moveaxis(v, 0, -2)


GM = np.array([sum(INNER.values()), *OUTER.values()]) / GM_UNIT
START = tuple(np.asarray(x) for x in ephemeris(0.0))


def observations(count: int, rng: np.random.Generator) -> Data:
    ts = np.sort(rng.uniform(0, YEARS, count))
    q, _ = ephemeris(ts)
    direction = q[:, URANUS] - q[:, SUN]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    east = np.cross([0.0, 0.0, 1.0], direction)
    east /= np.linalg.norm(east, axis=1, keepdims=True)
    noise = np.zeros((2, count))
    return Data(ts, direction, east, np.cross(direction, east), noise)


def orbit(elements) -> tuple[Float[Array, "3"], Float[Array, "3"]]:
    """Heliocentric position and velocity in 1900.

    Equinoctial elements: the logarithm of the semi-major axis, the mean longitude half-way
    through the data, and two each for eccentricity and inclination. They have no
    singularity at the circle that the fit starts from.
    """
    log_a, longitude, k, h, p, q = elements
    a = jnp.exp(log_a)
    n = jnp.sqrt(GM[SUN] / a**3)
    mean = longitude - n * YEARS / 2
    x = mean
    for _ in range(8):
        # Newton's method for Kepler's equation.
        c, s = jnp.cos(x), jnp.sin(x)
        x = x - (x + h * c - k * s - mean) / (1 - h * s - k * c)
    c, s = jnp.cos(x), jnp.sin(x)
    b = 1 / (1 + jnp.sqrt(1 - h**2 - k**2))
    speed = a * n / (1 - k * c - h * s)
    along = a * ((1 - h**2 * b) * c + h * k * b * s - k)
    across = a * ((1 - k**2 * b) * s + h * k * b * c - h)
    v_along = speed * (h * k * b * c - (1 - h**2 * b) * s)
    v_across = speed * ((1 - k**2 * b) * c - h * k * b * s)
    f = jnp.stack([1 - p**2 + q**2, 2 * p * q, -2 * p]) / (1 + p**2 + q**2)
    g = jnp.stack([2 * p * q, 1 + p**2 - q**2, 2 * q]) / (1 + p**2 + q**2)
    return along * f + across * g, v_along * f + v_across * g


def velocity(t, v: Bodies, gm) -> Bodies:
    del t, gm
    return v


def acceleration(t, q: Bodies, gm) -> Bodies:
    del t
    distances = [x - x[:, None] for x in q.T]
    # The distance of a body from itself is zero: adding one avoids division by zero.
    r2 = sum(x**2 for x in distances) + jnp.eye(len(q))
    return jnp.stack([jnp.sum(gm * r2**-1.5 * x, axis=1) for x in distances], axis=1)


class Method(NamedTuple):
    """A solver with its step sizes, and an adjoint to backpropagate through it."""

    name: str
    solver: dfx.AbstractSolver
    adjoint: dfx.AbstractAdjoint
    dt: float | None = DT
    controller: dfx.AbstractStepSizeController = dfx.ConstantStepSize()


SOLVER = dr.BlanesMoan6(nystrom=True)
REVERSIBLE = Method("BlanesMoan6, ReversibleAdjoint", SOLVER, dr.ReversibleAdjoint())
EXACT = Method("KahanLi8", dr.KahanLi8(), dr.ReversibleAdjoint(), DT / 4)
CHECKPOINTED = dfx.RecursiveCheckpointAdjoint()
METHODS = (
    REVERSIBLE,
    Method("BlanesMoan6, RecursiveCheckpointAdjoint", SOLVER, CHECKPOINTED),
    Method(
        "BlanesMoan6, all states stored",
        SOLVER,
        dfx.RecursiveCheckpointAdjoint(checkpoints=round(YEARS / DT)),
    ),
    Method(
        "Dopri8, RecursiveCheckpointAdjoint",
        dfx.Dopri8(),
        CHECKPOINTED,
        None,
        dfx.PIDController(rtol=5e-10, atol=5e-10),
    ),
)


def solve(unknowns: Unknowns, ts, method: Method = REVERSIBLE):
    """Positions and velocities of the six bodies at `ts`."""
    q, v = orbit(unknowns[ELEMENTS])
    change = unknowns[ORBIT_OF_URANUS]
    q0 = jnp.asarray(START[0]).at[URANUS].add(change[:3]).at[NEPTUNE].set(START[0][SUN] + q)
    v0 = jnp.asarray(START[1]).at[URANUS].add(change[3:]).at[NEPTUNE].set(START[1][SUN] + v)
    gm = jnp.asarray(GM).at[NEPTUNE].multiply(unknowns[MASS][0])
    terms, y0 = (dfx.ODETerm(velocity), dfx.ODETerm(acceleration)), (q0, v0)
    if not isinstance(method.solver, dr.BlanesMoan6 | dr.KahanLi8):
        terms = dfx.ODETerm(lambda t, y, gm: (y[1], acceleration(t, y[0], gm)))
    sol = dfx.diffeqsolve(
        terms,
        method.solver,
        0.0,
        YEARS,
        method.dt,
        y0,
        gm,
        saveat=dfx.SaveAt(ts=ts),
        stepsize_controller=method.controller,
        adjoint=method.adjoint,
        max_steps=1024 if method.dt is None else round(YEARS / method.dt) + 1,
    )
    assert sol.ys is not None
    return sol.ys


def residuals(unknowns: Unknowns, data: Data, method: Method = REVERSIBLE):
    """Residuals of Uranus as seen from the Sun, east and north, in arcseconds."""
    q, _ = solve(unknowns, data.ts, method)
    direction = q[:, URANUS] - q[:, SUN]
    direction = direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
    difference = ARCSECONDS * (direction - data.direction)
    sky = [jnp.sum(difference * axis, axis=1) for axis in (data.east, data.north)]
    return jnp.stack(sky) - data.noise


def mean_square(unknowns: Unknowns, data: Data, method: Method = REVERSIBLE):
    return jnp.mean(residuals(unknowns, data, method) ** 2)


@jax.jit
def jacobian(unknowns: Unknowns, data: Data):
    return jax.jacrev(residuals)(unknowns, data).reshape(-1, len(unknowns))


@jax.jit
def scaled_gradient(z, centre: Unknowns, scales, data: Data):
    def loss(z):
        return mean_square(centre + scales @ z, data)

    return jax.value_and_grad(loss)(z)


def natural_scales(unknowns: Unknowns, free: slice, data: Data) -> np.ndarray:
    """Directions in which the mean square has about the same curvature."""
    columns = np.asarray(jacobian(unknowns, data))[:, free]
    norms = np.linalg.norm(columns, axis=0)
    _, s, vt = np.linalg.svd(columns / norms, full_matrices=False)
    scales = np.zeros((len(unknowns), len(unknowns)))
    scales[free, free] = vt.T / np.sqrt(s**2 + 1e-7) / norms[:, None]
    return scales * np.sqrt(len(data.ts))


def fit(unknowns: Unknowns, free: slice, data: Data, name: str):
    """BFGS, restarted with new scales while that helps. Returns all estimates."""
    history, last = [unknowns], np.inf
    with tqdm.tqdm(desc=name, unit=" gradients") as progress:
        for _ in range(10):
            scales = natural_scales(history[-1], free, data)

            def loss(z, centre=history[-1], scales=scales):
                value, gradient = scaled_gradient(z, centre, scales, data)
                progress.update()
                progress.set_postfix_str(f"rms {float(value) ** 0.5:.3g} arcseconds")
                return float(value), np.asarray(gradient)

            found = scipy.optimize.minimize(
                loss,
                np.zeros(len(unknowns)),
                jac=True,
                method="BFGS",
                options={"maxiter": 60, "gtol": 1e-6},
            )
            history.append(history[-1] + scales @ found.x)
            if found.fun > 0.999 * last:
                break
            last = found.fun
        return history, progress.n


@jax.jit
def pull_on_mass(longitudes, unknowns: Unknowns, data: Data):
    """Derivative of the mean square in the planet's mass, for each mean longitude."""

    def at(longitude):
        placed = unknowns.at[ELEMENTS.start + 1].set(longitude)
        return jax.grad(mean_square)(placed, data)[0]

    return jax.vmap(at)(longitudes)


def jackknife(unknowns: Unknowns, free: slice, data: Data, blocks=10) -> float:
    """Standard error of GM from linearised fits that leave out 15 years each."""
    matrix = np.asarray(jacobian(unknowns, data))[:, free]
    residual = np.asarray(residuals(unknowns, data)).ravel()
    norms = np.linalg.norm(matrix, axis=0)
    block = np.tile((data.ts * blocks / YEARS).astype(int), 2)
    masses = []
    for b in range(blocks):
        kept = block != b
        step, *_ = np.linalg.lstsq(matrix[kept] / norms, -residual[kept], rcond=None)
        masses.append(step[0] / norms[0])
    return (blocks - 1) ** 0.5 * np.std(masses)


def curvature_error(unknowns: Unknowns, data: Data) -> float:
    """Standard error of the mass from the noise, by the curvature of the mean square."""
    matrix = np.asarray(jacobian(unknowns, data))
    norms = np.linalg.norm(matrix, axis=0)
    covariance = np.linalg.inv(matrix.T @ matrix / np.outer(norms, norms))
    return NOISE * covariance[0, 0] ** 0.5 / norms[0]


def longitude_error(unknowns: Unknowns) -> float:
    """Largest error, over the years, of the planet's longitude from the Sun, in degrees."""
    ts = np.arange(0, YEARS + 1)
    relative = [
        q[:, NEPTUNE] - q[:, SUN] for q in (solve(unknowns, ts)[0], ephemeris(ts)[0])
    ]
    found, true = (np.arctan2(q[:, 1], q[:, 0]) for q in map(np.asarray, relative))
    return float(np.max(np.abs(np.rad2deg((found - true + np.pi) % (2 * np.pi) - np.pi))))


class Row(NamedTuple):
    """A fit, as printed. `error` is the standard error of the mass, in Neptunes."""

    name: str
    unknowns: Unknowns
    rms: float
    error: float
    degrees: float
    gradients: int


def summary(name: str, unknowns: Unknowns, error: float, data: Data, gradients: int) -> Row:
    rms = float(mean_square(unknowns, data)) ** 0.5
    return Row(name, unknowns, rms, error, longitude_error(unknowns), gradients)


def shape(unknowns: Unknowns) -> tuple[float, float, float]:
    """Semi-major axis, eccentricity, and inclination in degrees, of the orbit in 1900."""
    log_a, _, k, h, p, q = np.asarray(unknowns[ELEMENTS])
    return np.exp(log_a), np.hypot(k, h), np.rad2deg(2 * np.arctan(np.hypot(p, q)))


def print_orbits(orbits: dict[str, Unknowns]) -> None:
    print(f"\n{'orbit in 1900':24}semi-major axis [au]  eccentricity  inclination [deg]")
    for name, unknowns in orbits.items():
        axis, eccentricity, inclination = shape(unknowns)
        print(f"{name:24}{axis:20.4f}{eccentricity:14.5f}{inclination:19.4f}")


def fit_without(data: Data) -> Row:
    """Fit the initial state of Uranus, without another planet."""
    start = jnp.zeros(13).at[ELEMENTS.start].set(np.log(BODE))
    (*_, found), n = fit(start, ORBIT_OF_URANUS, data, "no planet")
    return summary("no hidden planet", found, np.nan, data, n)._replace(degrees=np.nan)


def fit_known_orbit(start: Unknowns, data: Data) -> Row:
    """Fit the mass, with the orbit of DE421."""
    target = np.concatenate([x[NEPTUNE] - x[SUN] for x in START])
    elements = scipy.optimize.root(
        lambda x: np.concatenate(orbit(x)) - target, [np.log(30), 4.0, 0, 0, 0, 0]
    ).x
    start = start.at[ELEMENTS].set(elements)
    (*_, found), n = fit(start, KNOWN_ORBIT, data, "orbit of Neptune known")
    error = jackknife(found, KNOWN_ORBIT, data)
    return summary("orbit of Neptune known", found, error, data, n)


def fit_hidden(start: Unknowns, data: Data) -> tuple[Row, list[Unknowns]]:
    """Fit the mass on a circle first, and then everything."""
    longitudes = np.deg2rad(np.arange(0, 360, 5))
    best = longitudes[np.argmin(pull_on_mass(longitudes, start, data))]
    start = start.at[ELEMENTS.start + 1].set(best)
    (*_, circle), n = fit(start, KNOWN_ORBIT, data, "mass, on a circle")
    history, more = fit(circle, EVERYTHING, data, "mass and orbit")
    error = jackknife(history[-1], EVERYTHING, data)
    return summary("mass and orbit unknown", history[-1], error, data, n + more), history


def fit_noisy(start: Unknowns, data: Data, rng: np.random.Generator) -> Row:
    data = data._replace(noise=NOISE * rng.standard_normal(data.noise.shape))
    (*_, found), n = fit(start, EVERYTHING, data, "with noise")
    return summary("the same, with noise", found, curvature_error(found, data), data, n)


def check_solver(unknowns: Unknowns, data: Data) -> tuple[float, float, float]:
    """Relative error of the energy, and errors of two step sizes in arcseconds."""
    gm = GM * np.where(np.arange(len(GM)) == NEPTUNE, unknowns[0], 1.0)
    q, v = solve(unknowns, data.ts)
    distance = jnp.linalg.norm(q[:, :, None] - q[:, None], axis=-1)
    pairs = np.triu(np.outer(gm, gm), 1) / jnp.where(distance > 0, distance, 1.0)
    energy = jnp.sum(gm * jnp.sum(v**2, -1), -1) / 2 - jnp.sum(pairs, (1, 2))
    exact = residuals(unknowns, data, EXACT)
    methods = (REVERSIBLE, REVERSIBLE._replace(dt=DT / 2))
    coarse, fine = (
        float(jnp.max(jnp.abs(residuals(unknowns, data, m) - exact))) for m in methods
    )
    return float(jnp.max(jnp.abs(energy / energy[0] - 1))), coarse, fine


class Cost(NamedTuple):
    """Error of the solution; milliseconds and kilobytes of a gradient; kilobytes of 72."""

    error: float
    time: float
    memory: float
    memory_of_scan: float


def kilobytes(compiled) -> float:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 1e3


def costs(methods, unknowns: Unknowns, data: Data, with_scan: bool) -> list[Cost]:
    exact = residuals(unknowns, data, EXACT)
    compiled, errors, scans = [], [], []
    for method in tqdm.tqdm(methods, desc="compiling"):
        gradient = jax.value_and_grad(lambda x, m=method: mean_square(x, data, m))
        compiled.append(jax.jit(gradient).lower(unknowns).compile())
        errors.append(jnp.max(jnp.abs(residuals(unknowns, data, method) - exact)))
        many = jnp.tile(unknowns, (72, 1))
        scan = jax.jit(jax.vmap(gradient)).lower(many).compile() if with_scan else None
        scans.append(kilobytes(scan) if scan else np.nan)
    times = []
    for _ in range(21):
        for gradient in compiled:
            start = time.perf_counter()
            jax.block_until_ready(gradient(unknowns))
            times.append(1e3 * (time.perf_counter() - start))
    # The first run of each is a warm-up.
    times = np.median(np.reshape(times, (-1, len(methods)))[1:], axis=0)
    memory = map(kilobytes, compiled)
    return [Cost(float(e), *x) for e, *x in zip(errors, times, memory, scans, strict=True)]


def plot_orbits(axes, history: list[Unknowns]) -> None:
    ts = np.arange(0.0, YEARS + 1, 2)
    q, _ = ephemeris(ts)
    true = q - q[:, [SUN]]
    axes.plot(*true[:, URANUS, :2].T, color="tab:cyan")
    axes.plot(
        *true[:, NEPTUNE, :2].T, color="tab:blue", linewidth=6, alpha=0.3, label="Neptune"
    )
    for i, unknowns in enumerate(history):
        q, _ = solve(unknowns, ts)
        x, y, _ = np.asarray(q[:, NEPTUNE] - q[:, SUN]).T
        if i < len(history) - 1:
            label = "first guess, and on the way" if i == 0 else None
            axes.plot(x, y, color="tab:red", linewidth=0.8, alpha=0.6, label=label)
        else:
            axes.plot(x[::5], y[::5], "k.", markersize=5, label="planet found")
    axes.plot(0, 0, "o", color="orange")
    axes.text(0, -2, "Sun", ha="center", va="top", color="darkorange")
    axes.text(0, 13, "Uranus", ha="center", color="tab:cyan")
    axes.set(aspect="equal")
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), frameon=False, fontsize=9)


def plot(without: Row, hidden: Row, history: list[Unknowns], data: Data, path) -> None:
    figure = plt.figure(figsize=(8.6, 4.6))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), hspace=0.5, wspace=0.12)
    for i, (row, title, unit, color) in enumerate(
        (
            (without, "Uranus without a hidden planet", 1.0, "tab:red"),
            (hidden, "Uranus with the planet that was found", 1e3, "black"),
        )
    ):
        axes = figure.add_subplot(grid[i, 0])
        east, _ = np.asarray(residuals(row.unknowns, data)) * unit
        axes.axhline(0, color="lightgrey", linewidth=1)
        axes.plot(1900 + data.ts, east, ".-", color=color, markersize=4, linewidth=0.7)
        axes.set_ylabel("arcseconds" if i == 0 else "milliarcseconds")
        axes.set_title(title, color=color, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    plot_orbits(figure.add_subplot(grid[:, 1]), history)
    off = abs(float(hidden.unknowns[0]) - 1)
    figure.suptitle(
        f"Uranus gives away Neptune: mass off by {100 * off:.3f} %, "
        f"longitude by {hidden.degrees:.3f}°"
    )
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer dates and fits")
    quick = parser.parse_args().quick
    rng = np.random.default_rng(0)
    data = observations(60 if quick else 200, rng)

    without = fit_without(data)
    start = jnp.asarray(without.unknowns)
    hidden, history = fit_hidden(start, data)
    rows = [without, fit_known_orbit(start, data), hidden]
    if not quick:
        rows.append(fit_noisy(hidden.unknowns, data, rng))
    print(f"\nGM of Neptune [km^3/s^2]: {OUTER[8]:.0f} in DE421")
    print(f"{'':24}residual['']          GM      error  longitude  gradients")
    print(f"{'':24}root mean sq.                        off [deg]")
    for row in rows:
        gm, error = OUTER[8] * float(row.unknowns[0]), OUTER[8] * row.error
        print(
            f"{row.name:24}{row.rms:13.5f}{gm:12.0f}{error:11.0f}{row.degrees:11.5f}"
            f"{row.gradients:11}"
        )

    # The orbit of DE421 is the one that is taken as known.
    orbits = {"DE421": rows[1].unknowns} | {row.name: row.unknowns for row in rows[2:]}
    print_orbits(orbits)

    energy, coarse, fine = check_solver(hidden.unknowns, data)
    print(f"\nenergy constant to {energy:.1e}; error of Uranus by steps of half a year")
    print(f"{coarse:.1e}'', and by steps of a quarter {fine:.1e}''")

    methods = METHODS[:2] if quick else METHODS
    measured = costs(methods, hidden.unknowns, data, not quick)
    print(f"\n{'one gradient':42}error['']  time [ms]  memory [kB]  of 72 at once")
    for method, cost in zip(methods, measured, strict=True):
        print(f"{method.name:42}{cost.error:9.1e}{cost.time:11.1f}", end="")
        print(f"{cost.memory:13.1f}{cost.memory_of_scan:15.1f}")

    path = pathlib.Path(__file__).with_suffix(".png")
    plot(without, hidden, history, data, path)
    print(f"\nplotted in {path.name}")
    check(rows, coarse, fine, energy, measured)
    print("OK")


def check(rows: list[Row], coarse, fine, energy, measured: list[Cost]) -> None:
    without, *fits = rows
    hidden = fits[1]
    assert without.rms > 30 and hidden.rms < 1e-3, rows
    for row in fits:
        assert abs(float(row.unknowns[0]) - 1) < 3 * row.error, row
    assert all(row.error < 2e-4 for row in fits[:2]), rows
    # Le Verrier was off by one degree.
    assert hidden.degrees < 0.01, hidden
    found, known = (np.array(shape(row.unknowns)) for row in (hidden, fits[0]))
    assert np.all(np.abs(found - known) < (1e-2, 1e-3, 1e-2)), (found, known)
    if len(fits) > 2:
        noisy = fits[2]
        assert noisy.error < 0.01 and noisy.degrees < 3, noisy
        assert abs(noisy.rms / NOISE - 1) < 0.15, noisy
        ours, default, stored, _ = (cost.memory_of_scan for cost in measured)
        assert ours < 0.8 * default and ours < 0.4 * stored, measured
    assert fine < coarse < 0.5 * hidden.rms and energy < 1e-6, (fine, coarse, energy)


if __name__ == "__main__":
    main()
