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


class _Corrected(optx.AbstractRootFinder):
    """A root finder followed by one Newton step, which reduces an error `e` to about `e^2`,
    that is to rounding. Without a root finder it is a single Newton step, which solves
    affine equations."""

    root_finder: optx.AbstractRootFinder | None
    linear_solver: lx.AbstractLinearSolver
    # optimistix requires these of a root finder, but does not use them here.
    rtol: ClassVar[float] = 0.0
    atol: ClassVar[float] = 0.0
    norm: ClassVar[Callable[[PyTree], Array]] = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        if self.root_finder is None:
            return None
        return self.root_finder.init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(self, fn, y, args, options, state, tags):
        if self.root_finder is None:
            # Traced, but never executed.
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
    - `iterations`: the number of iterations.
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
    """Solve `k = fn(k)` from a `guess`, scaled entry by entry by the size of `y`.

    If `root_finder` is `None`, this takes a single Newton step without scaling. If `k` is
    complex, its real and imaginary parts are the unknowns: `fn` need not be holomorphic.
    The solution is differentiated by the implicit function theorem.
    """
    guess = lax.stop_gradient(guess)
    sizes = jtu.tree_map(_sizes, guess, lax.stop_gradient(y))
    if root_finder is None:
        units = jtu.tree_map(jnp.ones_like, guess)
    else:
        units = jtu.tree_map(_units, sizes, guess)

    def to_unknowns(increments):
        return to_real(jtu.tree_map(jnp.divide, increments, units))

    def to_increments(unknowns):
        return jtu.tree_map(jnp.multiply, units, from_real(unknowns, guess))

    def residual(unknowns, _):
        increments = to_increments(unknowns)
        return to_unknowns(jtu.tree_map(jnp.subtract, increments, fn(increments)))

    unknowns = to_unknowns(guess)
    solution = optx.root_find(
        residual,
        _Corrected(root_finder, linear_solver),
        unknowns,
        jtu.tree_map(_broadcast, sizes, units, unknowns),
        max_steps=max_steps,
        adjoint=optx.ImplicitAdjoint(linear_solver=linear_solver),
        throw=False,
    )
    increments = to_increments(solution.value)
    finite = jnp.array([jnp.all(jnp.isfinite(k)) for k in jtu.tree_leaves(increments)])
    found = (solution.result == optx.RESULTS.successful) & solution.stats["solved"]
    found = found & finite.all()
    return Stages(increments, found, solution.stats["num_steps"] + 1)


def _sizes(guess: Array, y: Array) -> Array:
    """The sizes of entries of the state and of the increments."""
    return jnp.maximum(jnp.max(jnp.abs(guess), axis=0), jnp.abs(y))[None]


def _broadcast(size: Array, unit: Array, unknown: Array) -> Array:
    """The sizes of entries for every unknown, in the units of the unknowns."""
    return jnp.broadcast_to(size / jnp.abs(unit[:1]), unknown.shape)


def _units(sizes: Array, guess: Array) -> Array:
    """Divisors of the increments, to which the tolerance of a root finder is relative.

    They are the `sizes` of entries. But an entry that is zero or tiny may be coupled to the
    largest one, whose rounding limits its accuracy: the least unit makes 1e-5 of it a
    hundred roundings of the largest entry.
    """
    least = min(1.0, 1e5 * 100 * eps(guess)) * jnp.max(sizes, initial=0)
    units = jnp.maximum(sizes, least)
    return jnp.where(units > 0, units, 1).astype(guess.dtype)
