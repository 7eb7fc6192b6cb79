"""The solve itself, and what is kept of it for the walk back."""

from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractLocalInterpolation, RESULTS
from jaxtyping import Array, PyTree

from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    RealScalarLike,
    SolverState,
    Terms,
    Y,
)
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver, advance_densely, interrupt
from .._tree import tree_replace
from .problem import Inputs, Problem, save_states
from .record import Record, RestartRecord
from .steps import RecomputedSteps, RecordedSteps
from .validate import check_max_steps


class Trace(eqx.Module):
    """What is kept of a solve: its end, where its steps were, and its restarts.

    Nothing that grows with the number of steps is of the size of the state.
    """

    # After the last step, and before the event that ended the solve is located and the
    # last outputs are written. Without what was saved, of which there are just shapes.
    end: State
    ys_structs: list[PyTree[jax.ShapeDtypeStruct]]
    dense_structs: PyTree[jax.ShapeDtypeStruct]
    steps: RecordedSteps | RecomputedSteps
    restarts: RestartRecord
    result: RESULTS

    def zero_ys(self) -> list[PyTree[Array]]:
        """In the shapes of what each `SubSaveAt` writes."""
        return jtu.tree_map(lambda y: jnp.zeros(y.shape, y.dtype), self.ys_structs)

    def known_after(self, restarts: IntScalarLike) -> tuple[Y, SolverState]:
        """The state and what is differentiated of the solver state where the walk back
        began last, if there are still so many `restarts` to undo."""
        end = eqx.filter((self.end.y, self.end.solver_state), eqx.is_inexact_array)
        if self.restarts.capacity == 0:
            return end
        stored = jnp.minimum(self.restarts.count, self.restarts.capacity)
        _, *known = self.restarts.read(jnp.minimum(restarts, self.restarts.capacity - 1))
        known = eqx.filter(tuple(known), eqx.is_inexact_array)
        return jtu.tree_map(lambda k, e: jnp.where(restarts < stored, k, e), known, end)


class _AdvancingState(eqx.Module):
    """The solver state, and whether the next step will be interpolated in."""

    solver_state: SolverState
    interpolates: BoolScalarLike


class _Advancing(eqx.Module):
    """The solver as `loop` sees it here: restarts are not made by its steps, and what only
    interpolation takes is evaluated only where there is any."""

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
            # Nothing but shapes is asked for.
            return advance_densely(*step, solver_state)
        y1, y_error, dense_info, after, result = advance_densely(
            *step, solver_state.solver_state, solver_state.interpolates
        )
        after = _AdvancingState(after, solver_state.interpolates)
        return y1, y_error, dense_info, after, result


class _Steps:
    """A loop over steps that is not differentiated, and records what happens.

    It is left where a restart is due or a jump was made in any element of a batch, so that
    the steps between pay for nothing that belongs to these, if there can be any.
    """

    def __init__(self, inputs: Inputs, problem: Problem, record: Record):
        self.inputs = inputs
        self.problem = problem
        # Before the loop, and then after it.
        self.record = record
        self.end: State | None = None

    def __call__(self, cond_fun, body_fun, init_val, *, max_steps, buffers):
        def running(state):
            within = True if max_steps is None else state.num_steps < max_steps
            return cond_fun(state) & within

        def interruptions(state):
            restarts = self.problem.solver.needs_restart(state.solver_state)
            made_jump = self.problem.with_jumps and state.made_jump
            return restarts, made_jump

        def interrupted(state, goes_on):
            """Whether a restart is due, or a jump was made, in any element that goes on."""
            due = (jnp.logical_or(*interruptions(state))) & goes_on
            return eqxi.unvmap_any(due)

        def step(carry):
            before, record, _ = carry
            interpolates = self.problem.interpolates(before)
            advancing = _AdvancingState(before.solver_state, interpolates)
            after = body_fun(tree_replace(_solver_state, before, [advancing]))
            after = tree_replace(_solver_state, after, [after.solver_state.solver_state])
            record = record.append(before, after, self.problem.solver)
            # In a batch this is called for elements that have finished as well, and what it
            # makes of them must not interrupt the others.
            due = interruptible and interrupted(after, running(before) & running(after))
            return after, record, due

        def interrupt(carry):
            state, record, _ = carry
            goes_on = running(state)
            due = (d is not False and d & goes_on for d in interruptions(state))
            return *self._interrupt(state, record, *due), jnp.array(False)

        def steps_until_interruption(carry):
            return eqxi.while_loop(
                lambda c: running(c[0]) & ~c[2],
                step,
                carry,
                max_steps=None,
                buffers=lambda c: [*buffers(c[0]), *c[1].buffers()],
                kind="lax",
            )

        def segment(carry):
            carry = lax.while_loop(lambda c: eqxi.unvmap_any(c[2]), interrupt, carry)
            return steps_until_interruption(carry)

        state, record = jtu.tree_map(jnp.asarray, (init_val, self.record))
        interruptible = any(due is not False for due in interruptions(state))
        if interruptible:
            carry = lax.while_loop(
                lambda carry: eqxi.unvmap_any(running(carry[0])),
                segment,
                (state, record, interrupted(state, running(state))),
            )
        else:
            carry = steps_until_interruption((state, record, jnp.array(False)))
        self.end, self.record, _ = carry
        return self.end

    def _interrupt(self, state: State, record: Record, restarts, made_jump):
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
        record = record.interrupt(state, self.problem.solver, restarted, crossed)
        made_jump = jnp.where(made_jump, False, state.made_jump)
        state = tree_replace(
            lambda s: (s.solver_state, s.made_jump), state, (solver_state, made_jump)
        )
        return state, record


