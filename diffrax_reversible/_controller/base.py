"""The contract of a step-size controller whose steps can be recomputed."""

import abc
from typing import Generic, TypeVar

from diffrax import AbstractStepSizeController

from .._custom_types import Args, RealScalarLike, Y


_ControllerState = TypeVar("_ControllerState")
_Dt0 = TypeVar("_Dt0", bound=RealScalarLike | None)


class AbstractReversibleStepSizeController(
    AbstractStepSizeController[_ControllerState, _Dt0], Generic[_ControllerState, _Dt0]
):
    """A step-size controller that can compute the start of a step from its end.

    Subclass it for a controller of your own that needs no record. `ReversibleAdjoint`
    records the steps of other controllers, but not those of this kind: the memory of a
    gradient does not depend on the number of steps, and gradients work with
    `diffeqsolve(..., max_steps=None)`.

    Every step has to begin where the last one ended, so jumps are not supported. The
    controller state must not depend on rejected steps. Gradients must not pass through the
    controller state, and must pass through the returned times only from the ends of the
    last step.
    """

    @abc.abstractmethod
    def inverse(
        self,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        controller_state: _ControllerState,
    ) -> tuple[RealScalarLike, _ControllerState]:
        """Undo `adapt_step_size`.

        **Arguments:**

        - `t1`: the end of a step.
        - `y1`: the state at `t1`.
        - `args`: as in `diffrax.diffeqsolve`.
        - `controller_state`: the one at `t1`, which `adapt_step_size` returned after the
            step.

        **Returns:**

        The start of the step, and the controller state that `adapt_step_size` was given.
        The first and the last step of a solve may be shorter; for these the start is not
        used.
        """
