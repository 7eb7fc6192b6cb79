"""Pulling a cotangent back through a step that is too large for a mode, in parts."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import (
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    RealScalarLike,
    SolverState,
    Y,
)
from .._solver.base import AbstractReversibleSolver
from .._solver.cotangent import Cotangent
from .._solver.interrupted_solver import CanRestart
from .._solver.ode_term import as_ode_term
from .._solver.probe import HasProbe
from .._solver.pullback import backward_step_and_pullback
from .._tree import tree_add, tree_axpy, tree_select, tree_zeros_of
from .outputs import Cursor
from .position import Position
from .pull_change import pull_change
from .pull_interpolated import pull_dense
from .walk import Walk


class Pulled(NamedTuple):
    """The cotangent at some time in the solve, and the cursors."""

    ct: Cotangent
    cursors: list[Cursor]


def pull_parts(
    walk: Walk,
    solver: AbstractReversibleSolver,
    position: Position,
    begin: tuple[Y, SolverState],
    parts: IntScalarLike,
    pulled: Pulled,
    interpolation: tuple[list[int], DenseInfo] | None,
) -> Pulled:
    """Pull a cotangent back through the step that ends at a `position`, as through several
    `parts` of equal length, each of which begins with a restart.

    The states between the parts are those of the cubic polynomial through both ends of the
    step. A step that is too large for a mode that has died out is a small one for the rest
    of the solution, so that the polynomial is as accurate as the step.

    - `begin`: the state and the solver state at the start of the step.
    - `parts`: for a single part, `pulled` is returned as it is.
    - `pulled`: for a single part, the cotangent and the cursors at the start of the step.
        Otherwise, what is due to a cotangent of the interpolation data of the whole step,
        the sum of `params` so far, and the cursors at the end of the step.
    - `interpolation`: the outputs that are interpolated, and what they are interpolated
        from; `None` if there are none.

    Returns the cotangent and the cursors at the start of the step.
    """
    divided = _Divided(walk, solver, position, begin, parts, interpolation)
    divides, ct, end = parts > 1, pulled.ct, position.cotangent
    of_dense = ct.where(divides)
    bars = (end.y, end.solver_state), (ct.y, ct.solver_state)
    pulled = pulled._replace(ct=Cotangent(*tree_select(divides, *bars), ct.params))
    some = lambda carry: eqxi.unvmap_any(carry[0] > 0)
    left = jnp.where(divides, parts, 0)
    pulled = lax.while_loop(some, divided.pull, (left, pulled))[1]
    if not walk.with_dense:
        return pulled
    ct, of_dense = pulled.ct, (of_dense.y, of_dense.solver_state)
    y, state = tree_add((ct.y, ct.solver_state), of_dense)
    return pulled._replace(ct=Cotangent(y, state, ct.params))


class _Divided(NamedTuple):
    """The arguments of `pull_parts`."""

    walk: Walk
    solver: AbstractReversibleSolver
    position: Position
    begin: tuple[Y, SolverState]
    parts: IntScalarLike
    interpolation: tuple[list[int], DenseInfo] | None

    def pull(self, carry: tuple[IntScalarLike, Pulled]) -> tuple[IntScalarLike, Pulled]:
        """Pull back through the last part of those that are `left`."""
        left, (ct, cursors) = carry
        solver, clock = self.solver, self.position.clock
        t0, t1, parts, here = clock.start, clock.end, self.parts, left > 0
        # The others stay at the end of their step.
        i = jnp.where(here, left, parts)
        fraction = lambda i: (i / parts).astype(jnp.result_type(t0))
        starts = jnp.where(here, t0 + (t1 - t0) * fraction(i - 1), t1)
        ends = jnp.where(i == parts, t1, t0 + (t1 - t0) * fraction(i))
        bar, dense_bar = ct.where(here), None
        if self.interpolation is not None and len(self.interpolation[0]) > 0:
            part = self._part(bar, cursors, starts, ends, here, i == 1)
            zeros = tree_zeros_of(self.interpolation[1])
            dense_bar, bar, cursors = pull_dense(
                self.walk, part, *self.interpolation, zeros, self.position
            )
        y = self._between(fraction(i))
        state, bar = self._restart(ends, y, bar)
        step = self.walk.combine, self.walk.params, starts, ends
        made = backward_step_and_pullback(solver, *step, y, state, bar, dense_bar)[2]
        bars = (made.y, made.solver_state), (ct.y, ct.solver_state)
        bars = tree_select(here, *bars)
        return left - 1, Pulled(Cotangent(*bars, made.params), cursors)

    def _restart(
        self, t: RealScalarLike, y: Y, ct: Cotangent
    ) -> tuple[SolverState, Cotangent]:
        """The solver state after a restart at `t`, and the cotangent before it."""
        solver, solver_state = self.solver, self.position.solver_state
        assert isinstance(solver, CanRestart)

        def restart(context, y, state):
            return solver.restart(context.terms, t, y, context.args, state)

        state, ct = pull_change(self.walk, restart, y, solver_state, ct)
        return eqx.combine(state, solver_state), ct

    def _part(
        self,
        cotangent: Cotangent,
        cursors: list[Cursor],
        start: RealScalarLike,
        end: RealScalarLike,
        here: BoolScalarLike,
        first: BoolScalarLike,
    ) -> Position:
        """The position at the end of a part, of which only the outputs in it are asked."""
        position = self.position
        previous = jnp.where(first, position.clock.previous_end, start)
        times = dict(start=start, end=end, previous_end=previous)
        return dataclasses.replace(
            position,
            # The first step also has the outputs at its start.
            step=jnp.where(first, position.step, position.step + 1),
            clock=dataclasses.replace(position.clock, **times),
            cotangent=cotangent,
            cursors=cursors,
        ).moves_if(here)

    def _between(self, s: RealScalarLike) -> Y:
        """The state at a fraction of the step."""
        solver, position = self.solver, self.position
        assert isinstance(solver, HasProbe)
        terms, args = self.walk.combine(self.walk.params)
        t0, t1 = position.clock.start, position.clock.end
        (y0, state0), y1 = self.begin, position.y
        slope0 = solver.slope(terms, t0, y0, args, state0)
        slope1 = solver.slope(terms, t1, y1, args, position.solver_state)
        control = as_ode_term(solver, terms).contr(t0, t1)
        change = jtu.tree_map(jnp.subtract, y1, y0)
        y = tree_axpy(s**2 * (3 - 2 * s), change, y0)
        y = tree_axpy(control * (s * (1 - s) ** 2), slope0, y)
        return tree_axpy(control * (-(s**2) * (1 - s)), slope1, y)
