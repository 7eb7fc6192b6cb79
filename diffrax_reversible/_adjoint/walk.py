"""The walk over the steps of a solve, from the last to the first."""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any, cast

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    Params,
    RealScalarLike,
    SolverState,
    Terms,
    Y,
)
from .._solver.base import AbstractReversibleSolver
from .._solver.error_scales import error_scales
from .._solver.interrupted_solver import CanRestart
from .._solver.probe import Departure, HasProbe
from .._solver.pullback import HasPullbackFromStart
from .._tree import tree_add, tree_zeros_like
from .division import Division
from .drift import Drift, drifts
from .forward import Residuals
from .growth import Growth, Shares
from .outputs import Output
from .plan import Plan
from .position import longest_reach, params_of, Position
from .problem import Context, Problem
from .replay import Replayer
from .shared import Shared
from .spread import many, Spread


class Walk(eqx.Module):
    """The constants of the walk."""

    problem: Problem
    residuals: Residuals
    replayer: Replayer
    # The differentiated leaves of `Inputs.context`, and the rest.
    params: Params
    nondiff: Context
    differentiates_start: bool = eqx.field(static=True)
    # Whether the controls of terms are differentiated, and the solver takes them as given.
    differentiates_control: bool = eqx.field(static=True)
    # The accepted errors at known states, of the walk and of replays.
    drift_tol: float = eqx.field(static=True)
    replay_tol: float = eqx.field(static=True)
    # Called at every known state.
    watch: Callable[[dict[str, Any]], None] | None = eqx.field(static=True)
    # The axes of the batch, one for each `jax.vmap`.
    axes: tuple[Hashable, ...] = eqx.field(static=True)
    # What the members of a batch share of the `params`, whose cotangent is summed over the
    # batch in the end.
    summed: Shared | None = eqx.field(static=True)
    outputs: list[Output] = eqx.field(default_factory=list)
    dense_rows: DenseInfo | None = None
    # The cotangent of the interpolation data of the last step, if an event lies in it.
    end_dense: DenseInfo | None = None

    @property
    def shared(self) -> Shared | None:
        """As `summed`, if the cotangent is summed as it arises. All members then go on from
        known states at once, and if one has missed its own, all undo their last steps
        again. A few parameters take little memory, and `Spread` needs what each member has
        added."""
        return self.summed if many(self.params) else None

    @property
    def differentiates_times(self) -> bool:
        return len(jtu.tree_leaves(self.params.times)) > 0

    @property
    def makes_steps(self) -> bool:
        """Whether every step is made again from its start, and differentiated whole."""
        return self.differentiates_times or self.differentiates_control

    def combine(self, params: Params) -> tuple[Terms, Args]:
        context = self.context(params)
        return context.terms, context.args

    def context(self, params: Params) -> Context:
        """The context with these `params`, for differentiation with respect to them."""
        params = params if self.shared is None else self.shared.share(params)
        return eqx.combine(params, self.nondiff)

    def for_outputs(self, written: BoolScalarLike) -> "Walk":
        """The walk for the pull-back of an output: members of a batch for which none was
        `written` have what its function reads from one for which it was."""
        shared = self.shared
        assert shared is not None

        def lend(context, own):
            lent = shared.lend((own.args, own.save_fns), written)
            args, save_fns = eqx.combine(lent, (context.args, context.save_fns))
            return dataclasses.replace(context, args=args, save_fns=save_fns)

        params = lend(self.params, shared.unshared(self.params))
        nondiff = lend(self.nondiff, self.nondiff)
        return dataclasses.replace(self, params=params, nondiff=nondiff)

    @property
    def start_states(self) -> tuple[Y, SolverState]:
        return self.replayer.start.y, self.replayer.start.solver_state

    def settle(
        self, when: IntScalarLike, states: tuple[Y, SolverState]
    ) -> tuple[Y, SolverState]:
        """Reconstructed states, with entries at rest replaced by those at the start."""
        rest = self.residuals.kept.rest
        return states if rest is None else rest.settle(when, states, self.start_states)

    @property
    def with_dense(self) -> bool:
        return self.dense_rows is not None or self.end_dense is not None

    @property
    def replays(self) -> bool:
        """Whether the solve may have to be replayed."""
        rows, max_steps = self.residuals.record.rows, self.problem.max_steps
        forgets = rows is not None and (max_steps is None or max_steps > rows)
        return forgets or self.residuals.restartable or self.repeats

    @property
    def repeats(self) -> bool:
        """Whether steps are undone again, where the walk has missed a known state."""
        return self.residuals.kept.holds and math.isfinite(self.drift_tol)

    @property
    def shares_all(self) -> bool:
        """Whether only what the members of a batch share is differentiated."""
        if self.shared is None or self.differentiates_start:
            return False
        return all(jtu.tree_leaves(self.shared.flags))

    @property
    def pulls_from_start(self) -> bool:
        """Whether steps that cannot be undone are differentiated from their start."""
        return self.repeats and isinstance(self.problem.solver, HasPullbackFromStart)

    @property
    def stops(self) -> bool:
        """Whether a known state, or a gap in the record, may interrupt the walk."""
        return self.replays or self.residuals.kept.holds

    def start(self, position: Position, plan: Plan, division: Division) -> Position:
        """The position at the start of the walk, with all fields.

        - `plan`, `division`: see `Growth`.
        """
        if self.repeats:
            # What outputs have added so far is no part of the first segment, which may be
            # undone again.
            ct = position.cotangent
            zeros = dataclasses.replace(ct, params=tree_zeros_like(ct.params))
            position = dataclasses.replace(
                position, cotangent=zeros, params_cotangent=ct.params
            )
        if self.departure is not None:
            spread = None
            if not self.differentiates_start:
                spread = Spread.start(*params_of(position))
            growth = Growth.start(position.cotangent.y, plan, division, spread)
            position = dataclasses.replace(position, growth=growth)
        position = dataclasses.replace(
            position,
            reach=jnp.array(longest_reach),
            parted=jnp.array(0, jnp.float32),
            drift=jnp.array(0, jnp.float32),
            undone=jnp.array(0),
            replayed=jnp.array(0),
            waited=jnp.array(-1),
        )
        if self.residuals.kept.rest is not None:
            hidden = tree_zeros_like((position.y, position.solver_state))
            position = dataclasses.replace(position, hidden=hidden)
        if self.pulls_from_start:
            position = dataclasses.replace(position, from_start=jnp.array(False))
        return dataclasses.replace(position, origin=position.as_origin(self.repeats))

    def show_progress(self, position: Position, t: RealScalarLike) -> Position:
        """Step the progress meter to `t`."""
        end, t0 = self.residuals.end.tprev, self.problem.t0
        length = jnp.where(end == t0, 1, end - t0)
        progress = lax.stop_gradient(jnp.clip((end - t) / length, 0, 1))
        meter = self.problem.progress_meter.step(position.meter, progress)
        return dataclasses.replace(position, meter=meter)

    def tell(
        self,
        here: BoolScalarLike,
        position: Position,
        restarted: BoolScalarLike,
        miss: RealScalarLike,
        repeated: BoolScalarLike,
    ) -> None:
        """Call `watch` for a known state, if this element is `here`."""
        watch = self.watch
        if watch is None:
            return

        def on_host(here, step, t, restarted, miss, repeated):
            if here:
                watch(
                    dict(
                        step=int(step),
                        t=float(t),
                        restarted=bool(restarted),
                        miss=float(miss),
                        repeated=bool(repeated),
                    )
                )

        t = position.clock.start
        jax.debug.callback(on_host, here, position.step, t, restarted, miss, repeated)

    @property
    def departure(self) -> Departure | None:
        """The departure of the second approximation, if the solver can detect growth and
        the backward pass can restart in place of the solve, see `Growth`."""
        solver = self.problem.solver
        if isinstance(solver, HasProbe) and isinstance(solver, CanRestart):
            return solver.departure
        return None

    @property
    def compares(self) -> bool:
        """Whether a gradient that seems to grow is compared with one of less accurate
        derivatives."""
        solver = self.problem.solver
        if self.departure is None or not isinstance(solver, HasProbe):
            return False
        return solver.with_other_derivatives(False) is not None

    @property
    def divides(self) -> bool:
        """Whether the backward pass may divide steps, see `Division`."""
        return self.departure is not None and not self.makes_steps

    def before(self, position: Position) -> RealScalarLike:
        """The fraction of the steps of the solve that precede the next step to undo."""
        return (position.step - 1) / jnp.maximum(self.residuals.count, 1)

    def solver_at(self, position: Position) -> AbstractReversibleSolver:
        """The solver, to pull back with."""
        solver, growth = self.problem.solver, position.growth
        if growth is None or not self.compares:
            return solver
        assert isinstance(solver, HasProbe)
        return cast(HasProbe, solver.with_other_derivatives(growth.plan.compares))

    def shares(self, position: Position) -> Shares:
        """See `Growth.shares`, at the start of the solve."""
        if position.growth is None:
            return []
        beside_all = not self.differentiates_start
        return position.growth.shares(position.cotangent.y, beside_all)

    def drifts(
        self,
        position: Position,
        true: tuple[Y, SolverState],
        least: RealScalarLike = 0.0,
    ) -> list[Drift]:
        """The errors of the reconstructed state and solver state, where `least` is the
        fraction of the largest scale in each array for `Drift.beside`."""
        terms, args = self.combine(self.params)
        step = position.clock.start, position.clock.end
        y, solver_state = true
        origin = position.origin
        assert origin is not None
        if self.repeats:
            length = jnp.abs(origin.clock.start - position.clock.start)
            length = jnp.maximum(length, jnp.abs(position.clock.end - position.clock.start))
        else:
            # Events may end a solve long before `t1`.
            length = jnp.abs(self.residuals.end.tprev - self.problem.t0)
        length = jnp.where(length == 0, 1, length)
        scales = error_scales(
            *(self.problem.solver, terms, *step, length, y, args, solver_state),
            *(origin.y, eqx.filter(origin.solver_state, eqx.is_inexact_array)),
        )
        reconstructed = position.y, position.solver_state
        if position.hidden is not None:
            settled, others = eqx.partition(reconstructed, eqx.is_inexact_array)
            reconstructed = eqx.combine(tree_add(settled, position.hidden), others)
        return drifts(reconstructed, true, scales, least)
