"""Properties of a step size controller that its trace shows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController

from .._diffrax import State
from .._jaxpr import reads


def makes_jumps(
    controller: AbstractStepSizeController, solver, terms, args, init_state: State
) -> bool:
    """Whether steps can begin at a jump. As in Diffrax, a Python `False` in place of an
    array shows that they cannot."""
    y, t = init_state.y, jnp.asarray(init_state.tprev)
    _, _, _, made_jump, _, _ = eqx.filter_eval_shape(
        controller.adapt_step_size,
        *(t, t, y, y, args, y),
        solver.error_order(terms),
        init_state.controller_state,
    )
    return not (made_jump is False and init_state.made_jump is False)


def follows_state(
    controller: AbstractStepSizeController, solver, terms, args, init_state: State
) -> bool:
    """Whether the ends of steps have a derivative with respect to the state or `args`, as
    they have unless the controller detaches them by `jax.lax.stop_gradient`."""
    known, unknown = eqx.partition((init_state.y, args), eqx.is_inexact_array)
    t, state = jnp.asarray(init_state.tprev), init_state.controller_state

    def next_step(known):
        y, args = eqx.combine(known, unknown)
        adapt = controller.adapt_step_size
        _, *rest = adapt(t, t + 1, y, y, args, y, solver.error_order(terms), state)
        t0, t1, _, new_state, _ = rest
        return eqx.filter((t0, t1, new_state), eqx.is_inexact_array)

    def derivative(known, tangent):
        return jax.jvp(next_step, (known,), (tangent,))[1]

    used = reads(derivative, known, known)
    return any(used[len(used) // 2 :])


def varying_leaves(
    controller: AbstractStepSizeController, solver, terms, args, init_state: State
) -> tuple[bool, ...]:
    """Which leaves of its state a controller replaces, and does not return unchanged."""
    y, t = init_state.y, jnp.asarray(init_state.tprev)
    leaves, structure = jtu.tree_flatten(init_state.controller_state)

    def adapt(leaves):
        state = jtu.tree_unflatten(structure, leaves)
        step = t, t + 1, y, y, args, y, solver.error_order(terms), state
        return jtu.tree_leaves(controller.adapt_step_size(*step)[4])

    if not all(map(eqx.is_array, leaves)):
        return (True,) * len(leaves)
    jaxpr = jax.make_jaxpr(adapt)(leaves).jaxpr
    pairs = zip(jaxpr.invars, jaxpr.outvars, strict=True)
    return tuple(new is not old for old, new in pairs)
