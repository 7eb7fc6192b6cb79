"""Undoing a step and pulling a cotangent back through it."""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._custom_types import BoolScalarLike, DenseInfo, IntScalarLike, SolverState, Y
from .._solver.base import AbstractReversibleSolver
from .._solver.cotangent import Cotangent, Probe
from .._solver.interrupted_solver import advance_densely, interrupt
from .._solver.ode_term import as_ode_term
from .._solver.probe import HasProbe
from .._solver.pullback import (
    backward_step_and_pullback,
    errors_at_end,
    pull_through_step,
    StepStart,
)
from .._tree import tree_select, tree_zeros_of
from .kept import Kept
from .outputs import Cursor
from .position import Position
from .pull_interpolated import any_in_step, dense_cotangent, is_linear, pull_dense
from .pull_parts import pull_parts, Pulled
from .walk import Walk


class PulledStep(NamedTuple):
    """The results at the start of a step that was undone.

    - `probe`: the probe of the step, if the walk detects growth.
    - `parts`: the number of parts that it was pulled back through.
    - `hidden`: the errors at the end of the step of entries that it set off; `None` if
        entries at rest do not matter.
    """

    y: Y
    solver_state: SolverState
    cotangent: Cotangent
    cursors: list[Cursor]
    probe: Probe | None
    parts: IntScalarLike
    hidden: PyTree | None


def pull_step(
    walk: Walk, position: Position, solver_state: SolverState, kept: Kept
) -> PulledStep:
    """Undo the step that ends at a `position`, and pull back through it.

    If the step sets entries off, its reconstructed stages may be on the wrong side of a
    kink, so it is made again from its start, where these entries rest. So is a step that
    contracts too much to be undone, from its start, which is known.

    - `solver_state`: the solver state there, with what the solver recalls of the step.
    - `kept`: the known states.
    """
    solver, index = walk.solver_at(position), position.step - 1
    rest = walk.residuals.kept.rest
    interpolated = [i for i, output in enumerate(walk.outputs) if output.sub.ts is not None]
    known = ft.partial(_known_start, walk, position, kept)
    start = ft.partial(_start, walk, position, solver_state, known)
    if walk.makes_steps:
        reconstructed = start()
        start = lambda: reconstructed
    dense_bar, ct, cursors = None, position.cotangent, position.cursors
    parts, interpolation = _parts(walk, position), None
    if len(interpolated) > 0 or walk.with_dense:
        dense_info = _dense_info(walk, position, interpolated, start)
        dense_bar = dense_cotangent(walk, position, dense_info)
        interpolation = interpolated, dense_info
        whole = position.moves_if(parts == 1) if walk.divides else position
        dense_bar, ct, cursors = pull_dense(walk, whole, *interpolation, dense_bar)
    if walk.divides:
        ct = ct.where(parts == 1)
    begin, ct, off = _undo(
        walk, solver, position, solver_state, ct, dense_bar, start, known
    )
    y0, state0 = walk.settle(2 * index, begin)
    ct, probe = _with_probe(walk, position, y0, ct, dense_bar)
    if walk.divides:
        if probe is not None and walk.with_dense:
            probe = probe.where(parts == 1)
        pulled, begin = Pulled(ct, cursors), (y0, state0)
        ct, cursors = pull_parts(
            walk, solver, position, begin, parts, pulled, interpolation
        )
    hidden = None if rest is None else rest.moving(2 * index, off)
    return PulledStep(y0, state0, ct, cursors, probe, parts, hidden)


