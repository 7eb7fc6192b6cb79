"""Known states of a solve, from which the walk continues."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike, SolverState, Y
from .._diffrax import State
from .._tree import read_row, tree_select, write_row
from .packed import Packed


# Exceeds the number of any step.
_never = jnp.iinfo(jnp.int32).max


class Known(eqx.Module):
    """All that a solve continues from: after a step, and before a restart or a jump.

    - `controller_state`: the varying leaves of the controller state.
    - `step`: the number of steps so far.
    - `t`, `next_t`: the ends of the next step, as first attempted.
    - `last_end`: the end of the last step.
    """

    y: Y
    solver_state: SolverState
    controller_state: PyTree
    t: RealScalarLike
    next_t: RealScalarLike
    last_end: RealScalarLike
    made_jump: BoolScalarLike
    step: IntScalarLike

    @staticmethod
    def of(state: State, last_end: RealScalarLike, varying: tuple[bool, ...]) -> "Known":
        """From a `state` whose leaves are all arrays."""
        leaves, structure = jtu.tree_flatten(state.controller_state)
        leaves = [x if v else None for x, v in zip(leaves, varying, strict=True)]
        return Known(
            state.y,
            state.solver_state,
            jtu.tree_unflatten(structure, leaves),
            state.tprev,
            state.tnext,
            last_end,
            state.made_jump,
            jnp.asarray(state.num_accepted_steps),
        )

    def resume(self, state: State) -> State:
        """`state`, with the values of the known state."""
        controller_state = eqx.combine(self.controller_state, state.controller_state)
        return dataclasses.replace(
            state,
            y=self.y,
            solver_state=self.solver_state,
            controller_state=controller_state,
            tprev=self.t,
            tnext=self.next_t,
            made_jump=self.made_jump,
            num_accepted_steps=self.step,
        )

    def pack(self) -> tuple[Packed, Packed]:
        """All but the times, and these apart, as they may not be differentiated."""
        return Packed.of(self._without_times()), Packed.of(self._times())

    def unpack(self, packed: tuple[Packed, Packed]) -> "Known":
        """What was packed, with the structure of this state."""
        rest = packed[0].unpack(self._without_times())
        t, next_t, last_end = packed[1].unpack(self._times())
        return dataclasses.replace(rest, t=t, next_t=next_t, last_end=last_end)

    def _times(self) -> tuple[RealScalarLike, ...]:
        return self.t, self.next_t, self.last_end

    def _without_times(self) -> "Known":
        return dataclasses.replace(self, t=None, next_t=None, last_end=None)

    @property
    def bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(self))


class _New(NamedTuple):
    """A state to hold, see `Checkpoints.hold`."""

    step: Int[Array, ""]
    restarts: Bool[Array, ""]
    end: IntScalarLike
    prefer_restarts: BoolScalarLike
    needed: BoolScalarLike


class Checkpoints(eqx.Module):
    """A bounded number of known states.

    - `rows`: the states, in any order.
    - `steps`: the number of steps before each, in increasing order; `_never` for rows that
        are empty.
    - `restarts`: whether the solve was restarted there, which cannot be undone.
    - `places`: the row of each, in the order of `steps`.
    """

    rows: tuple[Packed, Packed]
    steps: Int[Array, " capacity"]
    restarts: Bool[Array, " capacity"]
    places: Int[Array, " capacity"]

    @property
    def capacity(self) -> int:
        return self.restarts.shape[0]

    @staticmethod
    def allocate(capacity: int, like: Known) -> "Checkpoints":
        row = jax.eval_shape(Known.pack, like)
        rows = jtu.tree_map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
        steps = jnp.full(capacity, _never, jnp.result_type(like.step))
        return Checkpoints(rows, steps, jnp.zeros(capacity, bool), jnp.arange(capacity))

    def hold(
        self,
        known: Known,
        restarts: BoolScalarLike,
        wanted: BoolScalarLike,
        end: IntScalarLike,
        prefer_restarts: BoolScalarLike,
        needed: BoolScalarLike,
    ) -> "Checkpoints":
        """Hold another state, if it is `wanted`, in place of the one with the least cost.

        The cost of dropping a state is the number of steps between its neighbours, as a
        fraction of the steps to the `end`, times the number of states from it to the end,
        whose rows are free by the time the walk arrives at it. With this rule, chosen by
        experiment, restarts in every step take no more replays than binomial checkpointing:
        2.0 times all steps for 76 of them and 4 states, 3.2 times for 1,000 and 8 states.

        With `prefer_restarts`, evenly spread states are dropped before those of restarts.

        **Arguments:**

        - `known`: the state, which may not precede a live one.
        - `end`: the step where the walk begins. States before it are live.
        - `needed`: whether `known` itself must not be dropped.
        """
        if self.capacity == 0:
            return self
        new = _New(
            *(jnp.asarray(known.step), jnp.asarray(restarts)),
            *(end, prefer_restarts, needed),
        )
        order = self.steps, self.restarts, self.places
        # A conditional keeps XLA from repeating all this for every array that is written.
        order, i, wanted = lax.cond(
            eqxi.unvmap_any(wanted),
            lambda: self._place(new, wanted),
            lambda: (order, jnp.array(0), jnp.array(False)),
        )
        return Checkpoints(write_row(self.rows, i, known.pack(), wanted), *order)

    def _place(
        self, new: _New, wanted: BoolScalarLike
    ) -> tuple[tuple[Array, Array, Array], IntScalarLike, BoolScalarLike]:
        """The `steps`, `restarts` and `places` with those of the `new` state, the row to
        hold it in, and whether it is held at all."""
        index = jnp.arange(self.capacity)
        live = jnp.sum(self.steps < new.end)
        full = live == self.capacity
        dropped = lax.cond(
            eqxi.unvmap_any(full & wanted), lambda: self._cheapest(new), lambda: live
        )
        dropped = jnp.where(full, dropped, live)
        # A replay begins at a state that is held already.
        wanted = wanted & (dropped < self.capacity) & jnp.logical_not(self.held(new.step))
        place = self.places[jnp.minimum(dropped, self.capacity - 1)]
        last = jnp.where(full, self.capacity - 1, live)

        def replace(last_one, olds):
            later = jnp.where(full & (index >= dropped), jnp.roll(olds, -1), olds)
            return jnp.where(wanted, jnp.where(index == last, last_one, later), olds)

        order = replace(new.step, self.steps), replace(new.restarts, self.restarts)
        return (*order, replace(place, self.places)), place, wanted

    def _cheapest(self, new: _New) -> IntScalarLike:
        """The state to drop, in the order of `steps`, where all are live. The last one is
        the `new` state."""
        steps = jnp.append(self.steps, new.step)
        spread = jnp.logical_not(jnp.append(self.restarts, new.restarts))
        index = jnp.arange(len(steps))
        before = jnp.where(index == 0, 0, jnp.roll(steps, 1))
        after = jnp.where(index == self.capacity, new.end, jnp.roll(steps, -1))
        gap, to_end = after - before, jnp.maximum(new.end - steps, 1)
        follow = len(steps) - index
        cost = (follow * gap).astype(jnp.float32) / to_end.astype(jnp.float32)
        evenly = gap.astype(jnp.float32) * jnp.float32(1e-9)
        cost = jnp.where(new.prefer_restarts & spread, evenly, cost)
        kept = new.needed & (index == self.capacity)
        return jnp.argmin(jnp.where(kept, jnp.inf, cost))

    def before(self, step: IntScalarLike, start: Known) -> Known:
        """The last known state before a `step`, which may be the `start`."""
        if self.capacity == 0:
            return start
        count = jnp.sum(self.steps < step)
        place = self.places[jnp.maximum(count - 1, 0)]
        row = tree_select(count > 0, read_row(self.rows, place), start.pack())
        return start.unpack(row)

    def step_before(self, step: IntScalarLike) -> IntScalarLike:
        """The step of the last known state before a `step`."""
        steps = jnp.where(self.steps < step, self.steps, 0)
        return jnp.max(steps, initial=0)

    def held(self, step: IntScalarLike) -> BoolScalarLike:
        """Whether the state after exactly `step` steps is known."""
        return jnp.any(self.steps == step) | (step == 0)
