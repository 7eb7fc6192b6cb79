"""Solvers that act between two steps: where they restart, and where they cross a jump."""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
from diffrax import RESULTS

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
from .._tree import tree_select, tree_zeros_of
from .base import AbstractReversibleSolver
from .capabilities import cross_jump


_SolverState = TypeVar("_SolverState")


class AbstractInterruptedSolver(
    AbstractReversibleSolver[_SolverState], Generic[_SolverState]
):
    """A solver that acts between two steps. `advance` is the step itself."""

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
        """The step itself, which `backward_step` undoes.

        Arguments and returns are those of `diffrax.AbstractSolver.step`, except that
        `dense_info` lacks the entries of `extra_dense_info`.
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
        """Restart or cross a jump if necessary, then `advance`.

        Differentiated, a step stores only its inputs. So XLA compiles it as it does without
        differentiation, and it rounds alike: Diffrax's default adjoint recomputes steps,
        and decides again whether to accept them.
        """

        def step(terms, t0, t1, y0, args, solver_state):
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
            step = self, terms, t0, t1, y0, args, solver_state
            y1, y_error, dense_info, solver_state, result = advance_densely(*step)
            # Diffrax compiles a leaner loop if it knows that no step fails.
            result = None if result is RESULTS.successful else result
            return y1, y_error, dense_info, solver_state, result

        step = eqx.filter_checkpoint(step, prevent_cse=False)
        made = step(terms, t0, t1, y0, args, solver_state)
        y1, y_error, dense_info, solver_state, result = made
        result = RESULTS.successful if result is None else result
        return y1, y_error, dense_info, solver_state, result


class CanRestart(AbstractInterruptedSolver[_SolverState], Generic[_SolverState]):
    """A solver that sometimes resets its solver state irreversibly: it cannot compute the
    old one from the new one."""

    @abc.abstractmethod
    def needs_restart(self, solver_state: _SolverState) -> BoolScalarLike:
        """Whether the solver state has to be reset before the next step.

        A restart cannot be undone. `ReversibleAdjoint` holds the state and the solver state
        before it, or replays the solve up to there.
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
        """The solver state after a restart."""


class HasExtraDenseInfo(AbstractInterruptedSolver[_SolverState], Generic[_SolverState]):
    """A solver whose interpolation needs evaluations beyond those of a step, except at the
    ends of the step."""

    @abc.abstractmethod
    def extra_dense_info(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
        dense_info: DenseInfo,
    ) -> DenseInfo:
        """The entries of `dense_info` that `advance` did not return.

        `ReversibleAdjoint` asks for them only in steps with an output before their end, and
        passes zeros otherwise. With `SaveAt(dense=True)` or the root finder of an event
        that may be any step.
        """


def needs_restart(
    solver: AbstractReversibleSolver, solver_state: SolverState
) -> BoolScalarLike:
    """Whether there is a restart before the next step; Python `False` if there never is."""
    return isinstance(solver, CanRestart) and solver.needs_restart(solver_state)


def advance(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
) -> tuple[Y, Y | None, DenseInfo, SolverState, RESULTS]:
    """The step itself, without a restart or jump before it."""
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
    """`advance`, with the entries of `extra_dense_info`: zeros unless `reads`."""
    y1, y_error, dense_info, solver_state, result = advance(
        solver, terms, t0, t1, y0, args, solver_state
    )
    if not isinstance(solver, HasExtraDenseInfo):
        return y1, y_error, dense_info, solver_state, result

    def evaluate():
        return solver.extra_dense_info(terms, t0, t1, args, dense_info)

    def zeros():
        return tree_zeros_of(jax.eval_shape(evaluate))

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
    """Restart or cross a jump between two steps.

    **Returns:**

    The new solver state, whether there was a restart, and whether a jump was crossed (not
    after a restart, which supersedes it). Python `False` where that is known.
    """

    def restart():
        assert isinstance(solver, CanRestart)
        new = solver.restart(terms, t, y, args, solver_state)
        return tree_select(restarts, new, solver_state)

    def cross():
        new, changed = cross_jump(solver, terms, before_jump(t), t, y, args, solver_state)
        changed = jnp.logical_and(crosses, changed)
        return tree_select(changed, new, solver_state), changed

    # In a batch both are evaluated only if some element needs it. The logical operations
    # also strip tangents, which JAX gives to Booleans too.
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
    """A time just before the jump after which a step begins at `t`.

    Diffrax ends and begins steps one float to either side of a jump. These times are two
    floats apart: up to four units of `eps |t|` just above a power of two. Close to zero
    the unit is the smallest normal number, as XLA flushes smaller ones to zero.
    """
    t = jnp.asarray(t)
    ulps = jnp.maximum(eps(t) * jnp.abs(t), tiny(t))
    return t - lax.stop_gradient(4 * ulps)