def _undo(
    walk: Walk,
    solver: AbstractReversibleSolver,
    position: Position,
    solver_state: SolverState,
    ct: Cotangent,
    dense_bar: DenseInfo | None,
    start: Callable[[], tuple[Y, SolverState]],
    known: Callable[[], tuple[Y, SolverState]],
) -> tuple[tuple[Y, SolverState], Cotangent, PyTree]:
    """The start of a step, the cotangent there, and the errors at the end of the step, if
    it was made again. `start` reconstructs its start, which may be `known`."""
    t0, t1 = position.clock.start, position.clock.end
    step, end = (walk.combine, walk.params, t0, t1), (position.y, position.solver_state)
    if walk.makes_steps:

        def step_times(params):
            return walk.context(params).times.of_step(t0, t1)

        begin = start()
        ct, made = pull_through_step(solver, *step, begin, ct, dense_bar, step_times)
        return begin, ct, errors_at_end(end, made)
    needs = _needs_start(walk, position)
    # Without entries at rest, only elements whose start is known need it.
    begins = (known, None) if walk.residuals.kept.rest is None else (start, end)
    y, state, ct, off = backward_step_and_pullback(
        *(solver, *step, position.y, solver_state, ct, dense_bar),
        None if needs is None else StepStart(needs, *begins),
    )
    return (y, state), ct, off


def _parts(walk: Walk, position: Position) -> IntScalarLike:
    """The number of parts through which a step is pulled back, see `Division`."""
    growth, departure = position.growth, walk.departure
    if growth is None or departure is None or not walk.divides:
        return jnp.array(1)
    terms, _ = walk.combine(walk.params)
    ends = position.clock.start, position.clock.end
    control = as_ode_term(walk.problem.solver, terms).contr(*ends)
    before, steps = walk.before(position), walk.residuals.count
    return growth.division.parts(
        growth.plan.divides, control, departure.stable, before, steps
    )


def _needs_start(walk: Walk, position: Position) -> BoolScalarLike | None:
    """Whether to make a step again from its start; `None` if there is never need."""
    rest, needs = walk.residuals.kept.rest, position.from_start
    if rest is not None:
        moves = rest.ends(2 * (position.step - 1))
        needs = moves if needs is None else needs | moves
    return needs


def _start(
    walk: Walk,
    position: Position,
    solver_state: SolverState,
    known: Callable[[], tuple[Y, SolverState]],
) -> tuple[Y, SolverState]:
    """The start of a step: reconstructed, with entries at rest as they are known, or known
    as a whole."""
    solver, step, from_start = walk.problem.solver, position.step - 1, position.from_start
    terms, args = walk.combine(walk.params)
    ends = position.clock.start, position.clock.end
    undone = solver.backward_step(terms, *ends, position.y, args, solver_state)
    undone = walk.settle(2 * step, undone)
    if from_start is None:
        return undone
    either = lambda: tree_select(from_start, known(), undone)
    return lax.cond(eqxi.unvmap_any(from_start), either, lambda: undone)


def _known_start(walk: Walk, position: Position, kept: Kept) -> tuple[Y, SolverState]:
    """The start of a step, if it is a known state."""
    terms, args = walk.combine(walk.params)
    held = kept.checkpoints.before(position.step, walk.replayer.start)
    begins = held.t, held.y, args, held.solver_state
    happened = kept.record.before(position.step - 1)
    state, _, _ = interrupt(walk.problem.solver, terms, *begins, *happened)
    return held.y, state


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


def _dense_info(
    walk: Walk,
    position: Position,
    interpolated: list[int],
    start: Callable[[], tuple[Y, SolverState]],
) -> DenseInfo:
    """The interpolation data of the step that ends at a `position`, from its `start`. Only
    their shapes, if no more is needed: interpolated states are linear in them."""
    terms, args = walk.combine(walk.params)
    ends = position.clock.start, position.clock.end

    def make_from(y, solver_state):
        step = walk.problem.solver, terms, *ends, y, args, solver_state
        return advance_densely(*step)[2]

    struct = eqx.filter_eval_shape(make_from, position.y, position.solver_state)
    used = [i for i in interpolated if not is_linear(walk, walk.outputs[i])]
    if len(used) == 0:
        return struct
    some = jnp.stack([any_in_step(walk, position, i) for i in used]).any()
    return lax.cond(
        eqxi.unvmap_any(some), lambda: make_from(*start()), lambda: tree_zeros_of(struct)
    )
