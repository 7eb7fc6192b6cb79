"""The solve itself, and what is kept of it for the walk back."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractLocalInterpolation,
    AbstractStepSizeController,
    RESULTS,
    SaveAt,
    SubSaveAt,
)
from jaxtyping import Array, PyTree

from .._custom_types import Args, IntScalarLike, RealScalarLike, SolverState, Terms, Y
from .._diffrax import loop, save_y, SaveState, State
from .._solver.base import AbstractReversibleSolver, restart_pending
from .record import Record, RestartRecord, StepRecord
from .validate import check_max_steps


# The `fn` of every `SubSaveAt` in order, `None` for those that save the state itself.
SaveFns = tuple[Callable | None, ...]


class Times(eqx.Module):
    """The times that a solve is differentiated with respect to.

    For everything else the copies of them in `Problem` serve, which are held fixed.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    # Of every `SubSaveAt` in order.
    ts: tuple[Array | None, ...]

    def of(self, t: RealScalarLike) -> RealScalarLike:
        """`t`, with the derivative of an end of the solve if it is one.

        Where the other ends of steps are does not depend on anything.
        """
        return jnp.where(t == self.t0, self.t0, jnp.where(t == self.t1, self.t1, t))


class Inputs(eqx.Module):
    """All that a solve is differentiated with respect to."""

    y0: Y
    solver_state: SolverState
    terms: Terms
    args: Args
    save_fns: SaveFns
    times: Times


class Problem(eqx.Module):
    """All that is held fixed. `saveat` and `init_state` lack what is in `Inputs`."""

    solver: AbstractReversibleSolver
    stepsize_controller: AbstractStepSizeController
    saveat: SaveAt
    t0: RealScalarLike
    t1: RealScalarLike
    dt0: RealScalarLike | None
    init_state: State
    progress_meter: Any
    max_steps: int | None = eqx.field(static=True)


class Trace(eqx.Module):
    """What is kept of a solve: its end, where its steps were, and its restarts.

    Nothing that grows with the number of steps is of the size of the state.
    """

    t: RealScalarLike
    y: Y
    solver_state: SolverState
    steps: StepRecord
    restarts: RestartRecord
    result: RESULTS
    # For each `SubSaveAt`: how many outputs were written, and how many of its `ts`.
    save_index: list[IntScalarLike]
    saveat_ts_index: list[IntScalarLike]
    # Shapes of the times and of what each `SubSaveAt` wrote at them, and of what dense
    # output is made of.
    output_structs: list[tuple[Any, PyTree[jax.ShapeDtypeStruct]]]
    dense_structs: PyTree[jax.ShapeDtypeStruct]


def sub_saveats(saveat: SaveAt) -> list[SubSaveAt]:
    """Every `SubSaveAt`, in the order that `save_states` has them too."""
    return jtu.tree_leaves(saveat.subs, is_leaf=lambda x: isinstance(x, SubSaveAt))


def save_states(state: State) -> list[SaveState]:
    """What every `SubSaveAt` has written."""
    return jtu.tree_leaves(state.save_state, is_leaf=lambda x: isinstance(x, SaveState))


def take_fns(saveat: SaveAt, close: Callable) -> tuple[SaveAt, SaveFns]:
    """Split the `fn` of every `SubSaveAt` off, through `close`."""
    fns = tuple(None if sub.fn is save_y else close(sub.fn) for sub in sub_saveats(saveat))
    return with_fns(saveat, tuple(save_y for _ in fns)), fns


def with_fns(saveat: SaveAt, fns: SaveFns) -> SaveAt:
    """The inverse of `take_fns`."""
    if len(fns) == 0:
        return saveat
    return eqx.tree_at(
        lambda s: [sub.fn for sub in sub_saveats(s)],
        saveat,
        [save_y if fn is None else fn for fn in fns],
    )


def take_times(t0: RealScalarLike, t1: RealScalarLike, saveat: SaveAt) -> Times:
    return Times(t0, t1, tuple(sub.ts for sub in sub_saveats(saveat)))


def take_state(init_state: State) -> State:
    """`init_state` without what is differentiated."""
    return _replace_state(init_state, None, None)


def _replace_state(state: State, y: Y | None, solver_state: SolverState) -> State:
    return eqx.tree_at(
        lambda s: (s.y, s.solver_state),
        state,
        (y, solver_state),
        is_leaf=lambda x: x is None,
    )


