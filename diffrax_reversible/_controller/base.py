"""The contract of a step-size controller of which the steps can be recomputed."""

import abc
from typing import Generic, TypeVar

from diffrax import AbstractStepSizeController

from .._custom_types import Args, RealScalarLike, Y


_ControllerState = TypeVar("_ControllerState")
_Dt0 = TypeVar("_Dt0", bound=RealScalarLike | None)


class AbstractReversibleStepSizeController(
    AbstractStepSizeController[_ControllerState, _Dt0], Generic[_ControllerState, _Dt0]
):
    """A step-size controller that can tell from the end of a step where it began.

    Of the steps of others [`diffrax_reversible.ReversibleAdjoint`][] keeps a record. Of
    these it keeps none: gradients take memory that does not depend on the number of steps,
    and work with `diffeqsolve(..., max_steps=None)`.

    Steps have to begin where the last one ended, that is jumps are not supported. The
    controller state must not depend on steps that were rejected, and no gradient may pass
    through it, nor through the times that are returned, other than from the ends of the
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
        - `y1`: the state there.
        - `args`: as [`diffrax.diffeqsolve`][].
        - `controller_state`: at `t1`, that is what `adapt_step_size` returned after the
            step.

        **Returns:**

        The start of the step, and the controller state that `adapt_step_size` was given.
        The first and the last step of a solve may be shorter; for these the start is not
        used.
        """
