"""When implicit steps pay: a pendulum on a spring, as the spring gets stiffer.

The spring oscillates at the given frequency, the pendulum at about one. The spring starts
at rest, so that positions hardly contain the fast oscillation. Velocities contain more of
it, so implicit methods get a tolerance for positions. For every frequency, the table gives
the steps and the time, without compilation, of a gradient of the final position with
respect to the frequency and the initial state. At the tolerances chosen, errors of the
position are below 1e-4.
"""

import sys
import time

import diffrax as dfx
import jax
import jax.numpy as jnp
import optimistix as optx

import diffrax_reversible as dr


jax.config.update("jax_enable_x64", True)

QUICK = "--quick" in sys.argv
FREQUENCIES = (10.0, 100.0) if QUICK else (10.0, 100.0, 1e3, 1e4)
DURATION = 5.0


def of_position(error):
    return optx.rms_norm(error[0])


# The solver, its adjoint, the tolerance, and the norm of errors that it is for. With a norm
# of positions, `Tsit5` takes steps that are too large for the velocities.
METHODS = {
    "Tsit5": (dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint(), 1e-6, optx.rms_norm),
    "Kvaerno5": (dfx.Kvaerno5(), dfx.RecursiveCheckpointAdjoint(), 1e-4, of_position),
    "Gauss4": (dr.Gauss4(), dr.ReversibleAdjoint(), 1e-5, of_position),
    "Gauss6": (dr.Gauss6(), dr.ReversibleAdjoint(), 1e-5, of_position),
}


def field(t, y, frequency):
    q, p = y
    r = jnp.linalg.norm(q)
    return p, -(frequency**2) * (1 - 1 / r) * q - jnp.array([0.0, 1.0])


def final(y0, frequency, solver, adjoint, tol, norm):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        solver,
        0.0,
        DURATION,
        None,
        y0,
        frequency,
        stepsize_controller=dfx.PIDController(rtol=tol, atol=tol, norm=norm),
        adjoint=adjoint,
        max_steps=2**20,
    )
    assert sol.ys is not None
    return sol.ys[0][0, 0], sol.stats["num_steps"]


def main() -> None:
    y0 = jnp.array([1.0, 0.0]), jnp.zeros(2)
    print("| frequency | " + " | ".join(METHODS) + " |")
    print("|---|" + "---|" * len(METHODS))
    fewest = {}
    for frequency in FREQUENCIES:
        w, cells = jnp.array(frequency), []
        exact, _ = final(y0, w, dfx.Dopri8(), dfx.DirectAdjoint(), 1e-11, optx.rms_norm)
        for name, method in METHODS.items():
            if name == "Kvaerno5" and frequency > 1e3:
                cells.append("-")
                continue

            def loss(y0, w, method=method):
                return final(y0, w, *method)

            gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (value, steps), _ = jax.block_until_ready(gradient(y0, w))
            assert abs(value - exact) < 1e-4, (name, frequency, abs(value - exact))
            start = time.perf_counter()
            jax.block_until_ready(gradient(y0, w))
            milliseconds = 1e3 * (time.perf_counter() - start)
            cells.append(f"{int(steps):,} / {milliseconds:.1f} ms")
            fewest[name] = int(steps)
        print(f"| {frequency:,.0f} | " + " | ".join(cells) + " |")
    if not QUICK:
        assert fewest["Gauss6"] < 0.01 * fewest["Tsit5"]
    print("OK")


if __name__ == "__main__":
    main()
