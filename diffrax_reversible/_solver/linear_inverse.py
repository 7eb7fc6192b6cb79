"""Linear equations with any linear solver."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._custom_types import BoolScalarLike
from .._tree import from_real, to_real


def inverse(
    fn: Callable[[PyTree[Array]], PyTree[Array]],
    like: PyTree[Array],
    solver: lx.AbstractLinearSolver,
) -> Callable[[PyTree[Array]], tuple[PyTree[Array], BoolScalarLike]]:
    """The function that solves the linear equations `fn(x) = vector` for vectors `like`
    this one: the solution, NaN if it was not found, and whether it was found.

    Complex equations are linear over the real numbers only, and are solved for real and
    imaginary parts."""

    def real_fn(x):
        return to_real(fn(from_real(x, like)))

    structure = jax.eval_shape(lambda: to_real(like))
    operator = lx.FunctionLinearOperator(real_fn, structure)
    # A factorisation, for example. Lineax does not differentiate it.
    state = solver.init(operator, {})
    arrays, others = eqx.partition(state, eqx.is_array)
    state = eqx.combine(lax.stop_gradient(arrays), others)

    def solve(vector):
        solution = lx.linear_solve(
            operator, to_real(vector), solver, state=state, throw=False
        )
        found = solution.result == lx.RESULTS.successful
        x = from_real(solution.value, vector)
        return jtu.tree_map(lambda x: jnp.where(found, x, jnp.nan), x), found

    return solve
