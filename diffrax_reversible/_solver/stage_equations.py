"""The equations of an implicit step, solved to rounding."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optimistix as optx
from equinox import Module
from jaxtyping import Array, Int, PyTree

from .._custom_types import BoolScalarLike
from .._precision import eps
from .._tree import from_real, to_real


class StageNewton(optx.Newton):
    """Newton's method, which ends where a correction is less than `atol`, in units of the
    size of the state. It leaves an error of about `atol**2`.

    Residuals say little where the stiffness multiplies their rounding errors.
    """

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.diffsize < 1, state.result

    def by(self, linear_solver: lx.AbstractLinearSolver) -> "StageNewton":
        """With another linear solver."""
        return StageNewton(self.rtol, self.atol, linear_solver=linear_solver)


class _Corrected(optx.AbstractRootFinder):
    """Another root finder, and a Newton step from where it ends, which makes of an error
    `e` one of about `e^2`, that is rounding; or else nothing but such a step, which solves
    equations that are affine."""

    root_finder: optx.AbstractRootFinder | None
    linear_solver: lx.AbstractLinearSolver
    # What optimistix asks of a root finder, and does not use of this one.
    rtol: ClassVar[float] = 0.0
    atol: ClassVar[float] = 0.0
    norm: ClassVar[Callable[[PyTree], Array]] = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        if self.root_finder is None:
            return None
        return self.root_finder.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(self, fn, y, args, options, state, tags):
        if self.root_finder is None:
            # Never taken, but traced.
            return y, None, fn(y, args)[1]
        return self.root_finder.step(fn, y, args, options, state, tags)

    def terminate(self, fn, y, args, options, state, tags):
        if self.root_finder is None:
            return jnp.array(True), optx.RESULTS.successful
        return self.root_finder.terminate(fn, y, args, options, state, tags)

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        stats: dict[str, Any] = {}
        if self.root_finder is not None:
            y, aux, stats = self.root_finder.postprocess(
                fn, y, aux, args, options, state, tags, result
            )
        residual, tangent = jax.linearize(lambda y: fn(y, args)[0], y)
        operator = lx.FunctionLinearOperator(tangent, jax.eval_shape(lambda: y), tags)
        correction = lx.linear_solve(operator, residual, self.linear_solver, throw=False)
        stats |= dict(solved=correction.result == lx.RESULTS.successful)
        return jtu.tree_map(jnp.subtract, y, correction.value), aux, stats


class Stages(Module):
    """A solution of stage equations.

    - `increments`: the stage derivatives times the length of the step.
    - `found`: whether the iteration has converged.
    - `iterations`: how many there were.
    """

    increments: PyTree[Array]
    found: BoolScalarLike
    iterations: Int[Array, ""]


def solve_stages(
    fn: Callable[[PyTree[Array]], PyTree[Array]],
    guess: PyTree[Array],
    y: PyTree[Array],
    root_finder: optx.AbstractRootFinder | None,
    linear_solver: lx.AbstractLinearSolver,
    max_steps: int,
) -> Stages:
    """Solve `k = fn(k)`, from a `guess`, in units of the size of `y`, entry by entry; by a
    single Newton step if `root_finder` is `None`, in none. Where they are complex, their
    real and imaginary parts are the unknowns: `fn` need not be holomorphic.

    The solution is differentiated by the implicit function theorem.
    """
    guess = lax.stop_gradient(guess)
    units = jtu.tree_map(jnp.ones_like, guess)
    if root_finder is not None:
        units = jtu.tree_map(_units, guess, lax.stop_gradient(y))

    def to_unknowns(increments):
        return to_real(jtu.tree_map(jnp.divide, increments, units))

    def to_increments(unknowns):
        return jtu.tree_map(jnp.multiply, units, from_real(unknowns, guess))

    def residual(unknowns, _):
        increments = to_increments(unknowns)
        return to_unknowns(jtu.tree_map(jnp.subtract, increments, fn(increments)))

    solution = optx.root_find(
        residual,
        _Corrected(root_finder, linear_solver),
        to_unknowns(guess),
        max_steps=max_steps,
        adjoint=optx.ImplicitAdjoint(linear_solver=linear_solver),
        throw=False,
    )
    increments = to_increments(solution.value)
    finite = jnp.array([jnp.all(jnp.isfinite(k)) for k in jtu.tree_leaves(increments)])
    found = (solution.result == optx.RESULTS.successful) & solution.stats["solved"]
    found = found & finite.all()
    return Stages(increments, found, solution.stats["num_steps"] + 1)


def _units(guess: Array, y: Array) -> Array:
    """The size of every entry of the state and of the increments, to divide by.

    Of corrections in these units less than 1e-5 is asked for. Of an entry that is zero, or
    tiny, only as much can be had as rounding of the largest one leaves, with which it may
    be coupled: a hundred units of rounding.
    """
    sizes = jnp.maximum(jnp.max(jnp.abs(guess), axis=0), jnp.abs(y))
    least = min(1.0, 1e5 * 100 * eps(y)) * jnp.max(sizes, initial=0)
    sizes = jnp.maximum(sizes, least)
    return jnp.where(sizes > 0, sizes, 1)[None].astype(y.dtype)
