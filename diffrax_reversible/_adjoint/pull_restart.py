"""Pulling a cotangent back through a restart."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp

from .._custom_types import BoolScalarLike, RealScalarLike, SolverState, Y
from .._solver.capabilities import CanRestart
from .._solver.pullback import Cotangent, HasProbe, Probe
from .._tree import tree_add
from .growth import Growth
from .walk import Walk


def pull_restart(
    walk: Walk, t: RealScalarLike, y: Y, solver_state: SolverState, ct: Cotangent
) -> Cotangent:
    """The cotangent before a restart at a state, from the one after it."""
    solver = walk.problem.solver
    assert isinstance(solver, CanRestart)
    diff_state, nondiff_state = eqx.partition(solver_state, eqx.is_inexact_array)

    def restart(y, diff_state, params):
        context = walk.context(params)
        state = eqx.combine(diff_state, nondiff_state)
        state = solver.restart(context.terms, context.times.of(t), y, context.args, state)
        return eqx.filter(state, eqx.is_inexact_array)

    _, pull = eqx.filter_vjp(restart, y, diff_state, walk.params)
    y_bar, state_bar, params_bar = pull(ct.solver_state)
    return Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))


def restart_cotangent(
    walk: Walk,
    t: RealScalarLike,
    y: Y,
    solver_state: SolverState,
    ct: Cotangent,
    growth: Growth,
    probe: Probe,
    restarted: BoolScalarLike,
) -> tuple[Cotangent, Growth]:
    """Pull back through a restart that the solve has not made, if the second approximation
    would otherwise spoil the cotangent, see `Growth`.

    - `restarted`: whether the solve has made one.
    """
    solver = walk.problem.solver
    if not walk.cures:
        return ct, growth
    assert isinstance(solver, HasProbe) and solver.departure is not None

    def pull(carry):
        ct, growth, _ = carry
        ct = pull_restart(walk, t, y, solver_state, ct)
        return ct, growth.restarted(), jnp.array(False)

    spoils = growth.spoils(probe, solver.departure) & jnp.logical_not(restarted)
    # A loop of at most one iteration: under `vmap` it runs only if an element needs it.
    carry = lax.while_loop(lambda carry: carry[2], pull, (ct, growth, spoils))
    return carry[:2]
