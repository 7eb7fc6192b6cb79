"""The attempted steps of a solve."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from diffrax import AbstractStepSizeController
from jaxtyping import Bool, Float


class Attempts(NamedTuple):
    """All attempted steps, in the order of their starts. `accepted` is false for rejected
    steps."""

    start: Float[np.ndarray, " steps"]
    end: Float[np.ndarray, " steps"]
    accepted: Bool[np.ndarray, " steps"]

    @staticmethod
    def of(notes: list[tuple[float, float, bool]], direction: float) -> "Attempts":
        """From the notes of a `RecordingController`, whose time is `direction * t`."""
        table = np.array(sorted(notes), dtype=float).reshape(-1, 3)
        return Attempts(direction * table[:, 0], direction * table[:, 1], table[:, 2] == 1)

    @property
    def sizes(self) -> Float[np.ndarray, " steps"]:
        return np.abs(self.end - self.start)


class RecordingController(AbstractStepSizeController):
    """Wraps a controller, and notes every attempted step."""

    controller: AbstractStepSizeController
    note: Callable[[tuple[float, float, bool]], None] = eqx.field(static=True)

    def wrap(self, direction):
        return RecordingController(self.controller.wrap(direction), self.note)

    def init(self, *args, **kwargs):
        return self.controller.init(*args, **kwargs)

    def adapt_step_size(self, t0, t1, *args, **kwargs):
        out = self.controller.adapt_step_size(t0, t1, *args, **kwargs)
        on_host = lambda *step: self.note((float(step[0]), float(step[1]), bool(step[2])))
        jax.debug.callback(on_host, t0, t1, out[0])
        return out
