"""The solver state of Gauss methods: the initial guess of the next iteration."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._coefficients.gauss import GaussTableau
from .._custom_types import RealScalarLike, Y
from .._precision import as_floats
from .._tree import from_bits, to_bits, tree_combine


# Extrapolate a collocation polynomial by at most so many of its lengths.
_farthest = 2.0


class GaussState(eqx.Module):
    """The solver state of Gauss methods: the stages of the adjacent step, as a guess for
    the stages of the next one.

    They affect a step only by rounding. As bits they are neither differentiated nor
    compared in the backward pass.

    - `slopes`: the derivatives at the stages, stacked along a first axis.
    - `ends`: both ends of the adjacent step.
    - `iterations`: the number of iterations of the root finder in all accepted steps.
    """

    slopes: PyTree[Int[Array, " stages ..."]]
    ends: Int[Array, " 2"] | None
    iterations: Int[Array, ""] | None

    @staticmethod
    def start(tableau: GaussTableau, y: Y, t: RealScalarLike) -> "GaussState":
        """The state without an adjacent step."""
        shape = lambda x: jnp.zeros((tableau.stages, *x.shape), x.dtype)
        slopes = jtu.tree_map(shape, y)
        ends = jnp.stack(as_floats(t, t))
        slopes, ends = to_bits((slopes, ends))
        return GaussState(slopes, ends, jnp.array(0))

    def after(
        self,
        increments: PyTree[Array],
        t0: RealScalarLike,
        t1: RealScalarLike,
        iterations: Int[Array, ""] | int = 0,
    ) -> "GaussState":
        """The state after, or before, a step from `t0` to `t1` with these increments."""
        ends = jnp.stack(as_floats(t0, t1))
        length = jnp.where(ends[1] == ends[0], 1, ends[1] - ends[0])
        slopes = jtu.tree_map(lambda k: k / length.astype(k.dtype), increments)
        slopes, ends = to_bits((slopes, ends))
        assert self.iterations is not None
        return GaussState(slopes, ends, self.iterations + iterations)

    def guess(
        self, tableau: GaussTableau, y: Y, t0: RealScalarLike, t1: RealScalarLike
    ) -> PyTree[Array]:
        """A guess of the stage derivatives of a step from `t0` to `t1`, times its length,
        from the derivative of the collocation polynomial of the adjacent step."""
        like = jtu.tree_map(lambda x: jnp.zeros((tableau.stages, *x.shape), x.dtype), y)
        slopes, ends = from_bits((self.slopes, self.ends), (like, jnp.stack([t0, t1])))
        length = ends[1] - ends[0]
        known = length != 0
        nodes = jnp.asarray(tableau.nodes, length.dtype)
        x = (t0 + nodes * (t1 - t0) - ends[0]) / jnp.where(known, length, 1)
        x = jnp.clip(x, 1 - _farthest, _farthest)
        powers = jnp.stack([x**q for q in range(tableau.stages)])
        # Rows belong to the known stages, columns to the wanted ones.
        weights = jnp.asarray(tableau.basis, length.dtype) @ powers
        weights = jnp.where(known, weights * (t1 - t0), 0)
        return tree_combine(weights, slopes)
