"""The attempted steps of a solve."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from diffrax import AbstractStepSizeController
from jaxtyping import Bool, Float


class Attempts(NamedTuple):
    """All attempted steps of a solve, as in `Explanation.attempts`.

    - `start`, `end`: the times of their ends, in the order of their starts.
    - `accepted`: false for rejected steps.
    """

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

    @property
    def span(self) -> tuple[float, float]:
        """The first time, and the last that accepted steps have reached."""
        first = self.start[0]
        reached = np.append(self.end[self.accepted], first)
        return float(first), float(reached[np.argmax(np.abs(reached - first))])

    def densest(self, accepted: bool) -> tuple[int, float, float]:
        """The tenth of the `span` in which most of the `accepted`, or of the rejected,
        steps start: their number, and its ends."""
        first, last = self.span
        start = self.start[self.accepted == accepted]
        length = last - first
        place = np.zeros_like(start) if length == 0 else 10 * (start - first) / length
        tenths = np.clip(np.nan_to_num(place), 0, 9).astype(int)
        counts = np.bincount(tenths, minlength=10)
        most = int(np.argmax(counts))
        ends = first + length * np.array([most, most + 1]) / 10
        return int(counts[most]), float(ends[0]), float(ends[1])

    def time(self, t: float) -> str:
        """A time in as many digits as tell a hundredth of the `span`."""
        first, last = self.span
        length, largest = abs(last - first), max(abs(first), abs(last))
        more = math.ceil(math.log10(largest / length)) if length > 0 else 0
        # A sum with zero has no negative zero.
        return f"{t + 0.0:.{3 + max(more, 0)}g}"


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
