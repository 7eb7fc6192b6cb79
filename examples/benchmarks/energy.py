"""The energy of a planet over a thousand periods, with and without reversible steps.

`ALF4` and `Tsit5` solve Kepler's problem with an eccentricity of 0.8. Each takes its steps
from `StepDensityController` and from `PIDController`, with tolerances that give about as
many steps. `ALF4` is symmetric, and keeps the energy if the choice of steps is symmetric
too. The table gives the largest relative error of the energy in the first and in the last
tenth of the time, and the number of steps.

    python energy.py  # 10 seconds on two cores; writes energy.png
"""

import pathlib

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import diffrax_reversible as dr


matplotlib.use("agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

PERIODS = 1000
ECCENTRICITY = 0.8
# The desired step size, as a multiple of the distance to the power of 3/2.
FRACTION = 0.06


def kepler(t, y, args):
    del t, args
    q, p = y[:2], y[2:]
    return jnp.concatenate([p, -q / jnp.sum(q**2) ** 1.5])


def energy(y):
    q, p = y[..., :2], y[..., 2:]
    return jnp.sum(p**2, axis=-1) / 2 - 1 / jnp.linalg.norm(q, axis=-1)


def step_size(t, y, args):
    del t, args
    return FRACTION * jnp.sum(y[:2] ** 2) ** 0.75


DENSITY = dr.StepDensityController(step_size)
RUNS = {
    "ALF4, StepDensityController": (dr.ALF4(), DENSITY),
    "ALF4, PIDController": (dr.ALF4(), dfx.PIDController(rtol=3e-7, atol=3e-7)),
    "Tsit5, StepDensityController": (dfx.Tsit5(), DENSITY),
    "Tsit5, PIDController": (dfx.Tsit5(), dfx.PIDController(rtol=1e-7, atol=1e-7)),
}


def errors(solver, controller, ts):
    """Relative errors of the energy at `ts`, and the number of steps."""
    speed = np.sqrt((1 + ECCENTRICITY) / (1 - ECCENTRICITY))
    y0 = jnp.array([1 - ECCENTRICITY, 0.0, 0.0, speed])
    sol = dfx.diffeqsolve(
        dfx.ODETerm(kepler),
        solver,
        *(0.0, ts[-1], None, y0),
        stepsize_controller=controller,
        saveat=dfx.SaveAt(ts=ts),
        max_steps=None,
    )
    return np.abs(energy(sol.ys) / energy(y0) - 1), int(sol.stats["num_steps"])


if __name__ == "__main__":
    # About ten times per period, at changing phases.
    ts = jnp.linspace(0, PERIODS * 2 * np.pi, 10 * PERIODS + 8)
    tenth = len(ts) // 10
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    print(f"largest error of the energy{'':7}first tenth   last tenth       steps")
    drift = {}
    for name, (solver, controller) in RUNS.items():
        error, steps = errors(solver, controller, ts)
        first, last = error[:tenth].max(), error[-tenth:].max()
        drift[name] = last / first
        print(f"{name:32}{first:13.2e}{last:13.2e}{steps:12}")
        # The largest error in every ten periods.
        windows = error[:-8].reshape(-1, 100).max(axis=1)
        periods = 10 * (1 + np.arange(len(windows)))
        ax.loglog(periods, windows, "-" if "ALF4" in name else "--", label=name)
    ax.set(xlabel="periods", ylabel="relative error of the energy")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=150)
    assert drift.pop("ALF4, StepDensityController") < 1.5
    assert min(drift.values()) > 3, drift
    print("OK")
