"""Newton's method for the equations of an implicit step."""

import math
from collections.abc import Callable
from typing import ClassVar

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


# An entry is solved when its correction is less than this part of it; in single precision,
# the square root of the rounding.
_small = 1e-5
# How many roundings an entry may be off, and in how many directions they are tried:
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
    the square of that; or when its residual is rounding. Changes of all entries without a
    pattern, of some roundings of their size, tell what is rounding: the linearisation
    spreads them as the equations spread rounding errors, which stiffness multiplies. So an
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
