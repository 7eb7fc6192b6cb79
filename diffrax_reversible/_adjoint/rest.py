"""Entries of a state that do not move until something sets them off."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, SolverState, Y


_never = 1 << 30
_States = tuple[Y, SolverState]


class Rest(eqx.Module):
    """For how long every entry of the state and the solver state stayed, to the last bit,
    what it was at the start of a solve.

    Solves begin where the vector field has a kink, or a quotient that is guarded where it
    is zero over zero: a concentration is zero until something is infused, a hidden state
    until an input arrives. A reconstructed state is off by rounding, and may be on the
    other side. Whoever knows how long an entry was at rest knows that it was on neither.

    - `moved`: for entries that moved in the `n`-th step, from zero on, `2 n`, and for those
        that were changed just before it, by a restart or at a jump, `2 n - 1`.
    """

    moved: PyTree[Int[Array, "..."]]

    @staticmethod
    def start(states: _States) -> "Rest":
        """With everything at rest."""
        states = eqx.filter(states, eqx.is_inexact_array)
        never = lambda x: jnp.full(jnp.shape(x), _never, jnp.int32)
        return Rest(jtu.tree_map(never, states))

    def during(
        self, when: IntScalarLike, before: _States, after: _States, pred: BoolScalarLike
    ) -> Self:
        """After something that may have changed the states, if it was made."""
        when = jnp.asarray(when, jnp.int32)

        def update(moved, before, after):
            changed = pred & (before != after)
            return jnp.where(changed, jnp.minimum(moved, when), moved)

        before, after = (eqx.filter(s, eqx.is_inexact_array) for s in (before, after))
        return type(self)(jtu.tree_map(update, self.moved, before, after))

    def moving(self, when: IntScalarLike, x: _States) -> _States:
        """Of the entries that were set off then, and zero of others."""
        x = eqx.filter(x, eqx.is_inexact_array)
        return jtu.tree_map(lambda m, x: jnp.where(m == when, x, 0), self.moved, x)

    def settle(self, when: IntScalarLike, states: _States, start: _States) -> _States:
        """Reconstructed states, with what was at rest as it was at the `start`."""

        def choose(moved, x, start):
            return x if moved is None else jnp.where(moved >= when, start, x)

        is_none = lambda x: x is None
        return jtu.tree_map(choose, self.moved, states, start, is_leaf=is_none)

    def ends(self, when: IntScalarLike) -> BoolScalarLike:
        """Whether any entry is set off then."""
        leaves = jtu.tree_leaves(self.moved)
        return jnp.array([jnp.any(moved == when) for moved in leaves]).any()