def _solve(inputs: Inputs, problem: Problem, record: Record) -> tuple[State, dict, _Steps]:
    steps = _Steps(inputs, problem, record)
    final_state = problem.run(inputs, _Advancing(problem.solver), steps)
    return final_state, {"num_restarts": steps.record.restarts.count}, steps


def solve_plainly(inputs: Inputs, problem: Problem) -> tuple[State, dict]:
    """The final state and statistics, where nothing is differentiated."""
    stored = problem.solver.to_store(inputs.solver_state)
    restarts = RestartRecord.allocate(0, problem.t0, inputs.y0, stored)
    final_state, aux_stats, _ = _solve(inputs, problem, Record(None, restarts))
    return final_state, aux_stats


def solve_and_record(
    inputs: Inputs, problem: Problem, checkpoints: int
) -> tuple[State, dict, Trace]:
    """As `solve_plainly`, and keep what the walk back needs."""
    controller, dtype = problem.stepsize_controller, jnp.result_type(problem.t0)
    recomputed = isinstance(controller, AbstractReversibleStepSizeController)
    scalars = jax.eval_shape(lambda: problem.solver.to_record(inputs.solver_state))
    if problem.solver.needs_restart(inputs.solver_state) is False:
        checkpoints = 0
    if recomputed and len(jtu.tree_leaves(scalars)) == 0:
        to_record = RecomputedSteps.allocate(dtype, problem.with_jumps)
    else:
        max_steps = check_max_steps(problem.max_steps, recomputed)
        rows = max(max_steps, 1)
        to_record = RecordedSteps.allocate(rows, dtype, scalars, problem.with_jumps)
    stored = problem.solver.to_store(inputs.solver_state)
    restarts = RestartRecord.allocate(checkpoints, problem.t0, inputs.y0, stored)
    record = Record(to_record, restarts)
    final_state, aux_stats, steps = _solve(inputs, problem, record)
    end = steps.end
    assert end is not None and steps.record.steps is not None
    trace = Trace(
        _without_saved(end),
        jax.eval_shape(lambda: [saved.ys for saved in save_states(end)]),
        jax.eval_shape(lambda: end.dense_infos),
        steps.record.steps,
        steps.record.restarts,
        final_state.result,
    )
    return final_state, aux_stats, trace


def _solver_state(state: State) -> list[SolverState]:
    return [state.solver_state]


def finish(inputs: Inputs, problem: Problem, end: State, ys: list[PyTree]) -> State:
    """What Diffrax makes of the `end` of a loop over steps: it locates the event that
    ended it, and writes the last outputs beside `ys`, those written so far."""

    def no_steps(cond_fun, body_fun, init_val, *, max_steps, buffers):
        return _replace(end, lambda s: [saved.ys for saved in save_states(s)], ys)

    return problem.run(inputs, _Advancing(problem.solver), no_steps)


def _without_saved(state: State) -> State:
    """But for the times that were saved."""

    def saved(state):
        ys = [saved.ys for saved in save_states(state)]
        return [*ys, state.dense_infos]

    return _replace(state, saved, [None for _ in saved(state)])


def _replace(tree: State, where: Callable, replacement: list) -> State:
    if len(replacement) == 0:
        return tree
    return tree_replace(where, tree, replacement)
