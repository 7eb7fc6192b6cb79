"""What only some reversible solvers can do, or need: a class takes it by inheriting it.

Below are the functions by which it is asked for, of any reversible solver.
"""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import RESULTS
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    SolverState,
    Terms,
    Y,
)
from .._precision import eps, tiny
from .._tree import larger
from .base import AbstractReversibleSolver


_SolverState = TypeVar("_SolverState")


class AbstractInterruptedSolver(
    AbstractReversibleSolver[_SolverState], Generic[_SolverState]
):
    """A solver that has something to do between two steps, beside the steps themselves,
    which it makes by `advance`."""

    @abc.abstractmethod
    def advance(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        """A step and nothing else, which `backward_step` undoes.

        Arguments and returns are those of [`diffrax.AbstractSolver.step`][], but for what
        `extra_dense_info` adds to the `dense_info`.
        """

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        """Restart or cross a jump where it is due, and `advance`.

        Differentiated, it stores nothing but what it begins with. So XLA compiles the step
        as where it is not differentiated, and it rounds alike: the default adjoint of
        Diffrax repeats steps, and decides on them again.
        """
        succeeds = False

        def step(terms, t0, t1, y0, args, solver_state):
            nonlocal succeeds
            solver_state, _, _ = interrupt(
                self,
                terms,
                t0,
                y0,
                args,
                solver_state,
                needs_restart(self, solver_state),
                made_jump,
            )
            *outputs, result = advance_densely(self, terms, t0, t1, y0, args, solver_state)
            succeeds = result is RESULTS.successful
            return outputs, result

        step = eqx.filter_checkpoint(step, prevent_cse=False)
        outputs, result = step(terms, t0, t1, y0, args, solver_state)
        return *outputs, RESULTS.successful if succeeds else result


class CanRestart(AbstractInterruptedSolver[_SolverState], Generic[_SolverState]):
    """A solver that now and then replaces its solver state by one that the old one does not
    follow from."""

    @abc.abstractmethod
    def needs_restart(self, solver_state: _SolverState) -> BoolScalarLike:
        """Whether the solver state has to be replaced before the next step.

        That cannot be undone. `ReversibleAdjoint` holds the state and the solver state
        before a restart, or replays the solve up to there.
        """

    @abc.abstractmethod
    def restart(
        self,
        terms: Terms,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> _SolverState:
        """The solver state to go on with after a restart."""


class CanCrossJumps(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that can carry its solver state over a discontinuity of the vector field."""

    @abc.abstractmethod
    def cross_jump(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[_SolverState, BoolScalarLike]:
        """The solver state at `t1`, from that at `t0`, between which there is nothing but a
        discontinuity of the vector field.

        They are a few floats apart, and `y` is the same. With `t0` and `t1` exchanged this
        has to undo itself.

        **Returns:**

        The solver state, and whether it had to change.
        """


class KeepsStateAtJumps(CanCrossJumps[_SolverState], Generic[_SolverState]):
    """A solver of which the solver state does not depend on the vector field, but by
    rounding."""

    def cross_jump(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[_SolverState, BoolScalarLike]:
        del terms, t0, t1, y, args
        return solver_state, False


class HasExtraDenseInfo(AbstractInterruptedSolver[_SolverState], Generic[_SolverState]):
    """A solver of which the interpolation takes evaluations that a step does not."""

    @abc.abstractmethod
    def extra_dense_info(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
        dense_info: DenseInfo,
    ) -> DenseInfo:
        """What interpolation takes beyond the `dense_info` that `advance` returned: more of
        its entries.

        `ReversibleAdjoint` asks for them only in those steps in which there is something to
        interpolate, which with `SaveAt(dense=True)` or the root finder of an event may be
        any.
        """


class HasRecord(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver of which a step forgets scalars that undoing it takes: where the step before
    it began, for instance."""

    @abc.abstractmethod
    def to_record(self, solver_state: _SolverState) -> PyTree[Array]:
        """Scalars of the solver state that a step forgets, and that undoing it takes.

        They are recorded before every step, where a gradient is asked for, and make its
        memory grow by as much.
        """

    @abc.abstractmethod
    def recall(self, solver_state: _SolverState, recorded: PyTree[Array]) -> _SolverState:
        """The solver state after a step, with what `to_record` gave before it put into it,
        in the form that `backward_step` takes."""


class HasErrorScales(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that knows what errors of its state are to be measured by."""

    @abc.abstractmethod
    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        y_end: Y,
        solver_state_end: _SolverState,
    ) -> PyTree[Array]:
        """What errors of the walk back are measured by, where it comes to a known state.

        **Arguments:**

        - `terms`, `args`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the step that begins there.
        - `length`: of the walk back to there, in time, and at least of a step. So long do
            errors of the solver state act.
        - `y0`, `solver_state`: what is known.
        - `y_end`, `solver_state_end`: what was known where the walk back began. Of the
            solver state there need not be more than its floating-point arrays.

        **Returns:**

        For every floating-point array of `(y0, solver_state)`, in that order, an array of
        its shape: by default the largest of what each entry is there, after one step, which
        is made again, and where the walk back began.
        """


class HasStatistics(AbstractReversibleSolver[_SolverState], Generic[_SolverState]):
    """A solver that counts something."""

    @abc.abstractmethod
    def statistics(self, solver_state: _SolverState) -> dict[str, PyTree[Array]]:
        """For the `stats` of a solution under `ReversibleAdjoint`, from the solver state
        after the last step."""


def statistics(
    solver: AbstractReversibleSolver, solver_state: SolverState
) -> dict[str, PyTree[Array]]:
    """See `HasStatistics`."""
    if isinstance(solver, HasStatistics):
        return solver.statistics(solver_state)
    return {}


def needs_restart(
    solver: AbstractReversibleSolver, solver_state: SolverState
) -> BoolScalarLike:
    """Whether there is a restart before the next step: Python `False` if there never is."""
    return isinstance(solver, CanRestart) and solver.needs_restart(solver_state)


def cross_jump(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y: Y,
    args: Args,
    solver_state: SolverState,
) -> tuple[SolverState, BoolScalarLike]:
    """See `CanCrossJumps`. There is nothing to do if there is no solver state."""
    if isinstance(solver, CanCrossJumps):
        return solver.cross_jump(terms, t0, t1, y, args, solver_state)
    if any(map(eqx.is_array, jtu.tree_leaves(solver_state))):
        name = type(getattr(solver, "solver", solver)).__name__
        raise NotImplementedError(
            f"`diffeqsolve(..., solver={name}(), adjoint=ReversibleAdjoint())` cannot "
            "undo what this solver does at a jump of the vector field. End the solve "
            "at the jump and begin another there, or use a solver of which the jumps "
            "can be undone, as `diffrax_reversible.ALF4`, or "
            "`adjoint=RecursiveCheckpointAdjoint()`."
        )
    return solver_state, False


def to_record(solver: AbstractReversibleSolver, solver_state: SolverState) -> PyTree[Array]:
    """See `HasRecord`."""
    return solver.to_record(solver_state) if isinstance(solver, HasRecord) else None


def recall(
    solver: AbstractReversibleSolver, solver_state: SolverState, recorded: PyTree[Array]
) -> SolverState:
    """See `HasRecord`."""
    if isinstance(solver, HasRecord):
        return solver.recall(solver_state, recorded)
    return solver_state


def error_scales(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    length: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
    y_end: Y,
    solver_state_end: SolverState,
) -> PyTree[Array]:
    """See `HasErrorScales`. By default the largest of what each entry is there, after one
    step, which is made again, and where the walk back began."""
    if isinstance(solver, HasErrorScales):
        step = terms, t0, t1, length, y0, args, solver_state
        return solver.error_scales(*step, y_end, solver_state_end)
    y1, _, _, state1, _ = advance(solver, terms, t0, t1, y0, args, solver_state)
    known = (y0, solver_state), (y1, state1), (y_end, solver_state_end)
    known = (eqx.filter(k, eqx.is_inexact_array) for k in known)
    return jtu.tree_map(larger, *known)


def advance(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
) -> tuple[Y, Y | None, DenseInfo, SolverState, RESULTS]:
    """A step and nothing else."""
    step = terms, t0, t1, y0, args, solver_state
    if isinstance(solver, AbstractInterruptedSolver):
        return solver.advance(*step)
    return solver.step(*step, made_jump=False)


def advance_densely(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
    reads: BoolScalarLike = True,
) -> tuple[Y, Y | None, DenseInfo, SolverState, RESULTS]:
    """`advance`, with what is extra of its `dense_info`: zeros unless it is read."""
    y1, y_error, dense_info, solver_state, result = advance(
        solver, terms, t0, t1, y0, args, solver_state
    )
    if not isinstance(solver, HasExtraDenseInfo):
        return y1, y_error, dense_info, solver_state, result

    def evaluate():
        return solver.extra_dense_info(terms, t0, t1, args, dense_info)

    def zeros():
        shapes = jax.eval_shape(evaluate)
        return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if isinstance(reads, bool):
        extra = evaluate() if reads else zeros()
    else:
        extra = lax.cond(eqxi.unvmap_any(reads), evaluate, zeros)
    return y1, y_error, {**dense_info, **extra}, solver_state, result


def interrupt(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t: RealScalarLike,
    y: Y,
    args: Args,
    solver_state: SolverState,
    restarts: BoolScalarLike,
    made_jump: BoolScalarLike,
) -> tuple[SolverState, BoolScalarLike, BoolScalarLike]:
    """What comes between two steps.

    **Returns:**

    The solver state to go on with, whether there was a restart, and whether the solver
    state crossed a jump, which a restart takes the place of. Python `False` where that is
    known.
    """

    def choose(pred, new):
        return jtu.tree_map(lambda n, o: jnp.where(pred, n, o), new, solver_state)

    def restart():
        assert isinstance(solver, CanRestart)
        return choose(restarts, solver.restart(terms, t, y, args, solver_state))

    def cross():
        new, changed = cross_jump(solver, terms, before_jump(t), t, y, args, solver_state)
        changed = jnp.logical_and(crosses, changed)
        return choose(changed, new), changed

    # In a batch they are evaluated only in steps in which some element needs it. Logical
    # operations also strip tangents, which JAX gives to Booleans too.
    crosses = made_jump
    if made_jump is not False:
        crosses = jnp.logical_and(made_jump, jnp.logical_not(restarts))
        solver_state, crosses = lax.cond(
            eqxi.unvmap_any(crosses), cross, lambda: (solver_state, crosses)
        )
    if restarts is not False:
        restarts = jnp.logical_or(restarts, False)
        solver_state = lax.cond(eqxi.unvmap_any(restarts), restart, lambda: solver_state)
    return solver_state, restarts, crosses


def before_jump(t: RealScalarLike) -> RealScalarLike:
    """A time on the other side of the jump that a step begins after, at `t`.

    Diffrax' steps end and begin one float to either side of a jump, which are two floats,
    and may be four units of `eps |t|` apart just above a power of two. At zero, which
    floats are closest to, as many of the smallest normal ones are meant: XLA flushes others
    to zero.
    """
    t = jnp.asarray(t)
    ulps = jnp.maximum(eps(t) * jnp.abs(t), tiny(t))
    return t - lax.stop_gradient(4 * ulps)
