"""The equations of an implicit step, solved to rounding."""

import math
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


# An entry is solved when its correction is less than this part of it; in single precision,
# the square root of the rounding.
_small = 1e-5
# How many roundings an entry may be off, and in how many random directions they are tried:
# in one direction their effects may cancel.
_roundings, _samples = 4.0, 4
# Corrections beyond this power of the rounding, relative to the units, are not rounding.
_most_rounding = 0.4
# After so many iterations, corrections that are small parts of the units suffice.
_patience = 10


class _Iteration(Module):
    """The state of `StageNewton`: whether every entry is solved, whether the linear solver
    succeeded, and the number of iterations."""

    solved: BoolScalarLike
    result: optx.RESULTS
    count: Int[Array, ""]


class StageNewton(optx.AbstractRootFinder):
    """Newton's method that stops when every entry is solved.

    An entry is solved when its correction is a small part of it, as the next one is about
    the square of that; or when its residual is rounding. Random changes of all entries,
    each of some roundings of its size, tell what is rounding: the linearised equations
    spread them as the equations spread rounding errors, which stiffness multiplies. So an
    entry is neither taken for solved because others are larger, nor for unsolved because
    they round it. The linear solver mixes all residuals, and spreads an error of its own.

    The unknowns have units of the largest entries, or smaller ones. `args` of the equations
    are the sizes of the entries, in these units.
    """

    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    # optimistix requires these of a root finder. Tolerances follow from the precision.
    rtol: ClassVar[float] = 0.0
    atol: ClassVar[float] = 0.0
    norm: ClassVar[Callable[[PyTree], Array]] = optx.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, y, args, options, f_struct, aux_struct, tags
        return _Iteration(jnp.array(False), optx.RESULTS.successful, jnp.array(0))

    def step(self, fn, y, args, options, state, tags):
        del options
        residual, tangent, aux = jax.linearize(lambda y: fn(y, args), y, has_aux=True)
        operator = lx.FunctionLinearOperator(tangent, jax.eval_shape(lambda: y), tags)
        solution = lx.linear_solve(operator, residual, self.linear_solver, throw=False)
        y = jtu.tree_map(jnp.subtract, y, solution.value)
        sizes = jtu.tree_map(lambda y, size: jnp.maximum(jnp.abs(y), size), y, args)
        correction = jtu.tree_map(jnp.abs, solution.value)
        rtol, atol = tolerances(self.linear_solver)

        def is_small(correction, size):
            enough = jnp.where(state.count < _patience, 0, _small * (1 + size))
            small = max(_small, eps(size) ** 0.5) * size
            return correction <= jnp.maximum(small, enough)

        def may_be_rounding(correction, size):
            return jnp.all(correction <= eps(size) ** _most_rounding * (1 + size))

        def is_solved(small):
            rounding = _rounding(tangent, sizes, state.count)
            mixed = optx.max_norm(rounding)

            def of_array(small, residual, rounding, size):
                spread = max(rtol, eps(size)) * mixed.astype(size.dtype) + atol
                is_rounding = jnp.abs(residual) <= rounding + _roundings * spread
                return jnp.all(small | is_rounding)

            return _all(jtu.tree_map(of_array, small, residual, rounding, sizes))

        small = jtu.tree_map(is_small, correction, sizes)
        solved = _all(jtu.tree_map(jnp.all, small))
        uncertain = _all(jtu.tree_map(may_be_rounding, correction, sizes)) & ~solved
        solved = lax.cond(uncertain, is_solved, lambda _: solved, small)
        result = optx.RESULTS.promote(solution.result)
        return y, _Iteration(solved, result, state.count + 1), aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.solved, state.result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}

    def by(self, linear_solver: lx.AbstractLinearSolver) -> "StageNewton":
        """The same method with another linear solver."""
        return StageNewton(linear_solver)


def _all(tree: PyTree[Array]) -> Array:
    return jnp.array(jtu.tree_leaves(tree)).all()


def _rounding(
    tangent: Callable[[PyTree[Array]], PyTree[Array]],
    sizes: PyTree[Array],
    count: Int[Array, ""],
) -> PyTree[Array]:
    """The size of rounding errors of equations, from their linearisation, in directions
    that depend on `count`."""

    def change(size):
        noise = _noise((_samples, *size.shape), count).astype(size.dtype)
        return _roundings * eps(size) * size[None] * noise

    changes = jtu.tree_map(change, sizes)
    spread = jax.vmap(tangent)(changes)
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), axis=0), spread)


def _noise(shape: tuple[int, ...], count: Int[Array, ""]) -> Array:
    """Numbers between -1 and 1 without a pattern, which take less time than random ones:
    the digits of sines far behind the point."""
    index = jnp.arange(math.prod(shape)).reshape(shape) + 7919 * count
    digits = 43758.5453 * jnp.sin(12.9898 * index.astype(jnp.float32))
    return 2 * (digits - jnp.floor(digits)) - 1


def tolerances(linear_solver: lx.AbstractLinearSolver) -> tuple[float, float]:
    """The relative and absolute tolerance of a linear solver: zero for direct ones."""
    inner = getattr(linear_solver, "inner_solver", linear_solver)
    return getattr(inner, "rtol", 0.0), getattr(inner, "atol", 0.0)


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
    largest one, whose rounding limits its accuracy: the least unit makes `_small` of it a
    hundred roundings of the largest entry.
    """
    least = min(1.0, 100 * eps(guess) / _small) * jnp.max(sizes, initial=0)
    units = jnp.maximum(sizes, least)
    return jnp.where(units > 0, units, 1).astype(guess.dtype)
