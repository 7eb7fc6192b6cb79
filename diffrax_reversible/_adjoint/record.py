"""Recording where the accepted steps of a solve begin and end."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from diffrax import AbstractStepSizeController, RESULTS
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import (
    Args,
    BoolScalarLike,
    IntScalarLike,
    RealScalarLike,
    Terms,
    VF,
    Y,
)


class StepRecord(eqx.Module):
    """Both ends of every accepted step: two times a step, whatever the state.

    They are the very floats that the solver was called with. The end of one step and the
    start of the next may differ, so both are kept.
    """

    starts: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    ends: eqxi.MaybeBuffer[Float[Array, " max_steps"]]
    count: Int[Array, ""]

    @staticmethod
    def allocate(max_steps: int, dtype) -> "StepRecord":
        times = jnp.zeros(max_steps, dtype)
        return StepRecord(times, times, jnp.array(0))

    def append(
        self, t0: RealScalarLike, t1: RealScalarLike, keep_step: BoolScalarLike
    ) -> "StepRecord":
        # Its annotations are narrower than what it accepts.
        write = cast(Callable[..., Array], eqxi.buffer_at_set)
        return StepRecord(
            write(self.starts, self.count, t0, pred=keep_step),
            write(self.ends, self.count, t1, pred=keep_step),
            self.count + jnp.where(keep_step, 1, 0),
        )


class RecordedState(eqx.Module):
    """State of a `RecordingController`."""

    inner: PyTree[Any]
    record: StepRecord


class RecordingController(AbstractStepSizeController[RecordedState, Any]):
    """Makes the steps of another controller, and records those that it accepts.

    The record lives in the state of the controller since Diffrax, which copies the state
    of the solver at every step, leaves that to the controller.
    """

    controller: AbstractStepSizeController
    max_steps: int = eqx.field(static=True)

    def wrap(self, direction: IntScalarLike) -> "RecordingController":
        return RecordingController(self.controller.wrap(direction), self.max_steps)

    def init(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        dt0: RealScalarLike | None,
        args: Args,
        func: Callable[[Terms, RealScalarLike, Y, Args], VF],
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, RecordedState]:
        tnext, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        record = StepRecord.allocate(self.max_steps, jnp.result_type(t0))
        return tnext, RecordedState(inner, record)

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike,
        controller_state: RecordedState,
    ) -> tuple[
        BoolScalarLike,
        RealScalarLike,
        RealScalarLike,
        BoolScalarLike,
        RecordedState,
        RESULTS,
    ]:
        keep_step, tprev, tnext, made_jump, inner, result = self.controller.adapt_step_size(
            t0,
            t1,
            y0,
            y1_candidate,
            args,
            y_error,
            error_order,
            controller_state.inner,
        )
        if made_jump is not False:
            raise NotImplementedError(
                "`diffeqsolve(..., adjoint=ReversibleAdjoint())` does not support jumps "
                "in the vector field yet, as made by `ClipStepSizeController("
                "jump_ts=...)`. Use `adjoint=RecursiveCheckpointAdjoint()`, or split the "
                "solve at the jump."
            )
        record = controller_state.record.append(t0, t1, keep_step)
        return (
            keep_step,
            tprev,
            tnext,
            made_jump,
            RecordedState(inner, record),
            result,
        )
