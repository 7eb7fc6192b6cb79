"""The density of steps, and its evolution from one step to the next."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import Args, BoolScalarLike, RealScalarLike, Y
from .._exact_sum import LowPart, Sum
from .._isolated import isolated
from .._precision import eps, tiny
from .._tree import tree_select


# The largest ratio of two successive densities, before `_soften`.
_max_ratio = 4


class Closed(eqx.Module):
    """A function of time, state and arguments that returns scalars.

    Its only leaves are the arrays that it closes over, so that a loop can carry it.
    """

    consts: list[Array]
    jaxpr: jex.Jaxpr = eqx.field(static=True)
    # Which leaves of `args` may have another value when a solve is continued.
    varies: Callable[[Any], bool] = eqx.field(static=True)

    @staticmethod
    def close(fn: Callable, t: RealScalarLike, y: Y, args: Args) -> "Closed":
        try:
            return Closed._trace(fn, t, y, args, _is_number)
        except jax.errors.ConcretizationTypeError:
            # A Python number that decides what is computed stays what it is.
            return Closed._trace(fn, t, y, args, eqx.is_array)

    @staticmethod
    def _trace(
        fn: Callable, t: RealScalarLike, y: Y, args: Args, varies: Callable[[Any], bool]
    ) -> "Closed":
        arrays, others = eqx.partition(args, varies)
        closed = jax.make_jaxpr(lambda t, y, a: fn(t, y, eqx.combine(a, others)))(
            t, y, arrays
        )
        consts = [jnp.asarray(const) for const in closed.consts]
        return Closed(lax.stop_gradient(consts), closed.jaxpr, varies)

    def evaluate(self, t: RealScalarLike, y: Y, args: Args) -> list[Float[Array, ""]]:
        """The scalars, compiled separately so that they round alike in both passes."""
        closed = jex.ClosedJaxpr(self.jaxpr, self.consts)
        leaves = jtu.tree_leaves((y, eqx.filter(args, self.varies)))
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        return isolated(jex.jaxpr_as_fun(closed), *lax.stop_gradient((t, *leaves)))


def _is_number(x: Any) -> bool:
    """Whether `x` is a number or an array."""
    return eqx.is_array(x) or eqx.is_inexact_array_like(x)


class StepDensityState(eqx.Module):
    """The state of a `StepDensityController`.

    - `density`: one over the length of the current step.
    - `low`: the low part of the density, which is summed as in `ALF4(compensated=True)`.
    - `time_unit`: steps end at multiples of it.
    - `wish`: one over the desired step size, and its rate, as functions of the time, the
        state and `args`.
    """

    density: Float[Array, ""]
    low: LowPart
    time_unit: Float[Array, ""]
    wish: Closed

    def step(self) -> Float[Array, ""]:
        """The length of the step, at least one unit so that time advances."""
        return jnp.maximum(to_unit(1 / self.density, self.time_unit), self.time_unit)

    def start(self, t: RealScalarLike, y: Y, args: Args) -> "StepDensityState":
        """The state for the first step, which begins at `(t, y)`."""
        wished, rate, _ = self._evaluate(t, y, args)
        start = self._sum()
        return self._at(_soften(_limit(start.plus(rate / 2), start), wished))

    def cross(
        self, t: RealScalarLike, y: Y, args: Args
    ) -> tuple["StepDensityState", BoolScalarLike]:
        """The state for the step after `(t, y)`, from that for the step before it, and
        whether the solve can go on: whether the desired step size is a positive number."""
        wished, rate, can_go_on = self._evaluate(t, y, args)
        old = self._sum()
        return self._at(_soften(_limit(old.plus(rate), old), wished)), can_go_on

    def cross_back(self, t: RealScalarLike, y: Y, args: Args) -> "StepDensityState":
        """The inverse of `cross`."""
        wished, rate, _ = self._evaluate(t, y, args)
        new = _harden(self._sum(), wished)
        return self._at(_limit(new.minus(rate), new))

    def _evaluate(self, t: RealScalarLike, y: Y, args: Args) -> list[Array]:
        wished, rate = self.wish.evaluate(t, y, args)
        finite = (jnp.where(jnp.isfinite(x), x, 0) for x in (wished, rate))
        return [*finite, jnp.isfinite(wished)]

    def _sum(self) -> Sum:
        return LowPart.join(self.density, self.low)

    def _at(self, total: Sum) -> "StepDensityState":
        density, low = LowPart.split(total)
        assert low is not None
        return StepDensityState(density, low, self.time_unit, self.wish)


def unit_of(largest: Float[Array, ""]) -> Float[Array, ""]:
    """The spacing of floats as large as `largest`, rounded up to a power of two."""
    _, exponent = jnp.frexp(largest)
    return jnp.maximum(
        jnp.ldexp(jnp.asarray(eps(largest), largest.dtype), exponent), tiny(largest)
    )


def to_unit(t: RealScalarLike, unit: Float[Array, ""]) -> Float[Array, ""]:
    """The nearest multiple of `unit`."""
    return jnp.round(t / unit) * unit


def _limit(new: Sum, old: Sum) -> Sum:
    """`new`, limited to a factor of `_max_ratio` from `old`.

    That is `x -> min(max(x + G, x/4), 4x)`, which increases with `x`. Its inverse is the
    same function with `-G` in place of `G`: the inverse of a maximum of increasing
    functions is the minimum of their inverses.
    """
    for ratio, beyond in ((1 / _max_ratio, jnp.less), (_max_ratio, jnp.greater)):
        assert old.low is not None
        limit = Sum(old.high * ratio, old.low * ratio, old.grid)
        new = tree_select(beyond(new.high, limit.high), limit, new)
    return new


def _soften(total: Sum, wished: Float[Array, ""]) -> Sum:
    """Raise densities below half of the desired one, where `x < 1`, to
    `(1 + 1/(3 - 2x))/2`.

    That joins the identity smoothly at `x = 1`, and is at least a half.
    """
    x = total.high / (wished / 2)
    return tree_select(
        x < 1, _rounded((1 + 1 / (3 - 2 * x)) / 2 * (wished / 2), total), total
    )


def _harden(total: Sum, wished: Float[Array, ""]) -> Sum:
    """The inverse of `_soften`."""
    x = total.high / (wished / 2)
    # Close to a half the inverse is unbounded. `_limit` bounds the result.
    excess = jnp.maximum(2 * x - 1, eps(x))
    return tree_select(x < 1, _rounded((3 - 1 / excess) / 2 * (wished / 2), total), total)


def _rounded(x: Float[Array, ""], total: Sum) -> Sum:
    return Sum(x, jnp.zeros_like(x), total.grid)
