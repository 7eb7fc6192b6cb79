"""The definition of a solve: its differentiated inputs, and its fixed part."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import (
    AbstractStepSizeController,
    Event,
    NoProgressMeter,
    RESULTS,
    SaveAt,
    SubSaveAt,
)
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, RealScalarLike, SolverState, Terms, Y
from .._diffrax import loop, save_y, SaveState, State
from .._solver.base import AbstractReversibleSolver
from .._tree import tree_replace
from .controller_traits import follows_state
from .times import prescribed_times, Times


# The `fn` of every `SubSaveAt` in order, `None` for those that save the state itself.
SaveFns = tuple[Callable | None, ...]

# The conditions of an event in order, as functions of `(t, y, args, terms)`.
EventFns = tuple[Callable, ...]


class Context(eqx.Module):
    """The differentiated inputs of every step."""

    terms: Terms
    args: Args
    save_fns: SaveFns
    event_fns: EventFns
    times: Times
    # Nothing reads it, as steps are held fixed. It is here so that its gradient is zero.
    dt0: RealScalarLike | None


class Inputs(eqx.Module):
    """All differentiated inputs of a solve."""

    y0: Y
    solver_state: SolverState
    context: Context


class Problem(eqx.Module):
    """The fixed part of a solve. `saveat`, `event` and `init_state` lack the `Inputs`."""

    solver: AbstractReversibleSolver
    stepsize_controller: AbstractStepSizeController
    saveat: SaveAt
    event: Event | None
    t0: RealScalarLike
    t1: RealScalarLike
    dt0: RealScalarLike | None
    init_state: State
    progress_meter: Any
    max_steps: int | None = eqx.field(static=True)
    # Whether the solver state was passed, and does not come from `init`.
    passed_solver_state: bool = eqx.field(static=True)
    # Whether steps can begin at a jump.
    with_jumps: bool = eqx.field(static=True)
    # Which leaves of the controller state vary.
    varying: tuple[bool, ...] = eqx.field(static=True)

    @property
    def finds_roots(self) -> bool:
        """Whether the solve may end within a step."""
        return self.event is not None and self.event.root_finder is not None

    @property
    def saves_ends_of_steps(self) -> bool:
        """Whether outputs can be written at the end of a step other than the last."""
        by_event = self.event is not None and (
            self.event.root_finder is None
            or any(
                jnp.result_type(value) == jnp.dtype(bool)
                for value in jtu.tree_leaves(self.init_state.event_values)
            )
        )
        return by_event or any(sub.steps != 0 for sub in sub_saveats(self.saveat))

    def steps_follow_state(self, inputs: Inputs) -> bool:
        """Whether the ends of steps have a derivative with respect to the state."""
        context = inputs.context
        init_state = _with_inputs(self.init_state, inputs)
        controlled = self.stepsize_controller, self.solver, context.terms, context.args
        return follows_state(*controlled, init_state)

    def interpolates(self, state: State) -> BoolScalarLike:
        """Whether the step that begins at `state` may be interpolated before its end. There
        the interpolation is the state itself, see `HasExtraDenseInfo`."""
        if self.saveat.dense or self.finds_roots:
            return True
        reads = False
        for sub, saved in zip(sub_saveats(self.saveat), save_states(state), strict=True):
            if sub.ts is not None and len(sub.ts) > 0:
                i = saved.saveat_ts_index
                within = sub.ts[jnp.minimum(i, len(sub.ts) - 1)] < state.tnext
                reads = jnp.logical_or(reads, (i < len(sub.ts)) & within)
        return reads

    def at(self, times: Times) -> "Problem":
        """The problem, with the ends of the solve at `times`."""
        return dataclasses.replace(self, t0=times.t0, t1=times.t1)

    def without_outputs(self, controller: Any) -> "Problem":
        """The same steps, by a `controller`, without outputs."""
        meter = NoProgressMeter()
        state = tree_replace(
            lambda s: [
                *(s.save_state, s.dense_ts, s.dense_infos, s.dense_save_index),
                *(s.event_tprev, s.event_tnext, s.event_dense_info),
                *(s.event_values, s.event_mask, s.progress_meter_state),
            ],
            self.init_state,
            [(), *[None] * 8, meter.init()],
        )
        return dataclasses.replace(
            self,
            saveat=SaveAt(subs=()),
            event=None,
            init_state=state,
            progress_meter=meter,
            stepsize_controller=controller,
        )

    def run(self, inputs: Inputs, solver: Any, outer_while_loop: Callable) -> State:
        """Diffrax's forward pass, with `outer_while_loop` for its loop over steps."""
        context = inputs.context
        final_state, _ = loop(
            solver=solver,
            stepsize_controller=self.stepsize_controller,
            event=_with_event_fns(self.event, context.event_fns),
            saveat=_with_save_fns(self.saveat, context.save_fns),
            t0=self.t0,
            t1=self.t1,
            dt0=self.dt0,
            max_steps=self.max_steps,
            terms=context.terms,
            args=context.args,
            init_state=_with_inputs(self.init_state, inputs),
            inner_while_loop=_while_loop,
            outer_while_loop=outer_while_loop,
            progress_meter=self.progress_meter,
        )
        return final_state


