"""The times that a solve is differentiated with respect to."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, ClipStepSizeController, StepTo
from jaxtyping import Array, Bool, Float

from .._custom_types import RealScalarLike
from .._precision import eps, tiny


class Times(eqx.Module):
    """The times that a solve is differentiated with respect to.

    Everything else uses the copies in `Problem`, which are held fixed.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    # The times of every `SubSaveAt`, in order.
    ts: tuple[Array | None, ...]
    # See `prescribed_times`. `None` if no gradient with respect to them is wanted.
    prescribed: tuple[Array | None, ...]

    def of(self, t: RealScalarLike) -> RealScalarLike:
        """`t`, an end of a step, with its derivative; or an array of them.

        An end of the solve has its own. Other ends would be constants, but move with the
        times that the controller was given, in proportion to the distance from those to
        either side. So the lengths of all steps in between change by the same fraction, and
        the many tiny ones before a jump of the vector field hardly matter. This reads all
        of these times in every step.
        """
        t = self._within(t)
        return jnp.where(t == self.t0, self.t0, jnp.where(t == self.t1, self.t1, t))

    def of_step(
        self, t0: RealScalarLike, t1: RealScalarLike
    ) -> tuple[RealScalarLike, RealScalarLike]:
        """As `of`, for both ends of a step. The first step has no length if the solve
        begins at the float before a jump: its end moves with the jump."""
        empty = (t0 == t1) & (t0 != self.t1)
        return self.of(t0), jnp.where(empty, self._within(t1), self.of(t1))

    def _within(self, t: RealScalarLike) -> RealScalarLike:
        """As `of`, for an end of a step that is no end of the solve."""
        t = jnp.asarray(t)
        given = [times.astype(t.dtype) for times in self.prescribed if times is not None]
        if len(given) == 0:
            return t
        given = jnp.concatenate(given)
        ends = lax.stop_gradient(jnp.stack([self.t0, self.t1])).astype(t.dtype)
        ends = jnp.where(_beside(ends, given), jnp.nan, ends)
        return t + _zero_that_moves(t, jnp.concatenate([ends, given]))


def constant_times(
    differentiated: tuple[Array | None, ...],
    others: tuple[Array | None, ...],
    like: RealScalarLike,
) -> tuple[Array | None, ...]:
    """The `others` that `Times.of` holds fixed: NaN where a differentiated one is as close
    as the ends of steps at a jump, which then move with that, and `None` if there are no
    differentiated ones."""
    dtype = jnp.result_type(like)
    moving = [x.astype(dtype) for x in differentiated if x is not None]
    if len(moving) == 0:
        return tuple(None for _ in others)
    moving = lax.stop_gradient(jnp.concatenate(moving))

    def hold(times):
        times = times.astype(dtype)
        return jnp.where(_beside(times, moving), jnp.nan, times)

    return tuple(None if times is None else hold(times) for times in others)


def _beside(x: Float[Array, " n"], times: Float[Array, " times"]) -> Bool[Array, " n"]:
    """Whether each `x` is at most a few floats from one of the `times`."""
    few = 4 * jnp.maximum(eps(x) * jnp.abs(x), tiny(x))
    return (jnp.abs(times[None] - x[:, None]) <= few[:, None]).any(axis=1)


def _zero_that_moves(t: Array, times: Float[Array, " times"]) -> Array:
    """Zero, with the derivative of a time `t` that divides the distance of those around it
    in a constant ratio. NaN stands for no time. `t` may be an array."""
    before, after = _around(t, times)
    # A given time may lie just after the start, and the end of the solve may be infinite.
    before = jnp.where(jnp.isfinite(before), before, after)
    length = jnp.where(jnp.isfinite(after), after - before, 0)
    ratio = lax.stop_gradient((t - before) / jnp.where(length == 0, 1, length))
    moves = before + ratio * length
    return moves - lax.stop_gradient(moves)


def _around(t: Array, times: Float[Array, " times"]) -> tuple[Array, Array]:
    """The last of the `times` that is at most `t`, and the first that is at least `t`, with
    their derivatives; infinite if there is none. Of equal times, any may have these."""
    if t.ndim == 0:
        before = jnp.max(jnp.where(times <= t, times, -jnp.inf))
        return before, jnp.min(jnp.where(times >= t, times, jnp.inf))
    # Comparing every `t` with all times would take a lot of memory.
    times = jnp.concatenate([jnp.sort(times), jnp.array([jnp.nan], times.dtype)])
    i = jnp.searchsorted(times, t, side="right") - 1
    before = jnp.where(i < 0, -jnp.inf, times[jnp.maximum(i, 0)])
    after = times[jnp.searchsorted(times, t, side="left")]
    return before, jnp.where(jnp.isnan(after), jnp.inf, after)


def prescribed_times(controller: AbstractStepSizeController) -> list[Array]:
    """The times that the user gave the controller, at which steps end."""
    if isinstance(controller, StepTo):
        given = [controller.ts]
    elif isinstance(controller, ClipStepSizeController):
        given = [controller.step_ts, controller.jump_ts]
        given += prescribed_times(controller.controller)
    else:
        given = []
    return [ts for ts in given if ts is not None]
