"""Gauss collocation, with any number of stages."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from diffrax import AbstractAdaptiveSolver, AbstractImplicitSolver, AbstractTerm, RESULTS
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    VF,
    Y,
)
from .._jaxpr import derives_custom_vjp, no_derivative
from .._precision import as_floats
from .._tree import larger, tree_add, tree_combine, tree_outer, tree_scale
from .affine import is_affine
from .capabilities import HasStatistics, KeepsStateAtJumps
from .collocation import CollocationInterpolation
from .cotangent import Cotangent
from .error_scales import HasErrorScales
from .gauss_error import AbstractGaussError
from .gauss_state import GaussState
from .linear_inverse import inverse
from .ode_term import as_ode_term
from .pullback import HasPullback
from .stage_equations import solve_stages, Stages
from .stage_newton import StageNewton, tolerances


class AbstractGauss(
    AbstractGaussError,
    KeepsStateAtJumps[GaussState],
    HasErrorScales[GaussState],
    HasStatistics[GaussState],
    HasPullback[GaussState],
    AbstractImplicitSolver[GaussState],
    AbstractAdaptiveSolver[GaussState],
):
    """Collocation at Gauss nodes, for ODEs.

    A step of length `h` solves for the stages `k_i`, derivatives times `h`:

        k_i = h f(t0 + c_i h, y0 + sum_j a_ij k_j),    y1 = y0 + sum_i b_i k_i

    Seen from the other end, the same equations read

        k_i = h f(t0 + c_i h, y1 + sum_j (a_ij - b_j) k_j),    y0 = y1 - sum_i b_i k_i

    and have the same solution, which undoes the step. Cotangents are pulled back by the
    implicit function theorem, with one linear solve of the transposed equations and one
    pull-back of each stage.
    """

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar = CollocationInterpolation

    def order(self, terms: Terms) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Terms) -> int:
        del terms
        return self.tableau.stages + 2

    def init(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> GaussState:
        del t1
        term = as_ode_term(self, terms)
        call = f"`diffeqsolve(..., solver={type(self).__name__}())`"
        half = [x.dtype for x in jtu.tree_leaves(y0) if x.dtype.itemsize < 4]
        if len(half) > 0:
            raise ValueError(
                f"{call} solves linear equations, which JAX does not in {half[0]}. Pass "
                "the state and times in float32."
            )
        at_start = lambda y: term.vf(t0, y, args)
        if derives_custom_vjp(lambda y: jax.jvp(at_start, (y,), (y,))[1], y0):
            raise ValueError(no_derivative(f"{call} solves its equations"))
        return GaussState.start(self.tableau, y0, t0)

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return as_ode_term(self, terms).vf(t0, y0, args)

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: GaussState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, GaussState, RESULTS]:
        del made_jump
        step = terms, t0, t1, args
        stages = self._solve(step, y0, self.tableau.matrix, solver_state)
        k = stages.increments
        y1 = tree_add(y0, tree_combine(self.tableau.weights, k))
        y1 = jtu.tree_map(lambda y: jnp.where(stages.found, y, jnp.nan), y1)
        y_error = self._error(step, y0, y1, k)
        # An infinite error makes the controller reject the step and try a smaller one.
        y_error = jtu.tree_map(lambda e: jnp.where(stages.found, e, jnp.inf), y_error)
        after = solver_state.after(k, t0, t1, stages.iterations)
        failed = RESULTS.promote(optx.RESULTS.nonlinear_divergence)
        result = RESULTS.where(stages.found, RESULTS.successful, failed)
        return y1, y_error, dict(y0=y0, y1=y1, k=k), after, result

    def backward_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: GaussState,
    ) -> tuple[Y, GaussState]:
        y0, _, before = self._undo((terms, t0, t1, args), y1, solver_state)
        return y0, before

    def backward_step_and_pullback(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: GaussState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, GaussState, Cotangent]:
        """One solution of the stage equations, one linear solve with their transpose, and
        one evaluation and pull-back of each stage.

        The two solves cannot share a factorisation: the equations that undo the step have
        the matrix `1 - h (A - 1 b^T) ⊗ J`, and those of the pull-back `1 - h A ⊗ J`.
        """
        terms, args = combine(params)
        y0, k, before = self._undo((terms, t0, t1, args), y1, solver_state)

        def stages(y, k, params):
            terms, args = combine(params)
            return self._evaluate((terms, t0, t1, args), y, self.tableau.matrix, k)

        _, pull = jax.vjp(stages, y0, k, params)
        y1_bar, k_bar = cotangent.y, None
        if dense_cotangent is not None:
            y1_bar = tree_add(y1_bar, dense_cotangent["y1"])
            k_bar = dense_cotangent["k"]
        spread = tree_outer(self.tableau.weights, y1_bar)
        k_bar = spread if k_bar is None else tree_add(k_bar, spread)

        def transposed(x):
            return jtu.tree_map(jnp.subtract, x, pull(x)[1])

        solved, found = inverse(transposed, k_bar, self.linear_solver)(k_bar)
        # The adjoint raises an error when it meets NaN.
        y0 = jtu.tree_map(lambda y: jnp.where(found, y, jnp.nan), y0)
        pulled, _, params_bar = pull(solved)
        y0_bar = tree_add(y1_bar, pulled)
        if dense_cotangent is not None:
            y0_bar = tree_add(y0_bar, dense_cotangent["y0"])
        params_bar = tree_add(cotangent.params, params_bar)
        return y0, before, Cotangent(y0_bar, cotangent.solver_state, params_bar)

    def statistics(self, solver_state: GaussState) -> dict[str, PyTree[Array]]:
        """The number of iterations of the root finder in all accepted steps."""
        return {"num_root_find_steps": solver_state.iterations}

    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: GaussState,
        y_end: Y,
        solver_state_end: GaussState,
    ) -> tuple[Y, GaussState]:
        """The scale of an entry of `y` is at least the contribution of all other entries in
        a linear solve, which spreads their rounding errors: random signs keep them from
        cancelling. If the linear solver is iterative, the scale is at least the largest
        entry of the array, to which its tolerance is relative."""
        del length, solver_state, solver_state_end
        step = terms, t0, t1, args
        slope = tree_scale(t1 - t0, self.func(terms, t0, y0, args))
        filtered = self._filter_at(step, y0, slope)
        scales = jtu.tree_map(larger, y0, y_end, filtered(slope))
        leaves, structure = jtu.tree_flatten(scales)
        keys = jr.split(jr.key(0), len(leaves))
        signed = [
            jr.rademacher(key, x.shape, x.dtype) * x
            for key, x in zip(keys, leaves, strict=True)
        ]
        signed = jtu.tree_unflatten(structure, signed)
        signed = jtu.tree_map(lambda x, y: x.astype(y.dtype), signed, y0)
        spread = filtered(signed)
        scales = jtu.tree_map(larger, scales, spread)
        if any(tolerances(self.linear_solver)):
            scales = jtu.tree_map(lambda x: jnp.full_like(x, jnp.max(x, initial=0)), scales)
        return scales, GaussState(None, None, None)

    def _undo(
        self, step: tuple, y1: Y, solver_state: GaussState
    ) -> tuple[Y, PyTree[Array], GaussState]:
        """The start of a step, its stages, and the solver state."""
        _, t0, t1, _ = step
        stages = self._solve(step, y1, self.tableau.backward_matrix, solver_state)
        k = stages.increments
        increment = tree_combine(self.tableau.weights, k)
        y0 = jtu.tree_map(jnp.subtract, y1, increment)
        # The adjoint raises an error when it meets NaN.
        y0 = jtu.tree_map(lambda y: jnp.where(stages.found, y, jnp.nan), y0)
        return y0, k, solver_state.after(k, t0, t1)

    def _solve(
        self, step: tuple, y: Y, matrix: np.ndarray, solver_state: GaussState
    ) -> Stages:
        """The stages of a step, from the state `y` at the end that `matrix` belongs to."""
        terms, t0, t1, args = step
        term = as_ode_term(self, terms)
        affine = is_affine(lambda y: term.vf(t0, y, args), y)
        return solve_stages(
            lambda k: self._evaluate(step, y, matrix, k),
            solver_state.guess(self.tableau, y, *as_floats(t0, t1)),
            y,
            None if affine else self._root_finder,
            self.linear_solver,
            self.root_find_max_steps,
        )

    @property
    def _root_finder(self) -> optx.AbstractRootFinder:
        if isinstance(self.root_finder, StageNewton):
            return self.root_finder.by(self.linear_solver)
        return self.root_finder

    def _evaluate(
        self, step: tuple, y: Y, matrix: np.ndarray, k: PyTree[Array]
    ) -> PyTree[Array]:
        """The right-hand sides of the stage equations."""
        terms, t0, t1, args = step
        term = as_ode_term(self, terms)
        control = term.contr(t0, t1)
        slopes = [
            term.vf(t0 + float(c) * (t1 - t0), tree_add(y, tree_combine(row, k)), args)
            for c, row in zip(self.tableau.nodes, matrix, strict=True)
        ]
        return tree_scale(control, jtu.tree_map(lambda *ks: jnp.stack(ks), *slopes))
