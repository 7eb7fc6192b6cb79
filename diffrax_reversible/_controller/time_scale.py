"""The time scale of a solution, from the derivatives of its vector field."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import RealScalarLike, VF, Y
from .._precision import tiny
from .._total_derivative import total_derivatives
from .._tree import tree_scale


# A function of time and state.
Field = Callable[[RealScalarLike, Y], VF]

# The times in a solve, as fractions of its length, by which `τ` is bounded from below;
# without a common divisor, as a force may be periodic.
_fractions = (0.0, 0.13, 0.37, 0.59, 0.83)


def squared_time_scale(
    field: Field, t0: RealScalarLike, y0: Y, longest: RealScalarLike
) -> Callable[[Field, RealScalarLike, Y], Float[Array, ""]]:
    """The square of the time in which the vector field changes by its own size, at most
    `longest`, the length of the solve,

        T² = N / (D + N / longest²),
        N = |f|² + τ² |f'|² + τ⁴ |f''|² / 1000,    D = |f'|² + τ² |f''|²,

    where `'` is the derivative along the solution. The constant `τ` is that time at the
    start, by

        τ² = P_2 / P_4,    P_m = Σ_{i+j=m} |f^(i)| |f^(j)|.

    A solution may start near rest, where `f` and `f'` vanish, as before its first input. So
    `τ²` is at least a sixteenth of the quotient of the means of `P_2` and `P_4` over five
    times between `t0` and `t1`, with the state as it is at the start.

    `T` does not depend on the units of the state or of time, nor on the origin: squares are
    taken in units of `τ` and of the size of `f` at the start. It is smooth, and neither
    zero nor infinite where two of the derivatives vanish: on `f = cos t` it varies between
    one and `√2`. Where the field is constant it is `longest`.

    **Returns:**

    `T²` as a function of the vector field (whose parameters may have changed since), the
    time and the state. It does not evaluate `τ` again.

    Reference: Steps of the N-body problem are commonly chosen by quotients of such
    products, with the force for `f` and one derivative less: Aarseth (2003), *Gravitational
    N-Body Simulations*, doi:10.1017/CBO9780511535246, eq. 2.13.
    """
    longest = jnp.asarray(longest, jnp.result_type(t0))
    # A solve of no length makes no step.
    longest = jnp.where(longest == 0, 1, longest)
    size, unit = _units(field, t0, y0, longest)

    def time_scale(field, t, y):
        fs = _derivatives(field, 2, t, y, unit)
        f0, f1, f2 = (_square(f, t, size) for f in fs)
        return unit**2 * _bounded(f0 + f1 + f2 / 1000, f1 + f2, unit / longest)

    return time_scale


def _units(
    field: Field, t0: RealScalarLike, y0: Y, longest: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The size of the vector field at the start, times `τ`, and `τ`."""
    unit = jnp.where(jnp.isfinite(longest), longest, 1)
    unit = _near_time_scale(field, t0, y0, unit)
    # A solve without an end is looked at where it starts.
    length = jnp.where(jnp.isfinite(longest), longest, 0)

    @jax.vmap
    def norms_at(fraction):
        fs = _derivatives(field, 4, t0 + fraction * length, y0, unit)
        norms = jnp.stack([_norm(f, t0) for f in fs])
        # The field need not be finite there.
        return jnp.where(jnp.isfinite(norms).all(), norms, 0)

    norms = norms_at(jnp.array(_fractions, unit.dtype))
    size = _positive(jnp.max(norms))
    norms = norms / size
    p_2, p_4 = (jnp.sum(norms[:, : m + 1] * norms[:, m::-1], axis=1) for m in (2, 4))
    ratio = unit / longest
    at_start = _bounded(p_2[0], p_4[0], ratio)
    of_means = _bounded(jnp.mean(p_2), jnp.mean(p_4), ratio)
    squared = jnp.maximum(at_start, of_means / 16)
    powers = jnp.stack([jnp.ones_like(squared), jnp.sqrt(squared), squared])
    size = size * _positive(jnp.sqrt(jnp.sum((norms[0, :3] * powers) ** 2)))
    return size, unit * jnp.sqrt(squared)


def _near_time_scale(
    field: Field, t0: RealScalarLike, y0: Y, longest: Float[Array, ""]
) -> Float[Array, ""]:
    """A unit of time in which higher derivatives do not overflow, at most the `longest`."""
    fs = _derivatives(field, 2, t0, y0, longest)
    f0, f1, f2 = (_norm(f, t0) for f in fs)
    unit = longest
    # The second also where `f` vanishes, unless the second derivative overflows.
    for numerator, denominator in ((f0, f1), (f0 + f1, f1 + f2)):
        fraction = numerator / _positive(denominator)
        known = jnp.isfinite(fraction) & (fraction > 0) & (denominator > 0)
        unit = jnp.where(known, longest * jnp.minimum(fraction, 1), unit)
    return unit


def _bounded(
    numerator: Float[Array, ""], denominator: Float[Array, ""], ratio: Float[Array, ""]
) -> Float[Array, ""]:
    """The quotient of squares, at most `1 / ratio²`: the `ratio` of the unit of time to the
    longest one."""
    least = tiny(numerator)
    numerator = numerator + least
    return numerator / (denominator + numerator * ratio**2 + least)


def _derivatives(
    field: Field, count: int, t: RealScalarLike, y: Y, unit: Float[Array, ""]
) -> tuple[VF, ...]:
    """The vector field and its derivatives along the solution, in a `unit` of time."""
    scaled = lambda t, y: tree_scale(unit, field(t, y))
    return total_derivatives(scaled, count, unit)(t, y)


def _norm(x: PyTree[Array], t: RealScalarLike) -> Float[Array, ""]:
    """The Euclidean norm, also where squares would over- or underflow."""
    dtype = jnp.result_type(t)
    largest = [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in jtu.tree_leaves(x)]
    size = _positive(jnp.max(jnp.stack([jnp.zeros((), dtype), *largest])))
    return size * jnp.sqrt(_square(x, t, size))


def _positive(size: Float[Array, ""]) -> Float[Array, ""]:
    """One in place of zero."""
    return jnp.where(size > 0, size, 1)


def _square(
    x: PyTree[Array], t: RealScalarLike, size: Float[Array, ""]
) -> Float[Array, ""]:
    """The square of the Euclidean norm of `x / size`."""
    dtype = jnp.result_type(t)
    squares = (
        jnp.sum(jnp.square(jnp.abs(x).astype(dtype) / size)) for x in jtu.tree_leaves(x)
    )
    return sum(squares, jnp.zeros((), dtype))
