"""Recording where the accepted steps of a solve begin and end."""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._diffrax import State


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

    def buffers(self) -> list:
        """What `equinox.internal.while_loop` may update in place."""
        return [self.starts, self.ends]

    def append(self, before: State, after: State) -> "StepRecord":
        """Record the step from `before` to `after`, if it was accepted."""
        accepted = after.num_accepted_steps > before.num_accepted_steps

        # Its annotations are narrower than what it accepts.
        write = cast(Callable[..., Array], eqxi.buffer_at_set)
        return StepRecord(
            write(self.starts, self.count, before.tprev, pred=accepted),
            write(self.ends, self.count, before.tnext, pred=accepted),
            self.count + jnp.where(accepted, 1, 0),
        )
