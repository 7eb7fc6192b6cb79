"""Entries of a state that rest at their initial value until they are set off."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, SolverState, Y


_never = 1 << 30
_States = tuple[Y, SolverState]


class Rest(eqx.Module):
    """How long each entry of the state and the solver state kept its initial value, to the
    last bit.

    A solve may begin at a kink of the vector field, or at a guarded quotient of zero over
    zero: a concentration is zero until an infusion, a hidden state until an input arrives.
    A reconstructed entry is off by rounding, and may be on either side. An entry at rest is
    known to be on neither.

    - `moved`: `2 n` for entries that first moved in the `n`-th step, counted from zero, and
        `2 n - 1` for those that a restart or a jump changed just before it.
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
        """Record which entries changed from `before` to `after`, if `pred`."""
        when = jnp.asarray(when, jnp.int32)

        def update(moved, before, after):
            changed = pred & (before != after)
            return jnp.where(changed, jnp.minimum(moved, when), moved)

        before, after = (eqx.filter(s, eqx.is_inexact_array) for s in (before, after))
        return type(self)(jtu.tree_map(update, self.moved, before, after))

    def moving(self, when: IntScalarLike, x: _States) -> _States:
        """`x` at the entries that were set off at `when`, and zero elsewhere."""
        x = eqx.filter(x, eqx.is_inexact_array)
        return jtu.tree_map(lambda m, x: jnp.where(m == when, x, 0), self.moved, x)

    def settle(self, when: IntScalarLike, states: _States, start: _States) -> _States:
        """Reconstructed states, with entries at rest replaced by those at the `start`."""

        def choose(moved, x, start):
            return x if moved is None else jnp.where(moved >= when, start, x)

        is_none = lambda x: x is None
        return jtu.tree_map(choose, self.moved, states, start, is_leaf=is_none)

    def ends(self, when: IntScalarLike) -> BoolScalarLike:
        """Whether any entry is set off at `when`."""
        leaves = jtu.tree_leaves(self.moved)
        return jnp.array([jnp.any(moved == when) for moved in leaves]).any()
