"""Why a solve or its gradient is slow, large, or refused."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.tree_util as jtu
from diffrax import AbstractSolver, Solution
from jax.core import Tracer
from jaxtyping import PyTree

from .._adjoint.drift import coarsest_eps
from .._adjoint.reversible import ReversibleAdjoint
from .advice import advise
from .attempts import Attempts, RecordingController
from .explanation import default_gradient, Explanation
from .gradient import Solve, sum_of_squares, temporary_bytes
from .names import solver_name
from .rivals import compare, default_rivals, reason


def explain(
    terms: PyTree,
    solver: AbstractSolver,
    t0: Any,
    t1: Any,
    dt0: Any,
    y0: PyTree,
    args: PyTree = None,
    *,
    loss: Callable[[Solution], jax.Array] = sum_of_squares,
    rivals: tuple[AbstractSolver, ...] | None = None,
    **settings: Any,
) -> Explanation:
    """Explain why a solve or its gradient is slow, large, or refused.

    Call it in place of `diffrax.diffeqsolve`, with the same arguments, and print the
    result:

        print(diffrax_reversible.explain(terms, solver, t0, t1, dt0, y0, args, ...))

    It solves and differentiates, and reports the accepted and rejected steps, the restarts,
    the errors of the backward pass at known states, the memory of the gradient and of that
    under `diffrax.RecursiveCheckpointAdjoint`, and what to change. Call it outside of
    `jax.jit`, `jax.vmap` and `jax.grad`, for one member of a batch.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF4, explain
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> explanation = explain(term, ALF4(), 0, 1, 0.25, jnp.array(1.0), rivals=())
    >>> print(str(explanation).splitlines()[1].strip())
    steps          4 accepted, 0 rejected (0%), sizes from 0.25 to 0.25

    **Arguments:**

    - `terms` to `args`, and `settings`: as for `diffeqsolve`. The default adjoint is
        `ReversibleAdjoint()`.
    - `loss`: the scalar function of the solution that is differentiated, with respect to
        `y0`, `args` and `terms`. Defaults to the sum of squares of all outputs.
    - `rivals`: solvers to compare with, each under `ReversibleAdjoint()`; `()` for none.
        Defaults to those of this package for the same kind of `terms`, if steps are
        constant or by a `PIDController`. The solver itself is measured too, and also in
        float32, or in float64 if JAX has it, whichever the solve is not in. Errors are
        those of the outputs, or of the final state if these are at steps or dense, compared
        with a finer solve by the last of `rivals`.

    **Returns:**

    An `Explanation`.

    **Raises:**

    - `ValueError` if arguments are traced.
    - The errors of `diffeqsolve` for its arguments. If the solve does not succeed, or its
        gradient is refused, the explanation says why.

    **Cost:**

    About twenty compilations, five with `rivals=()`, and eleven runs of each gradient that
    is timed.
    """
    solve = Solve(terms, solver, t0, t1, dt0, y0, args, settings, loss)
    _check_concrete(solve)
    adjoint = settings.get("adjoint", ReversibleAdjoint())
    # Errors are told apart from results that are NaN.
    solve = solve.promoted().but(adjoint=adjoint, throw=True)
    failed, attempts, num_restarts = _solve(solve)
    known, report, refused = _differentiate(solve, adjoint)
    rivals = default_rivals(solve) if rivals is None else rivals
    explanation = Explanation(
        _title(solve),
        failed,
        attempts,
        num_restarts,
        known,
        report.get("undone_steps"),
        report.get("replayed_steps"),
        report.get("restarted_steps"),
        refused,
        _memory(solve, adjoint),
        compare(solve, rivals),
        [],
    )
    single = coarsest_eps(solve.y0) > 1e-8
    advice = advise(explanation, solver, _tolerance(solve.controller), single)
    return dataclasses.replace(explanation, advice=advice)


def _check_concrete(solve: Solve) -> None:
    everything = solve.t0, solve.t1, solve.dt0, solve.y0, solve.args, solve.terms
    if any(isinstance(x, Tracer) for x in jtu.tree_leaves(everything)):
        raise ValueError(
            "`explain` was called with traced values. It measures a solve as it runs: call "
            "it outside of `jax.jit`, `jax.vmap` and `jax.grad`."
        )


def _title(solve: Solve) -> str:
    leaves = jtu.tree_leaves(solve.differentiated[0])
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    names = solver_name(solve.solver), *dtypes, type(solve.controller).__name__
    return f"{', '.join(names)}, t from {float(solve.t0):g} to {float(solve.t1):g}"


def _solve(solve: Solve) -> tuple[str | None, Attempts, int]:
    """The reason for a failure, the attempted steps, and the number of restarts."""
    notes = []
    recording = RecordingController(solve.controller, notes.append)
    recorded = solve.but(stepsize_controller=recording, throw=False)
    sol = eqx.filter_jit(recorded.run)(solve.differentiated)
    jax.block_until_ready(sol.ys)
    jax.effects_barrier()
    restarts = int(sol.stats.get("num_restarts", 0))
    failed = None if dfx.is_okay(sol.result) else dfx.RESULTS[sol.result]
    return failed, Attempts.of(notes, solve.direction), restarts


def _differentiate(
    solve: Solve, adjoint: Any
) -> tuple[list[dict[str, Any]], dict[str, int], str | None]:
    """The known states, the counts of the backward pass, and the reason for a refusal."""
    known, reports = [], []
    if isinstance(adjoint, ReversibleAdjoint):
        adjoint = dataclasses.replace(adjoint, watch=known.append, report=reports.append)
    solve = solve.but(adjoint=adjoint)
    refused = None
    try:
        jax.block_until_ready(jax.jit(jax.grad(solve.value))(solve.differentiated))
    except Exception as e:
        refused = reason(e)
    jax.effects_barrier()
    known.sort(key=lambda state: -state["step"])
    known = [state | dict(t=solve.direction * state["t"]) for state in known]
    return known, reports[-1] if len(reports) > 0 else {}, refused


def _memory(solve: Solve, adjoint: Any) -> dict[str, int | None]:
    memory = {"solve": temporary_bytes(solve.compile_solve())}
    default = dfx.RecursiveCheckpointAdjoint()
    for name, other in (("gradient", adjoint), (default_gradient, default)):
        try:
            memory[name] = temporary_bytes(solve.compile_gradient(other))
        except Exception:
            # Reported elsewhere, or not an error of this package.
            memory[name] = None
    return memory


def _tolerance(controller: dfx.AbstractStepSizeController) -> float:
    """The relative tolerance of a `PIDController`."""
    while isinstance(controller, dfx.ClipStepSizeController):
        controller = controller.controller
    if isinstance(controller, dfx.PIDController):
        return float(controller.rtol)
    return float("inf")
