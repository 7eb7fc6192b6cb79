"""Time, memory and error of the same solve with different solvers."""

import contextlib
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from diffrax import AbstractSolver, AbstractStepSizeController

from .._adjoint.drift import coarsest_eps
from .._adjoint.reversible import ReversibleAdjoint
from .._solver.alf import ALF4, ALF6, ALF8
from .._solver.hamiltonian import BlanesMoan4, BlanesMoan6, KahanLi8, StormerVerlet
from .._solver.mccallum_foster import McCallumFoster
from .gradient import Solve, temporary_bytes


# The `max_steps` of the finer solve.
_most_steps = 100_000


class Rival(NamedTuple):
    """The measurements of one solver, as in `Explanation.rivals`.

    - `milliseconds`, `bytes`: the time and the temporary memory of a gradient.
    - `error`: the error of the outputs, as a fraction of their largest entry.
    - `refused`: the reason why there is no gradient, or `None`.
    - `dtype`: the precision, or `None` for that of the solve to explain.
    """

    solver: AbstractSolver
    milliseconds: float = float("nan")
    bytes: int | None = None
    error: float = float("nan")
    refused: str | None = None
    dtype: str | None = None


def default_rivals(solve: Solve) -> tuple[AbstractSolver, ...]:
    """The solvers of this package that take the same `terms` as the solver of `solve`, or
    none if its steps are given."""
    if _refine(solve, 1) is None:
        return ()
    structure = solve.solver.term_structure
    if structure == StormerVerlet().term_structure:
        return StormerVerlet(), BlanesMoan4(), BlanesMoan6(), KahanLi8()
    if isinstance(solve.terms, dfx.ODETerm):
        runge_kutta = McCallumFoster(dfx.Tsit5()), McCallumFoster(dfx.Dopri8())
        return ALF4(), ALF6(), ALF8(), *runge_kutta
    return ()


def compare(solve: Solve, solvers: tuple[AbstractSolver, ...]) -> list[Rival]:
    """Compare the solve by its own solver, by each of `solvers`, and by its own solver in
    single or double precision, whichever it is not in, with a finer one by the last of
    `solvers`."""
    if len(solvers) == 0:
        return []
    # Without a finer solve there are no errors to compare.
    reference = np.array(np.nan)
    finer = _refine(solve.but(solver=solvers[-1]), 1e-3)
    if finer is not None:
        # It may take too many steps.
        with contextlib.suppress(Exception):
            reference = finer.states()
    others = [solver for solver in solvers if solver != solve.solver]
    measure = lambda solver: _measure(solve.but(solver=solver), reference)
    rivals = [measure(solver) for solver in (solve.solver, *others)]
    other = _other_precision(solve)
    if other is not None:
        rivals.append(_measure(solve.in_precision(other), reference, other))
    return rivals


def _other_precision(solve: Solve) -> str | None:
    """Double precision for a state in single, if JAX has it, and the other way round."""
    precisions = {float(jnp.finfo(name).eps): name for name in ("float64", "float32")}
    own = precisions.pop(coarsest_eps(solve.y0), None)
    (other,) = precisions.values() if own is not None else (None,)
    can_double = jnp.result_type(float) == jnp.float64
    return None if other == "float64" and not can_double else other


def _measure(solve: Solve, reference: np.ndarray, dtype: str | None = None) -> Rival:
    try:
        error = _error(solve.states(), reference)
        compiled = solve.compile_gradient(ReversibleAdjoint())
        milliseconds = solve.milliseconds(compiled)
    except Exception as e:
        return Rival(solve.solver, refused=reason(e), dtype=dtype)
    size = temporary_bytes(compiled)
    return Rival(solve.solver, milliseconds, size, error, dtype=dtype)


def _error(states: np.ndarray, reference: np.ndarray) -> float:
    """The largest error of the outputs that both have, as some are not written after an
    event, as a fraction of the largest entry; NaN if there are none."""
    if states.shape != reference.shape:
        return float("nan")
    written = np.isfinite(states) & np.isfinite(reference)
    if not np.any(written):
        return float("nan")
    states, reference = states[written], reference[written]
    return float(np.max(np.abs(states - reference)) / np.max(np.abs(reference)))


def reason(error: Exception) -> str:
    """The message of an error, without what JAX and Equinox add."""
    text = str(error)
    for mark in ("EquinoxRuntimeError: ", "EqxRuntimeError: "):
        text = text.split(mark)[-1]
    return text.strip().split("\n\n")[0].replace("\n", " ")


def _refine(solve: Solve, factor: float) -> Solve | None:
    """The solve with tolerances `factor` times as large, or constant steps an eighth as
    long; `None` for other controllers."""
    if isinstance(solve.controller, dfx.ConstantStepSize):
        return solve if factor == 1 else solve.but(dt0=solve.dt0 / 8, max_steps=None)
    least = 32 * coarsest_eps(solve.y0)
    controller = _tighten(solve.controller, factor, least)
    if controller is None:
        return None
    return solve.but(stepsize_controller=controller, max_steps=_most_steps)


def _tighten(
    controller: AbstractStepSizeController, factor: float, least: float
) -> AbstractStepSizeController | None:
    if isinstance(controller, dfx.PIDController):
        old = controller.rtol, controller.atol
        new = [jnp.minimum(tol, jnp.maximum(factor * tol, least)) for tol in old]
        return eqx.tree_at(lambda c: (c.rtol, c.atol), controller, new)
    if isinstance(controller, dfx.ClipStepSizeController):
        inner = _tighten(controller.controller, factor, least)
        if inner is not None:
            return eqx.tree_at(lambda c: c.controller, controller, inner)
    return None
