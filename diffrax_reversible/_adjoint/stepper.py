"""The steps of a solve, one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation, RESULTS

from .._custom_types import BoolScalarLike, RealScalarLike, SolverState, Terms
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .._solver.interrupted_solver import advance_densely, interrupt, needs_restart
from .kept import Counted
from .problem import Inputs, Problem


_Kept = TypeVar("_Kept", bound=Counted)


@eqx.filter_jit
def _trace_once(*step):
    *outputs, result = advance_densely(*step)
    return outputs, result, result is RESULTS.successful


def _advance_densely(*step):
    """Traced once, although Diffrax asks for shapes several times. The result of a compiled
    function is an array; Diffrax makes a leaner loop if it sees that no step fails."""
    outputs, result, succeeds = _trace_once(*step)
    return *outputs, RESULTS.successful if succeeds else result


class _AdvancingState(eqx.Module):
    """The solver state, and whether the next step will be interpolated in."""

    solver_state: SolverState
    interpolates: BoolScalarLike


class Advancing(eqx.Module):
    """The solver as passed to Diffrax's `loop`: its steps do not restart, and evaluate the
    interpolation data only if they are read."""

    solver: AbstractReversibleSolver

    @property
    def interpolation_cls(self) -> Callable[..., AbstractLocalInterpolation]:
        return self.solver.interpolation_cls

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        step = self.solver, terms, t0, t1, y0, args
        if not isinstance(solver_state, _AdvancingState):
            # Only shapes are read, which are the same in every loop.
            return _advance_densely(*step, solver_state)
        y1, y_error, dense_info, after, result = advance_densely(
            *step, solver_state.solver_state, solver_state.interpolates
        )
        after = _AdvancingState(after, solver_state.interpolates)
        return y1, y_error, dense_info, after, result


class Stepper:
    """Takes the steps of a solve, one by one, as Diffrax does."""

    def __init__(self, inputs: Inputs, problem: Problem, cond_fun, body_fun, buffers):
        self.inputs = inputs
        self.problem = problem
        self.cond_fun = cond_fun
        self.body_fun = body_fun
        self.buffers = buffers

    def run(
        self, state: State, kept: _Kept, running: Callable[[State], BoolScalarLike]
    ) -> tuple[State, _Kept]:
        """Take steps until the solve ends, or the state is not `running`.

        The inner loop exits as soon as any element of a batch has to restart, cross a jump
        or hold a state, so that ordinary steps do not pay for these.
        """
        state = _hide_constants(state)
        restartable = any(due is not False for due in self._interruptions(state, kept))

        def goes_on(state):
            return self.cond_fun(state) & running(state)

        def step(carry):
            before, kept, _ = carry
            after = self._step(before, kept)
            kept, holds = kept.append(before, after, self.problem.solver)
            # A batch also steps elements that have finished, which must not interrupt the
            # rest.
            on = goes_on(before) & goes_on(after)
            due = any_due(after, kept, on)
            if kept.holds:
                due = due | eqxi.unvmap_any(holds & on)
            return after, kept, due

        def any_due(state, kept, on):
            return self._any_due(state, kept, on) if restartable else jnp.array(False)

        def interrupt(carry):
            state, kept, _ = carry
            return *self._interrupt(state, kept, goes_on(state)), jnp.array(False)

        def steps_until_interruption(carry):
            buffers = lambda c: [*self.buffers(c[0]), *c[1].buffers()]
            on = lambda c: goes_on(c[0]) & ~c[2]
            return eqxi.while_loop(
                on, step, carry, max_steps=None, buffers=buffers, kind="lax"
            )

        def segment(carry):
            carry = lax.while_loop(lambda c: eqxi.unvmap_any(c[2]), interrupt, carry)
            return steps_until_interruption(carry)

        carry: Any = state, kept, any_due(state, kept, goes_on(state))
        if restartable or kept.holds:
            carry = lax.while_loop(
                lambda carry: eqxi.unvmap_any(goes_on(carry[0])), segment, carry
            )
        else:
            carry = steps_until_interruption(carry)
        state, kept, _ = carry
        return state, kept

    def _interruptions(
        self, state: State, kept: Counted
    ) -> tuple[BoolScalarLike, BoolScalarLike]:
        """Whether a restart is due, and whether there is a jump; Python `False` if there
        can be none."""
        made_jump = self.problem.with_jumps and state.made_jump
        restarts = needs_restart(self.problem.solver, state.solver_state)
        return kept.interruptions(state, restarts, made_jump)

    def _any_due(self, state: State, kept: Counted, on: BoolScalarLike) -> BoolScalarLike:
        """Whether any element that is `on` has to restart or to cross a jump."""
        due = jnp.logical_or(*self._interruptions(state, kept)) & on
        return eqxi.unvmap_any(due)

    def _step(self, before: State, kept: Counted) -> State:
        interpolates = self.problem.interpolates(before)
        advancing = _AdvancingState(before.solver_state, interpolates)
        before = dataclasses.replace(before, solver_state=advancing)
        after = kept.after_step(self.body_fun(kept.before_step(before)))
        solver_state = after.solver_state.solver_state
        return dataclasses.replace(after, solver_state=solver_state)

    def _interrupt(
        self, state: State, kept: _Kept, on: BoolScalarLike
    ) -> tuple[State, _Kept]:
        """Restart, cross a jump, or hold the state, if due and this element is `on`."""
        restarts, made_jump = (
            due is not False and due & on for due in self._interruptions(state, kept)
        )
        context = self.inputs.context
        solver_state, restarted, crossed = interrupt(
            self.problem.solver,
            context.terms,
            state.tprev,
            state.y,
            context.args,
            state.solver_state,
            restarts,
            made_jump,
        )
        kept = kept.interrupt(state, solver_state, restarted, crossed, on)
        made_jump = jnp.where(made_jump, False, state.made_jump)
        state = dataclasses.replace(state, solver_state=solver_state, made_jump=made_jump)
        return state, kept


def _hide_constants(state: State) -> State:
    """`state`, with integers of the controller that the compiler takes for unknown.

    `ConstantStepSize` divides by the number of steps. The compiler would multiply by the
    inverse of a known number, which rounds differently, and a replay would take other steps
    than the solve.
    """

    def hide(x):
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)
        return lax.optimization_barrier(x) if is_integer else x

    hidden = jtu.tree_map(hide, state.controller_state)
    return dataclasses.replace(state, controller_state=hidden)
