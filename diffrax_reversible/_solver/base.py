"""The contract of a reversible solver."""

import abc
from collections.abc import Callable
from typing import Generic, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, RESULTS
from jaxtyping import Array, Float, PyTree

from .._custom_types import (
    Args,
    Bind,
    BoolScalarLike,
    DenseInfo,
    Params,
    RealScalarLike,
    SolverState,
    Terms,
    Y,
)
from .._tree import largest, tree_add, tree_zeros_like


_SolverState = TypeVar("_SolverState")


class Cotangent(eqx.Module):
    """The cotangent of everything that a step is a function of.

    - `y`, `solver_state`: as the state and the solver state, with `None` for leaves that
        are not floating-point arrays.
    - `params`: as the differentiated leaves of `(terms, args)`; the sum over all the
        steps walked back so far.
    """

    y: Y
    solver_state: SolverState
    params: Params


class AbstractReversibleSolver(AbstractSolver[_SolverState], Generic[_SolverState]):
    """A solver whose steps can be undone, for use with
    [`diffrax_reversible.ReversibleAdjoint`][].

    Of what [`diffrax.AbstractSolver`][] asks for, a subclass implements `step` as
    `advance`, and beyond it `inverse_step`; nothing else is needed for exact gradients.
    One that now and then replaces its solver state by something that the old one does not
    follow from says so through `needs_restart` and `restart`. A subclass that can undo
    and differentiate a step with the same vector-field evaluations overrides
    `inverse_step_and_pullback`, of which the default reconstructs the start of the step
    with `inverse_step` and then differentiates `advance`.

    Interpolations have to be linear in the `dense_info` that `advance` returns, as
    polynomial ones are.
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
        """Restart where it is due, and `advance`."""
        due = restart_pending(self, solver_state, made_jump)
        if due is not False:

            def restart():
                new = self.restart(terms, t0, y0, args, solver_state)
                return jtu.tree_map(lambda n, o: jnp.where(due, n, o), new, solver_state)

            # In a batch it is evaluated only in steps in which some element needs it.
            solver_state = lax.cond(eqxi.unvmap_any(due), restart, lambda: solver_state)
        return self.advance(terms, t0, t1, y0, args, solver_state)

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
        """A step, but for restarts.

        Arguments and returns are those of [`diffrax.AbstractSolver.step`][].
        """

    @abc.abstractmethod
    def inverse_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, _SolverState]:
        """Undo `advance`.

        **Arguments:**

        - `terms`, `args`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the very floats that the forward step was made from and to.
        - `y1`, `solver_state`: what `advance` returned, that is at `t1`.

        **Returns:**

        The state and the solver state at `t0`, equal to what `advance` was given up to
        rounding.
        """

    def needs_restart(self, solver_state: _SolverState) -> BoolScalarLike:
        """Whether the solver state has to be replaced before the next step.

        That cannot be undone. `ReversibleAdjoint` stores the state and the solver state
        before each restart.
        """
        del solver_state
        return False

    def restart(
        self,
        terms: Terms,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> _SolverState:
        """The solver state to go on with after a restart or a jump."""
        del terms, t, y, args
        return solver_state

    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        solver_state: _SolverState,
    ) -> PyTree[Float[Array, ""]]:
        """What errors of the walk back are measured by, where it comes to a known state.

        **Arguments:**

        - `terms`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the step that begins there.
        - `length`: of the solve, in time.
        - `y0`, `solver_state`: what is known.

        **Returns:**

        For every floating-point array of `(y0, solver_state)`, in that order, a scalar: by
        default its largest entry.
        """
        del terms, t0, t1, length
        return largest(eqx.filter((y0, solver_state), eqx.is_inexact_array))

    def inverse_step_and_pullback(
        self,
        bind: Bind,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, _SolverState, Cotangent]:
        """Undo `advance` and pull a cotangent back through it.

        **Arguments:**

        - `bind`, `params`: `terms, args = bind(params)`. The gradient is with respect to
            `params`.
        - `t0`, `t1`, `y1`, `solver_state`: as for `inverse_step`.
        - `cotangent`: at `t1`, with the sum of `params` so far.
        - `dense_cotangent`: the cotangent of the `dense_info` that `advance` returned, or
            `None` where nothing was interpolated.

        **Returns:**

        The state, the solver state, and the cotangent, all at `t0`.
        """
        y0, solver_state0, _, pull = linearise_step(
            self, bind, params, t0, t1, y1, solver_state
        )
        return y0, solver_state0, pull(cotangent, dense_cotangent)


def restart_pending(
    solver: AbstractReversibleSolver,
    solver_state: SolverState,
    made_jump: BoolScalarLike,
) -> BoolScalarLike:
    """Whether a restart is due; a Python `False` where that is known."""
    needed = solver.needs_restart(solver_state)
    if needed is False and made_jump is False:
        return False
    # Also strips tangents, which JAX gives to Booleans too.
    return jnp.logical_or(needed, made_jump)


def linearise_step(
    solver: AbstractReversibleSolver,
    bind: Bind,
    params: Params,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y1: Y,
    solver_state: SolverState,
    step_times: Callable[[Params], tuple[RealScalarLike, RealScalarLike]] | None = None,
) -> tuple[Y, SolverState, DenseInfo, Callable[[Cotangent, DenseInfo | None], Cotangent]]:
    """Undo a step, make it again, and return what it interpolated with and its pull-back.

    If `t0` and `t1` depend on `params`, then `step_times` says how. Costs an inverse step,
    a step, and the memory of all the stages of a step.
    """
    terms, args = bind(params)
    y0, solver_state0 = solver.inverse_step(terms, t0, t1, y1, args, solver_state)
    nondiff_state = eqx.filter(solver_state0, eqx.is_inexact_array, inverse=True)

    def step(y: Y, diff_state: PyTree, params: Params):
        terms, args = bind(params)
        state = eqx.combine(diff_state, nondiff_state)
        times = (t0, t1) if step_times is None else step_times(params)
        y, _, dense_info, state, _ = solver.advance(terms, *times, y, args, state)
        return y, eqx.filter(state, eqx.is_inexact_array), dense_info

    diff_state = eqx.filter(solver_state0, eqx.is_inexact_array)
    outputs, pull_step = eqx.filter_vjp(step, y0, diff_state, params)
    _, _, dense_info = outputs

    def pull(cotangent: Cotangent, dense_cotangent: DenseInfo | None) -> Cotangent:
        if dense_cotangent is None:
            dense_cotangent = tree_zeros_like(dense_info)
        y, state, params = pull_step((cotangent.y, cotangent.solver_state, dense_cotangent))
        return Cotangent(y, state, tree_add(cotangent.params, params))

    return y0, solver_state0, dense_info, pull
