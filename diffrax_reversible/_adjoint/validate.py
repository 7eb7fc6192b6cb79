"""The errors of `ReversibleAdjoint`, one message for each condition."""

import equinox.internal as eqxi
from diffrax import (
    AbstractStepSizeController,
    ClipStepSizeController,
    PIDController,
    StepTo,
)
from jaxtyping import PyTree

from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import Terms
from .._diffrax import is_unsafe_sde


call = "`diffeqsolve(..., adjoint=ReversibleAdjoint())`"
_remedy = "Use `adjoint=RecursiveCheckpointAdjoint()`"


def check_supported(terms: Terms) -> None:
    """Raise an error for terms whose steps cannot be undone."""
    if is_unsafe_sde(terms):
        raise ValueError(
            f"{call} cannot undo steps along an `UnsafeBrownianPath`, which gives another "
            "sample each time. Use `diffrax.VirtualBrownianTree`."
        )


torn_steps = (
    f"{call}: a step did not begin where the last one had ended, although the "
    "`stepsize_controller` said that there was no jump between them. Let its "
    "`adapt_step_size` return `made_jump=True`, or the end of the last step."
)

hidden_closure = (
    f"{call}: a function that is not visible as a leaf of a term of your own, such as a "
    "static field, closes over traced values, and their gradient would be lost. Pass them "
    "through `args`, as fields of the term, or use an `ODETerm`."
)

hidden_in_call = (
    f"{call}: a vector field that closes over traced values was called in another way than "
    "when the solver was first traced, and their gradient would be lost. Pass them through "
    "`args`."
)

hidden_in_controller = (
    f"{call}: the `stepsize_controller` computes its steps backwards, and a function of it "
    "that is not visible as a leaf, such as a static field, closes over traced values. "
    "Make them fields of the controller."
)

forward_mode = (
    f"{call} is for reverse mode, and `jax.jvp` or `jax.jacfwd` asked for forward "
    "mode. Use reverse mode, as `jax.jacrev`, or `options=dict(jac='bwd')` in Optimistix; "
    "or `adjoint=diffrax.ForwardMode()`; for the Jacobian of a root find through "
    "which reverse mode goes, `diffrax.DirectAdjoint()`; for second derivatives, forward "
    "mode over reverse mode, as in `jax.jvp(jax.grad(...), ...)`."
)


def steps_move_with(controller: AbstractStepSizeController) -> tuple[bool, bool]:
    """Whether the interior ends of steps may have a derivative with respect to `t0`, and to
    `t1`. Under unknown controllers they may."""
    while isinstance(controller, ClipStepSizeController):
        controller = controller.controller
    if isinstance(controller, StepTo):
        return False, False
    recomputed = isinstance(controller, AbstractReversibleStepSizeController)
    return True, not (recomputed or isinstance(controller, PIDController))


first_step_alone = (
    f"{call} does not give gradients with respect to `dt0` alone, as it holds steps fixed, "
    f"so that they would be zero. {_remedy}, or hold `dt0` fixed with "
    "`jax.lax.stop_gradient`."
)

moving_steps = (
    f"{call} ignores how steps depend on times, so it has no gradients with respect to "
    "`t0`, `t1` or `dt0`, or times that the controller steps to, of outputs at the end of "
    "a step, by `SaveAt(steps=...)` or at an `Event` that is Boolean or has no "
    "`root_finder`. Save at times of your own by `SaveAt(ts=...)`, locate the event, "
    "prescribe all steps with `StepTo`, or detach these times with "
    f"`jax.lax.stop_gradient`. {_remedy} otherwise."
)


steps_that_follow_the_state = (
    f"{call} holds the ends of steps fixed. With this `stepsize_controller` they depend on "
    "the state, so it has no gradients of outputs at the end of a step, by "
    "`SaveAt(steps=...)` or at an `Event` that is Boolean or has no `root_finder`. Save at "
    "times of your own by `SaveAt(ts=...)` or, if the derivative of the steps is not "
    "wanted, let `adapt_step_size` detach them with `jax.lax.stop_gradient`. "
    f"{_remedy} otherwise."
)


collective_outside = (
    f"{call}: the vector field, the controller or `SaveAt(fn=...)` communicates between "
    "members of a `jax.vmap(..., axis_name=...)`, as `jax.lax.pmean` does. JAX cannot "
    "differentiate the batch as a whole then. Differentiate within the batch, by "
    "`jax.vmap(jax.grad(...), axis_name=...)`, or use `adjoint=diffrax.DirectAdjoint()`."
)


def hold_fixed(x: PyTree, name: str) -> PyTree:
    """Raise an error if `x` is differentiated: dropping its gradient would be silent."""
    return eqxi.nondifferentiable(
        x,
        msg=(
            f"{call} does not give gradients with respect to {name} yet. {_remedy}, or "
            "hold it fixed with `jax.lax.stop_gradient`."
        ),
    )


def hold_times_fixed(x: PyTree) -> PyTree:
    """Raise an error if a gradient is differentiated along the times `x`, as it ignores
    that steps depend on them."""
    return eqxi.nondifferentiable(
        x,
        msg=(
            f"{call} does not give the derivatives of gradients along `t0`, `t1`, `dt0`, "
            "`SaveAt(ts=...)` or times that the controller steps to, as "
            "`jax.jvp(jax.grad(...), ...)` and `jax.hessian(...)` ask for. Use "
            "`adjoint=diffrax.DirectAdjoint()`, or hold times fixed with "
            "`jax.lax.stop_gradient`."
        ),
    )


def differentiate_once(x: PyTree) -> PyTree:
    """Raise an error if `x`, part of a gradient, is differentiated in reverse mode."""
    return eqxi.nondifferentiable_backward(
        x,
        msg=(
            f"{call}: a gradient cannot be differentiated again in reverse mode, as in "
            "`jax.grad(jax.grad(...))`. For second derivatives use forward mode over "
            "reverse mode, as `jax.jvp(jax.grad(...), ...)` and `jax.hessian(...)` do, or "
            "use `adjoint=diffrax.DirectAdjoint()`."
        ),
    )