class _Advancing(eqx.Module):
    """The solver as `loop` sees it here: restarts are not made by its steps."""

    solver: AbstractReversibleSolver

    @property
    def interpolation_cls(self) -> Callable[..., AbstractLocalInterpolation]:
        return self.solver.interpolation_cls

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        return self.solver.advance(terms, t0, t1, y0, args, solver_state)


def solve(inputs: Inputs, problem: Problem, record: Record) -> tuple[State, dict, Record]:
    """Diffrax's forward pass, in loops that are not differentiated.

    Its loop over steps is left where a restart is due in any element of a batch, so that
    the steps between pay for nothing that belongs to restarts.
    """
    solver = problem.solver

    def recording_while_loop(cond_fun, body_fun, init_val, *, max_steps, buffers):
        nonlocal record

        def running(state):
            within = True if max_steps is None else state.num_steps < max_steps
            return cond_fun(state) & within

        def restart_due(state):
            due = restart_pending(solver, state.solver_state, state.made_jump)
            return running(state) & due

        def step(carry):
            before, record = carry
            after = body_fun(before)
            return after, record.append(before, after)

        def restart(carry):
            state, record = carry
            due = restart_due(state)
            new = solver.restart(
                inputs.terms, state.tprev, state.y, inputs.args, state.solver_state
            )
            new = jtu.tree_map(lambda n, o: jnp.where(due, n, o), new, state.solver_state)
            record = eqx.tree_at(
                lambda r: r.restarts, record, record.restarts.append(state, due)
            )
            made_jump = jnp.where(due, False, state.made_jump)
            state = eqx.tree_at(
                lambda s: (s.solver_state, s.made_jump), state, (new, made_jump)
            )
            return state, record

        def steps_until_restart(carry):
            return eqxi.while_loop(
                lambda c: running(c[0]) & ~eqxi.unvmap_any(restart_due(c[0])),
                step,
                carry,
                max_steps=None,
                buffers=lambda c: [*buffers(c[0]), *c[1].buffers()],
                kind="lax",
            )

        def segment(carry):
            carry = steps_until_restart(carry)
            return lax.while_loop(
                lambda c: eqxi.unvmap_any(restart_due(c[0])), restart, carry
            )

        final_state, record = lax.while_loop(
            lambda carry: eqxi.unvmap_any(running(carry[0])),
            segment,
            jtu.tree_map(jnp.asarray, (init_val, record)),
        )
        return final_state

    final_state, _ = loop(
        solver=_Advancing(solver),
        stepsize_controller=problem.stepsize_controller,
        event=None,
        saveat=with_fns(problem.saveat, inputs.save_fns),
        t0=problem.t0,
        t1=problem.t1,
        dt0=problem.dt0,
        max_steps=problem.max_steps,
        terms=inputs.terms,
        args=inputs.args,
        init_state=_replace_state(problem.init_state, inputs.y0, inputs.solver_state),
        inner_while_loop=ft.partial(eqxi.while_loop, kind="lax"),
        outer_while_loop=recording_while_loop,
        progress_meter=problem.progress_meter,
    )
    return final_state, {"num_restarts": record.restarts.count}, record


def solve_plainly(inputs: Inputs, problem: Problem) -> tuple[State, dict]:
    """As `solve`, where nothing is differentiated."""
    restarts = RestartRecord.allocate(0, problem.t0, inputs.y0, inputs.solver_state)
    final_state, aux_stats, _ = solve(inputs, problem, Record(None, restarts))
    return final_state, aux_stats


def solve_and_record(
    inputs: Inputs, problem: Problem, checkpoints: int
) -> tuple[State, dict, Trace]:
    """As `solve`, and keep what the walk back needs."""
    max_steps = check_max_steps(problem.max_steps)
    record = Record(
        StepRecord.allocate(max_steps, jnp.result_type(problem.t0)),
        RestartRecord.allocate(checkpoints, problem.t0, inputs.y0, inputs.solver_state),
    )
    final_state, aux_stats, record = solve(inputs, problem, record)
    assert record.steps is not None
    saved = save_states(final_state)
    trace = Trace(
        final_state.tprev,
        final_state.y,
        final_state.solver_state,
        record.steps,
        record.restarts,
        final_state.result,
        [s.save_index for s in saved],
        [s.saveat_ts_index for s in saved],
        jax.eval_shape(lambda: [(s.ts, s.ys) for s in saved]),
        jax.eval_shape(lambda: final_state.dense_infos),
    )
    return final_state, aux_stats, trace
