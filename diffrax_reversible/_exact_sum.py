"""Sums without rounding: an increment that was added can be subtracted to the last bit."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._tree import from_bits, is_complex, real_like, to_bits, tree_add, tree_scale


class Sum(eqx.Module):
    """A PyTree of arrays to which increments are added: the state of a solve.

    By default only `high` is stored, and addition rounds as usual. With `low` and `grid`
    the value is `high + low`, which has twice the precision. Addition is then exact, and
    `x.plus(p).minus(p)` is `x` to the last bit:

    - Every increment is first rounded to a multiple of a fixed `δ`, by adding and
      subtracting `grid`, a number whose last bit is `δ`. Sums then lie on a lattice.
    - `high` is the sum rounded to the nearest floating-point number, and `low` the rest.
      Both come from error-free transformations (two-sum), and `low` is exact as long as
      the sum is less than about `2^(2p) δ`, with `p` the bits of precision.

    `δ` is `2^(-7p/4)` times the largest entry of the array at the start of the solve. Sums
    may grow by a factor of `2^(p/4 - 2)` before their last bits round: by 2,000 in float64
    and by 16 in float32. Entries as small as `2^(-3p/4)` of the largest have full
    precision: 1e-12 in float64, 4e-6 in float32. Of an array that starts at zero, with
    increments of zero, the size is not known. Then `δ` is zero, and sums round, with twice
    the precision.

    References: Two-sum: Knuth (1969), *The Art of Computer Programming*, vol. 2; Møller
    (1965), doi:10.1007/BF01975722. Integrating on a lattice: Levesque & Verlet (1993),
    doi:10.1080/00268979300100761; Rein & Tamayo (2018), doi:10.1093/mnras/stx2516.
    """

    high: PyTree[Array]
    low: PyTree[Array] | None
    grid: PyTree[Float[Array, ""]] | None

    def plus(self, p: PyTree[Array]) -> "Sum":
        return self._plus(p, 1)

    def minus(self, p: PyTree[Array]) -> "Sum":
        return self._plus(p, -1)

    def scaled(self, a: float) -> "Sum":
        """`a` times this; exact if `a` is 1 or -1."""
        if a == 1:
            return self
        if a == -1:
            low = None if self.low is None else jtu.tree_map(jnp.negative, self.low)
            return Sum(jtu.tree_map(jnp.negative, self.high), low, self.grid)
        assert self.low is None
        return Sum(tree_scale(a, self.high), None, None)

    def divided(self, a: float) -> "Sum":
        """`1 / a` times this; exact if `a` is 1 or -1."""
        if a in (1, -1):
            return self.scaled(a)
        assert self.low is None
        quotient = lambda x: x / jnp.asarray(a, x.dtype)
        return Sum(jtu.tree_map(quotient, self.high), None, None)

    def _plus(self, p: PyTree[Array], sign: int) -> "Sum":
        if self.low is None:
            combine = jnp.add if sign == 1 else jnp.subtract
            return Sum(jtu.tree_map(combine, self.high, p), None, None)
        # Round before applying the sign: rounding to `grid` is not symmetric.
        p = jtu.tree_map(lambda p, grid: sign * _round(p, grid), p, self.grid)
        total = tree_add(self.high, p)
        error = jtu.tree_map(_rounding_error, self.high, p, total)
        rest = tree_add(self.low, error)
        high = tree_add(total, rest)
        # A simpler two-sum: `rest` is far smaller than `total` or a small multiple of `δ`.
        low = jtu.tree_map(lambda r, h, t: r - lax.stop_gradient(h - t), rest, high, total)
        return Sum(high, low, self.grid)


def _round(p: Array, grid: Float[Array, ""]) -> Array:
    """`p` (if complex, both its parts) rounded to multiples of the last bit of `grid`."""
    grid = lax.complex(grid, grid) if is_complex(p) else grid
    return (p + grid) - grid


def _rounding_error(a: Array, b: Array, total: Array) -> Array:
    """`(a + b) - total`, exactly, where `total` is the rounded sum. Has no derivative."""
    a, b, total = lax.stop_gradient((a, b, total))
    from_b = total - a
    return (a - (total - from_b)) + (b - from_b)


class LowPart(eqx.Module):
    """The fields of a `Sum` beyond `high`, as bits."""

    low: PyTree[Array]
    grid: PyTree[Array]

    @staticmethod
    def start(high: PyTree[Array], scale: PyTree[Float[Array, ""]]) -> "LowPart":
        """For a `Sum` that begins at `high`, whose entries are as large as `scale`."""

        def grid(scale):
            precision = jnp.finfo(scale.dtype).nmant + 1
            unit = 2.0 ** (precision - 1 - 7 * precision // 4)
            return scale * jnp.asarray(unit, scale.dtype)

        low = jtu.tree_map(jnp.zeros_like, high)
        grid = jtu.tree_map(grid, lax.stop_gradient(scale))
        return LowPart(*to_bits((low, grid)))

    @staticmethod
    def split(total: Sum) -> tuple[PyTree[Array], "LowPart | None"]:
        """The inverse of `join`."""
        if total.low is None:
            return total.high, None
        return total.high, LowPart(*to_bits((total.low, total.grid)))

    @staticmethod
    def join(high: PyTree[Array], low_part: "LowPart | None") -> Sum:
        if low_part is None:
            return Sum(high, None, None)
        like = high, jtu.tree_map(real_like, high)
        low, grid = from_bits((low_part.low, low_part.grid), like)
        return Sum(high, low, grid)
