"""Dense output of collocation methods."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._coefficients.gauss import gauss
from .._custom_types import RealScalarLike, Y
from .step_interpolation import AbstractStepInterpolation


class CollocationInterpolation(AbstractStepInterpolation):
    """The collocation polynomial of a Gauss method, of degree and order `s`.

    Gauss methods use it between steps. It is exact to the bit at both ends, and linear in
    the data.

    Reference: Hairer, Nørsett & Wanner (1993), *Solving Ordinary Differential Equations I*,
    section II.7, doi:10.1007/978-3-540-78862-1.

    **Arguments:**

    - `t0`, `t1`: the ends of the step.
    - `y0`, `y1`: the solution at `t0` and `t1`.
    - `k`: its derivatives at the `s` Gauss nodes, times `t1 - t0`, stacked along a first
        axis.

    Example:

    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import CollocationInterpolation
    >>> y0, y1 = jnp.array(0.0), jnp.array(1.0)
    >>> k = 2 * jnp.array([0.2113249, 0.7886751])  # y = t^2, at the two Gauss nodes
    >>> print(f"{CollocationInterpolation(0.0, 1.0, y0, y1, k).evaluate(0.5):.3f}")
    0.250
    """

    t0: RealScalarLike
    t1: RealScalarLike
    y0: Y
    y1: Y
    k: PyTree[Array]

    def _at(self, x: Float[Array, ""], t: RealScalarLike, left: bool) -> PyTree[Array]:
        del left
        stages = len(jtu.tree_leaves(self.k)[0])
        powers = jnp.stack([x ** (q + 1) for q in range(stages)])
        integrals = jnp.asarray(gauss(stages).integrals, x.dtype)
        weights = integrals @ powers
        # Zero at the end of the step, where `x` is one, with the derivatives of `weights`.
        from_end = integrals @ (powers - 1)

        def combine(y0, y1, k):
            sum_of = lambda w: jnp.tensordot(w.astype(y0.dtype), k, axes=(0, 0))
            end = y1 + sum_of(from_end)
            return jnp.where(t == self.t1, end, y0 + sum_of(weights))

        return jtu.tree_map(combine, self.y0, self.y1, self.k)
