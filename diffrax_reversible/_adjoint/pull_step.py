"""Undoing a step and pulling a cotangent back through it."""

import functools as ft
from typing import NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import DenseInfo, IntScalarLike, SolverState, Y
from .._solver.capabilities import advance_densely
from .._solver.pullback import (
    backward_step_and_pullback,
    Cotangent,
    HasProbe,
    linearise_step,
    Probe,
)
from .outputs import Cursor
from .pull_outputs import pull_dense
from .rest import Rest
from .walk import Position, Walk


class PulledStep(NamedTuple):
    """The results at the start of a step that was undone.

    - `probe`: the probe of the step, if the walk detects growth.
    - `hidden`: the errors at the end of the step of entries that it set off; `None` if
        entries at rest do not matter.
    """

    y: Y
    solver_state: SolverState
    cotangent: Cotangent
    cursors: list[Cursor]
    probe: Probe | None
    hidden: PyTree | None


def pull_step(
    walk: Walk,
    position: Position,
    solver_state: SolverState,
    step: IntScalarLike,
    known: tuple[Y, SolverState] | None = None,
) -> PulledStep:
    """Undo the `step` that ends at a position, and pull back through it.

    If the step sets entries off, its reconstructed stages may be on the wrong side of a
    kink, so it is recomputed from its start, where these entries rest. If its start is
    `known`, nothing is reconstructed.
    """
    t0, t1 = position.clock.start, position.clock.end
    state, rest = (position.y, solver_state), walk.residuals.kept.rest
    # Without what the solver recalls, which is of the start of the step.
    here = position.y, position.solver_state
    undone = walk.problem.solver, walk.combine, walk.params, t0, t1, *state
    settle = ft.partial(walk.settle, 2 * step)

    def pulled(start, ct, cursors, dense_bar, end):
        y0, state0 = settle(start) if known is None else known
        ct, probe = _with_probe(walk, position, y0, ct, dense_bar)
        hidden = _hidden(rest, step, here, end)
        return PulledStep(y0, state0, ct, cursors, probe, hidden)

    interpolated = [i for i, output in enumerate(walk.outputs) if output.sub.ts is not None]
    linear = all(walk.outputs[i].saves_state for i in interpolated)
    if linear and not walk.differentiates_times:
        dense_bar, ct, cursors = None, position.cotangent, position.cursors
        if len(interpolated) > 0 or walk.with_dense:
            # Only its shapes are used, as interpolations are linear.
            info = t0, t1, _dense_struct(walk, t0, t1, *state)
            dense_bar, ct, cursors = pull_dense(walk, position, interpolated, *info)

        def undo():
            y0, state0, bar = backward_step_and_pullback(*undone, ct, dense_bar, known)
            return pulled((y0, state0), bar, cursors, dense_bar, here)

        def undo_and_make():
            reads = dense_bar is not None
            start, made, pull = linearise_step(*undone, settle, reads=reads)
            return pulled(start, pull(ct, dense_bar), cursors, dense_bar, made.end)

        if rest is None or known is not None:
            return undo()
        return lax.cond(eqxi.unvmap_any(rest.ends(2 * step)), undo_and_make, undo)

    def step_times(params):
        times = walk.context(params).times
        return times.of(t0), times.of(t1)

    settled = settle if known is None else None
    start, made, pull = linearise_step(*undone, settled, step_times, start=known)
    info = t0, t1, made.dense_info
    dense_bar, ct, cursors = pull_dense(walk, position, interpolated, *info)
    return pulled(start, pull(ct, dense_bar), cursors, dense_bar, made.end)


def _hidden(
    rest: Rest | None,
    step: IntScalarLike,
    reconstructed: tuple[Y, SolverState],
    end: tuple[Y, SolverState],
) -> PyTree | None:
    """See `PulledStep`, where `end` is the end of the step when it is made again."""
    if rest is None:
        return None
    real = lambda x: eqx.filter(x, eqx.is_inexact_array)
    off = jtu.tree_map(jnp.subtract, real(reconstructed), real(end))
    return rest.moving(2 * step, off)


def _with_probe(
    walk: Walk, position: Position, y0: Y, ct: Cotangent, dense_bar: DenseInfo | None
) -> tuple[Cotangent, Probe | None]:
    """A cotangent without its probe, and the probe, if the walk detects growth."""
    probe = ct.probe
    ct = Cotangent(ct.y, ct.solver_state, ct.params)
    if position.growth is None:
        return ct, None
    if probe is None:
        solver, clock = walk.problem.solver, position.clock
        step = clock.start, clock.end, y0, ct, dense_bar
        assert isinstance(solver, HasProbe)
        probe = solver.probe(walk.combine, walk.params, *step)
    return ct, probe


def _dense_struct(walk: Walk, t0, t1, y, solver_state) -> DenseInfo:
    terms, args = walk.combine(walk.params)
    _, _, dense_info, _, _ = eqx.filter_eval_shape(
        advance_densely, walk.problem.solver, terms, t0, t1, y, args, solver_state
    )
    return dense_info