def _while_loop(*args, **kwargs):
    return eqxi.while_loop(*args, kind="lax", **kwargs)


def sub_saveats(saveat: SaveAt) -> list[SubSaveAt]:
    """Every `SubSaveAt`, in the order of `save_states`."""
    return jtu.tree_leaves(saveat.subs, is_leaf=lambda x: isinstance(x, SubSaveAt))


def save_states(state: State) -> list[SaveState]:
    """The save state of every `SubSaveAt`."""
    leaves = jtu.tree_leaves(state.save_state, is_leaf=lambda x: isinstance(x, SaveState))
    # There are none with `SaveAt(dense=True)`, but `equinox.tree_at` has a leaf there.
    return [leaf for leaf in leaves if isinstance(leaf, SaveState)]


def take_save_fns(saveat: SaveAt, close: Callable) -> tuple[SaveAt, SaveFns]:
    """Split the `fn` of every `SubSaveAt` off, through `close`."""
    fns = tuple(None if sub.fn is save_y else close(sub.fn) for sub in sub_saveats(saveat))
    return _with_save_fns(saveat, tuple(None for _ in fns)), fns


def _with_save_fns(saveat: SaveAt, fns: SaveFns) -> SaveAt:
    """The inverse of `take_save_fns`."""
    if len(fns) == 0:
        return saveat
    return eqx.tree_at(
        lambda s: [sub.fn for sub in sub_saveats(s)],
        saveat,
        [save_y if fn is None else fn for fn in fns],
    )


def take_event_fns(event: Event | None, close: Callable) -> tuple[Event | None, EventFns]:
    """Split the conditions of an event off, through `close`."""
    if event is None:
        return None, ()
    fns = jtu.tree_leaves(event.cond_fn, is_leaf=callable)
    return _replace_cond_fns(event, [_taken for _ in fns]), tuple(map(close, fns))


def _with_event_fns(event: Event | None, fns: EventFns) -> Event | None:
    """The inverse of `take_event_fns`."""
    if event is None:
        return None

    def condition(fn):
        return lambda t, y, args, *, terms, **kwargs: fn(t, y, args, terms)

    return _replace_cond_fns(event, [condition(fn) for fn in fns])


def _taken(*args, **kwargs):
    raise AssertionError


def _replace_cond_fns(event: Event, fns: list[Callable]) -> Event:
    structure = jtu.tree_structure(event.cond_fn, is_leaf=callable)
    cond_fn = jtu.tree_unflatten(structure, fns)
    return eqx.tree_at(lambda e: e.cond_fn, event, cond_fn, is_leaf=callable)


def take_times(
    t0: RealScalarLike,
    t1: RealScalarLike,
    saveat: SaveAt,
    controller: AbstractStepSizeController,
) -> Times:
    ts = tuple(sub.ts for sub in sub_saveats(saveat))
    return Times(t0, t1, ts, tuple(prescribed_times(controller)))


def take_state(init_state: State) -> State:
    """`init_state` without its differentiated leaves, and without a result that is known at
    trace time, with which Diffrax makes a leaner loop."""
    result = init_state.result
    result = None if result is RESULTS.successful else result
    return _replace_state(init_state, None, None, result)


def _with_inputs(state: State, inputs: Inputs) -> State:
    """The inverse of `take_state`."""
    result = RESULTS.successful if state.result is None else state.result
    return _replace_state(state, inputs.y0, inputs.solver_state, result)


def _replace_state(
    state: State, y: Y | None, solver_state: PyTree, result: RESULTS | None
) -> State:
    # Type checkers at run time would refuse `None` in `dataclasses.replace`.
    return tree_replace(
        lambda s: (s.y, s.solver_state, s.result), state, (y, solver_state, result)
    )
