"""The time scale of a solution, from the derivatives of its vector field."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import RealScalarLike, VF, Y
from .._precision import tiny
from .._total_derivative import total_derivatives


# A function of time and state.
Field = Callable[[RealScalarLike, Y], VF]


def squared_time_scale(
    field: Field, t0: RealScalarLike, y0: Y, longest: RealScalarLike
) -> Callable[[Field, RealScalarLike, Y], Float[Array, ""]]:
    """The square of the time in which the vector field changes by its own size,

        T² = N / (D + N / longest²),
        N = |f|² + τ² |f'|²,    D = |f'|² + τ² |f''|²,

    where `'` is the derivative along the solution. The constant `τ` is that time at the
    start, by

        τ² = P_2 / P_4,    P_m = Σ_{i+j=m} |f^(i)| |f^(j)|.

    `T` does not depend on the units of the state or of time, nor on the origin. It is
    smooth, and neither zero nor infinite where one of the derivatives vanishes: on
    `f = cos t` it varies between one and `√2`. Where the field is constant it is `longest`.

    **Returns:**

    `T²` as a function of the vector field (whose parameters may have changed since), the
    time and the state. It does not evaluate `τ` again.

    Reference: Steps of the N-body problem are commonly chosen by quotients of such
    products, with the force for `f` and one derivative less: Aarseth (2003), *Gravitational
    N-Body Simulations*, doi:10.1017/CBO9780511535246, eq. 2.13.
    """
    least = tiny(t0)

    def bounded(numerator, denominator):
        numerator = numerator + least
        return numerator / (denominator + numerator / longest**2 + least)

    norms = [jnp.sqrt(_square(f, t0)) for f in total_derivatives(field, 4)(t0, y0)]
    start = bounded(*(sum(norms[i] * norms[m - i] for i in range(m + 1)) for m in (2, 4)))

    def time_scale(field, t, y):
        f0, f1, f2 = (_square(f, t) for f in total_derivatives(field, 2)(t, y))
        return bounded(f0 + start * f1, f1 + start * f2)

    return time_scale


def _square(x: PyTree[Array], t: RealScalarLike) -> Float[Array, ""]:
    dtype = jnp.result_type(t)
    squares = (jnp.sum(jnp.square(jnp.abs(x)).astype(dtype)) for x in jtu.tree_leaves(x))
    return sum(squares, jnp.zeros((), dtype))
