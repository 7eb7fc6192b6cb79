"""Pulling a cotangent back through what happens to the solver state between two steps."""

from collections.abc import Callable

import equinox as eqx

from .._custom_types import BoolScalarLike, SolverState, Y
from .._members import value_and_pullback
from .._solver.cotangent import Cotangent
from .._tree import tree_add, tree_select
from .problem import Context
from .walk import Walk


def pull_change(
    walk: Walk,
    change: Callable[[Context, Y, SolverState], SolverState],
    y: Y,
    solver_state: SolverState,
    ct: Cotangent,
    pred: BoolScalarLike = True,
) -> tuple[SolverState, Cotangent]:
    """The floating-point arrays of the solver state after a `change` of it, and the
    cotangent before that, if this element of a batch has it.

    - `change`: the next solver state, as a function of the context, `y` and `solver_state`.
    - `ct`: the cotangent after the change.
    """
    diff_state, nondiff_state = eqx.partition(solver_state, eqx.is_inexact_array)

    def changed(y, diff_state, params):
        state = eqx.combine(diff_state, nondiff_state)
        return eqx.filter(change(walk.context(params), y, state), eqx.is_inexact_array)

    inputs, bar = (y, diff_state, walk.params), ct.where(pred).solver_state
    state, pulled = value_and_pullback(changed, inputs, bar)
    y_bar, state_bar, params_bar = pulled
    state_bar = tree_select(pred, state_bar, ct.solver_state)
    params_bar = tree_add(ct.params, params_bar)
    return state, Cotangent(tree_add(ct.y, y_bar), state_bar, params_bar)
