"""The solve itself, and its residuals for the backward pass."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import RESULTS
from jaxtyping import Array, PyTree

from .._branches import may_branch
from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import IntScalarLike
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .._solver.capabilities import statistics, to_record
from .._solver.interrupted_solver import advance, needs_restart
from .._tree import tree_replace, tree_zeros_of
from .drift import coarsest_eps
from .kept import Counted, first_spacing, Kept
from .known import Checkpoints, Known
from .problem import Inputs, Problem, save_states
from .rest import Rest
from .stepper import Advancing, Stepper
from .steps import Record, room_for_residuals


# In single precision, symplectic solvers hold as many of eight states as fit into this
# many bytes, see `default_checkpoints`.
_room_in_single_precision = 1 << 20
# Up to so many times as many states are held if each has at most so many bytes, and if all
# fit into this fraction of the room for all residuals.
_more, _small, _share_of_room = 8, 1 << 10, 1 / 2

_Kept = TypeVar("_Kept", bound=Counted)


class Residuals(eqx.Module):
    """The residuals of a solve: its end, a record of its last steps, and known states.

    Their size does not grow with the number of steps.
    """

    # After the last step, before the event that ended the solve is located and the last
    # outputs are written. Outputs are kept only as shapes.
    end: State
    ys_structs: list[PyTree[jax.ShapeDtypeStruct]]
    dense_structs: PyTree[jax.ShapeDtypeStruct]
    kept: Kept
    result: RESULTS

    @property
    def count(self) -> IntScalarLike:
        """The number of steps."""
        return self.record.count

    @property
    def record(self) -> Record:
        return self.kept.record

    @property
    def restartable(self) -> bool:
        """Whether there may have been restarts."""
        return self.record.restartable

    def zero_ys(self) -> list[PyTree[Array]]:
        """Zeros in the shapes of the outputs of each `SubSaveAt`."""
        return tree_zeros_of(self.ys_structs)


def _solve(
    inputs: Inputs, problem: Problem, make_kept: Callable[[State], _Kept]
) -> tuple[State, dict, State, _Kept]:
    """Also returns the state after the loop over steps, and the residuals."""
    ends = []

    def loop_over_steps(cond_fun, body_fun, init_val, *, max_steps, buffers):
        def within(state):
            return True if max_steps is None else state.num_steps < max_steps

        stepper = Stepper(inputs, problem, cond_fun, body_fun, buffers)
        state = jtu.tree_map(jnp.asarray, init_val)
        end, kept = stepper.run(state, make_kept(state), within)
        ends.append((end, kept))
        return end

    final_state = problem.run(inputs, Advancing(problem.solver), loop_over_steps)
    ((end, kept),) = ends
    stats = {"num_restarts": kept.restarts, **statistics(problem.solver, end.solver_state)}
    return final_state, stats, end, kept


def solve_plainly(inputs: Inputs, problem: Problem) -> tuple[State, dict]:
    """The final state and statistics, where nothing is differentiated."""
    final_state, aux_stats, *_ = _solve(
        inputs, problem, lambda state: Counted(jnp.array(0))
    )
    return final_state, aux_stats


def default_checkpoints(inputs: Inputs, problem: Problem) -> int:
    """The number of known states to hold, unless the user gives it.

    A symplectic solver has none of its own, as its steps do not contract. But an unstable
    orbit, as in a close encounter, amplifies rounding errors: in single precision beyond
    the tolerance within some ten steps, in double precision only if it is extreme or long.
    So in single precision states are held, except large ones, whose memory matters.

    Of small states more are held, as they take little memory and save replays.
    """
    state, count = (inputs.y0, inputs.solver_state), problem.solver.default_checkpoints
    size = sum(x.nbytes for x in jtu.tree_leaves(eqx.filter(state, eqx.is_array)))
    if coarsest_eps(state) > np.finfo(np.float64).eps:
        most = AbstractReversibleSolver.default_checkpoints
        count = max(count, min(most, _room_in_single_precision // max(size, 1)))
    if size > _small:
        return count
    t = jnp.asarray(problem.t0)
    room = _share_of_room * room_for_residuals(inputs.y0, t, problem.max_steps)
    # Besides the state, a known state has about eight numbers.
    fitting = int(room // (size + 8 * t.itemsize))
    return min(max(count, fitting), _more * count)


def solve_and_record(
    inputs: Inputs, perturbed: Inputs, problem: Problem, checkpoints: int
) -> tuple[State, dict, Residuals]:
    """As `solve_plainly`, with the residuals for the backward pass, in which `perturbed`
    leaves of `inputs` are differentiated."""
    controller, solver = problem.stepsize_controller, problem.solver
    restartable = needs_restart(solver, inputs.solver_state) is not False
    branches = _may_branch(inputs, problem)
    room = room_for_residuals(inputs.y0, problem.t0, problem.max_steps)

    def make_kept(state):
        known = Known.of(state, state.tprev, problem.varying)
        record = Record.allocate(
            problem.t0,
            jax.eval_shape(lambda: to_record(solver, inputs.solver_state)),
            restartable=restartable,
            with_jumps=problem.with_jumps,
            recomputed=isinstance(controller, AbstractReversibleStepSizeController),
            max_steps=problem.max_steps,
            # With many known states, the record may take as much memory again.
            room=max(room - known.bytes * checkpoints, known.bytes * checkpoints),
        )
        held = Checkpoints.allocate(checkpoints, known)
        params = eqx.filter(inputs.context, perturbed.context)
        spacing = jnp.array(first_spacing((state.y, state.solver_state), params))
        none = jnp.array(0)
        no = jnp.array(False)
        rest = Rest.start((state.y, state.solver_state)) if branches else None
        return Kept(none, record, held, spacing, spacing, no, rest, problem.varying)

    final_state, aux_stats, end, kept = _solve(inputs, problem, make_kept)
    residuals = Residuals(
        _without_saved(end),
        jax.eval_shape(lambda: [saved.ys for saved in save_states(end)]),
        jax.eval_shape(lambda: end.dense_infos),
        kept,
        final_state.result,
    )
    return final_state, aux_stats, residuals


def _may_branch(inputs: Inputs, problem: Problem) -> bool:
    """Whether the vector field, or a `SaveAt(fn=...)`, may have kinks."""
    context, t = inputs.context, jnp.asarray(problem.t0)
    terms, args, solver = context.terms, context.args, problem.solver

    def field(y):
        try:
            return eqx.filter(solver.func(terms, t, y, args), eqx.is_inexact_array)
        except NotImplementedError:
            # The solver has no vector field as a whole.
            end = jnp.asarray(problem.init_state.tnext)
            return advance(solver, terms, t, end, y, args, inputs.solver_state)[0]

    def save(y):
        fns = [fn for fn in context.save_fns if fn is not None]
        return eqx.filter([fn(t, y, args) for fn in fns], eqx.is_inexact_array)

    return may_branch(field, inputs.y0) or may_branch(save, inputs.y0)


def finish(inputs: Inputs, problem: Problem, end: State, ys: list[PyTree]) -> State:
    """The final state, from the `end` of the loop over steps: Diffrax locates the event
    that ended it, and adds the last outputs to `ys`, those written so far."""

    def no_steps(cond_fun, body_fun, init_val, *, max_steps, buffers):
        return _replace(end, lambda s: [saved.ys for saved in save_states(s)], ys)

    return problem.run(inputs, Advancing(problem.solver), no_steps)


def _without_saved(state: State) -> State:
    """`state` without its outputs, except their times."""

    def saved(state):
        ys = [saved.ys for saved in save_states(state)]
        return [*ys, state.dense_infos]

    return _replace(state, saved, [None for _ in saved(state)])


def _replace(tree: State, where: Callable, replacement: list) -> State:
    if len(replacement) == 0:
        return tree
    return tree_replace(where, tree, replacement)
