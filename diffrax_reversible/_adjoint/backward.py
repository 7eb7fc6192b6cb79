"""The walk back along the steps of a solve, pulling cotangents along."""

from collections.abc import Callable

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

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
from .._diffrax import State
from .._solver.base import (
    advance_densely,
    before_jump,
    Cotangent,
    linearise_step,
    Start,
)
from .._tree import tree_add, tree_replace, tree_zeros_like
from .drift import drift
from .finish import pull_finish
from .forward import Kept, Trace
from .growth import Growth
from .known import Known
from .outputs import Cursor, materialise, Output, Row
from .problem import Context, Inputs, Problem, save_states, Times
from .replay import Replayer
from .steps import Clock, Record


# A time as a function of those that are differentiated.
_Time = Callable[[Times], RealScalarLike]


class _Position(eqx.Module):
    """Where the walk is, with `step` steps still to undo.

    - `known`: whether the state and the solver state are those of the solve, and not
        reconstructed.
    - `restarted`: whether the solve was restarted here, which is still to be undone.
    - `stop`: the step at which there is a known state, or nothing is recorded of what was
        before.
    - `anchor`: the state, and what is differentiated of the solver state, where they were
        known last.
    - `drifts`: how far the walk has been off so far.
    - `growth`: of the cotangent, if the solver can tell.
    """

    step: IntScalarLike
    clock: Clock
    y: Y
    solver_state: SolverState
    cotangent: Cotangent
    cursors: list[Cursor]
    known: BoolScalarLike
    restarted: BoolScalarLike
    stop: IntScalarLike
    anchor: tuple[Y, SolverState]
    drifts: list[Float[Array, ""]]
    growth: Growth | None

    @property
    def undoes_next(self) -> BoolScalarLike:
        """Whether the step before can be undone."""
        return (self.step > self.stop) & jnp.logical_not(self.restarted)

    @property
    def done(self) -> BoolScalarLike:
        return (self.step == 0) & self.known


class _Walk(eqx.Module):
    """What does not change along the walk."""

    inputs: Inputs
    problem: Problem
    trace: Trace
    replayer: Replayer
    outputs: list[Output]
    dense_rows: DenseInfo | None
    # Of what the last step interpolated with, if an event was located within it.
    end_dense: DenseInfo | None
    # Those leaves of `Inputs.context` that are differentiated, and the others.
    params: Params
    nondiff: Context
    differentiates_times: bool = eqx.field(static=True)

    def bind(self, params: Params) -> tuple[Terms, Args]:
        context = self.context(params)
        return context.terms, context.args

    def context(self, params: Params) -> Context:
        return eqx.combine(params, self.nondiff)

    def pull_output(
        self, output: Output, row: Row, time: _Time, y: Y, params_cotangent: Params
    ) -> tuple[Y, Params]:
        """Pull the cotangent of one output back to the state that it was made of."""
        t_bar, saved_bar = row
        if output.saves_state and t_bar is None:
            return saved_bar, params_cotangent

        def save(y, params):
            context = self.context(params)
            t, fn = time(context.times), context.save_fns[output.index]
            saved = y if fn is None else fn(t, y, context.args)
            return None if t_bar is None else t, eqx.filter(saved, eqx.is_inexact_array)

        _, pull = jax.vjp(save, y, self.params)
        y_bar, params_bar = pull(row)
        return y_bar, tree_add(params_cotangent, params_bar)

    def pull_into_state(
        self, position: _Position, output: Output, row: Row, time: _Time
    ) -> _Position:
        """As `pull_output`, for an output made of the state where the walk is."""
        ct = position.cotangent
        y_bar, params_bar = self.pull_output(output, row, time, position.y, ct.params)
        ct = Cotangent(tree_add(ct.y, y_bar), ct.solver_state, params_bar)
        growth = position.growth
        if growth is not None:
            growth = growth.expect(y_bar)
        return tree_replace(lambda p: (p.cotangent, p.growth), position, (ct, growth))

    def pull_dense_times(self, position: _Position, cotangent: State) -> _Position:
        """The times that dense output is between."""
        leaves = jtu.tree_leaves(cotangent.dense_ts)
        if not self.differentiates_times or len(leaves) == 0:
            return position
        (ts_bar,) = leaves
        ts = self.trace.end.dense_ts
        assert ts is not None
        written = jnp.arange(len(ts)) <= self.trace.count

        def dense_ts(params):
            return jax.vmap(self.context(params).times.of)(ts)

        _, pull = jax.vjp(dense_ts, self.params)
        (params_bar,) = pull(jnp.where(written, ts_bar, 0))
        params_bar = tree_add(position.cotangent.params, params_bar)
        return eqx.tree_at(lambda p: p.cotangent.params, position, params_bar)

    def pull_start(self, position: _Position) -> _Position:
        """Outputs that were written before the first step."""
        for output in self.outputs:
            if output.sub.t0:
                position = self.pull_into_state(
                    position, output, output.row(0), lambda times: times.t0
                )
        return position

    def pull_init(self, position: _Position) -> _Position:
        """The solver state that the solve began with, unless it was given.

        It is made here again, and its activations are not held on to meanwhile.
        """
        problem, ct = self.problem, position.cotangent
        if problem.passed_solver_state:
            return position

        def init(y, params):
            context = self.context(params)
            step = context.times.t0, context.times.of(problem.init_state.tnext)
            state = problem.solver.init(context.terms, *step, y, context.args)
            return eqx.filter(state, eqx.is_inexact_array)

        _, pull = jax.vjp(init, position.y, self.params)
        y_bar, params_bar = pull(ct.solver_state)
        state_bar = tree_zeros_like(ct.solver_state)
        ct = Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
        return eqx.tree_at(lambda p: p.cotangent, position, ct)

    def tells_growth(self, position: _Position) -> bool:
        """Whether the solver tells how cotangents are pulled back."""
        step = position.clock.start, position.clock.end, position.y, position.cotangent
        probe = self.problem.solver.probe
        probe = eqx.filter_eval_shape(probe, self.bind, self.params, *step, None)
        return probe is not None

    def undo_step(self, position: _Position, record: Record) -> _Position:
        """One step of the walk."""
        step = position.step - 1
        _, args = self.bind(self.params)
        clock = record.undo(
            step,
            position.clock,
            self.problem.stepsize_controller,
            self.trace.count - 1,
            self.trace.record.outermost,
            position.y,
            args,
        )
        position = eqx.tree_at(lambda p: p.clock, position, clock)
        restarted, crossed = record.before(step)
        t0, t1 = clock.start, clock.end
        position = self._pull_step_outputs(position, t1)
        solver = self.problem.solver
        # A start that was restarted from, or was before a jump, is another.
        is_known = (step == 0) & jnp.logical_not(jnp.logical_or(restarted, crossed))
        start = Start(is_known, self.inputs.y0, self.inputs.solver_state)
        solver_state = solver.recall(position.solver_state, record.recorded_before(step))
        state = position.y, solver_state
        ct = position.cotangent
        interpolated = [
            i for i, output in enumerate(self.outputs) if output.sub.ts is not None
        ]
        linear = all(self.outputs[i].saves_state for i in interpolated)
        if linear and not self.differentiates_times:
            dense_bar = None
            if len(interpolated) > 0 or self._with_dense:
                # Nothing but its shapes is used: interpolations are linear.
                dense_info = self._dense_struct(t0, t1, *state)
                dense_bar, ct, cursors = self._pull_dense(
                    position, interpolated, t0, t1, dense_info
                )
                position = eqx.tree_at(lambda p: p.cursors, position, cursors)
            y0, state0, ct = solver.inverse_step_and_pullback(
                self.bind, self.params, t0, t1, *state, ct, dense_bar, start
            )
            probe = ct.probe
        else:

            def step_times(params):
                times = self.context(params).times
                return times.of(t0), times.of(t1)

            y0, state0, dense_info, pull = linearise_step(
                solver, self.bind, self.params, t0, t1, *state, start, step_times
            )
            dense_bar, ct, cursors = self._pull_dense(
                position, interpolated, t0, t1, dense_info
            )
            position = eqx.tree_at(lambda p: p.cursors, position, cursors)
            ct, probe = pull(ct, dense_bar), None
        growth = position.growth
        if growth is not None:
            if probe is None:
                bars = ct, dense_bar
                probe = solver.probe(self.bind, self.params, t0, t1, y0, *bars)
            assert probe is not None
            growth = growth.update(probe)
        ct = Cotangent(ct.y, ct.solver_state, ct.params)
        if self.problem.with_jumps:
            state0, ct = lax.cond(
                eqxi.unvmap_any(crossed),
                lambda: self._undo_jump(crossed, t0, y0, state0, ct),
                lambda: (state0, ct),
            )
        no = jnp.array(False)
        return tree_replace(
            lambda p: (
                *(p.step, p.y, p.solver_state, p.cotangent),
                *(p.growth, p.known, p.restarted),
            ),
            position,
            (step, y0, state0, ct, growth, no, no | restarted),
        )

    def _undo_jump(
        self,
        crossed: BoolScalarLike,
        t: RealScalarLike,
        y: Y,
        solver_state: SolverState,
        ct: Cotangent,
    ) -> tuple[SolverState, Cotangent]:
        """Undo the crossing of a jump just before `t`, if it was `crossed`."""
        solver = self.problem.solver
        terms, args = self.bind(self.params)
        before, _ = solver.cross_jump(terms, t, before_jump(t), y, args, solver_state)
        diff_state, nondiff_state = eqx.partition(before, eqx.is_inexact_array)

        def cross(y, diff_state, params):
            context = self.context(params)
            after = context.times.of(t)
            state = eqx.combine(diff_state, nondiff_state)
            state, _ = solver.cross_jump(
                context.terms, before_jump(after), after, y, context.args, state
            )
            return eqx.filter(state, eqx.is_inexact_array)

        _, pull = eqx.filter_vjp(cross, y, diff_state, self.params)
        y_bar, state_bar, params_bar = pull(ct.solver_state)
        new = Cotangent(tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar))
        return jtu.tree_map(
            lambda n, o: jnp.where(crossed, n, o), (before, new), (solver_state, ct)
        )

    def go_on(self, position: _Position, kept: Kept) -> tuple[_Position, Kept]:
        """Where the step before cannot be undone: go on from a known state, after a look at
        where the walk has come to. If it is not held, or what was before is not recorded,
        then the solve is replayed from the last one that is.

        Of a batch, elements that can go on as they are do nothing here.
        """
        assert kept.record is not None and kept.checkpoints is not None
        step = position.step
        here = jnp.logical_not(position.undoes_next | position.done)
        # Else it was come to before.
        held = jnp.logical_not(position.known) & kept.checkpoints.held(step)
        replays = here & jnp.logical_not(held)
        limit = step + jnp.where(held, 1, 0)
        known = kept.checkpoints.before(limit, self.replayer.start)
        if self._replays:
            known, kept = lax.cond(
                eqxi.unvmap_any(replays),
                lambda: self._replay(known, kept, step, replays),
                lambda: (known, kept),
            )
        position = self._come_to(position, known, here)
        assert kept.record is not None and kept.checkpoints is not None
        stop = jnp.maximum(kept.checkpoints.step_before(step), kept.record.first)
        stop = jnp.where(here, stop, position.stop)
        return eqx.tree_at(lambda p: p.stop, position, stop), kept

    @property
    def _replays(self) -> bool:
        """Whether the solve may have to be replayed."""
        rows, max_steps = self.trace.record.rows, self.problem.max_steps
        forgets = rows is not None and (max_steps is None or max_steps > rows)
        return forgets or self.trace.restartable

    @property
    def stops(self) -> bool:
        """Whether the walk may come to a known state, or to a gap, before the start."""
        return self._replays or self.trace.kept.holds

    def _replay(
        self, known: Known, kept: Kept, step: IntScalarLike, replays: BoolScalarLike
    ) -> tuple[Known, Kept]:
        last = self.trace.count - 1, self.trace.record.last_end
        most = self.trace.end.num_steps
        new, replayed = self.replayer.run(known, kept, step, last, most, replays)
        assert replayed.record is not None and kept.record is not None
        # Of the others nothing was written, nor held.
        record = replayed.record.where(replays, kept.record)
        kept = tree_replace(
            lambda k: (k.record, k.checkpoints), kept, (record, replayed.checkpoints)
        )
        return new.where(replays, known), kept

    def _come_to(
        self, position: _Position, known: Known, here: BoolScalarLike
    ) -> _Position:
        """Go on from what is known where the walk is, if this element is `here`."""
        restarted = position.restarted & here
        ct, state = position.cotangent, known.solver_state
        if self.trace.restartable:
            state, ct = lax.cond(
                eqxi.unvmap_any(restarted),
                lambda: self._undo_restart(known, ct, restarted),
                lambda: (state, ct),
            )
        walked = self.drift(position, (known.y, state))
        drifts = jtu.tree_map(
            lambda d, w: jnp.maximum(d, jnp.where(here, w, 0)), position.drifts, walked
        )
        clock = position.clock
        controller_state = clock.controller_state
        if self.trace.record.outermost is not None:
            controller_state = eqx.combine(known.controller_state, controller_state)
        clock = clock.set(known.t, known.last_end, controller_state, here)
        anchor = eqx.filter((known.y, known.solver_state), eqx.is_inexact_array)
        new = known.y, known.solver_state, anchor
        old = position.y, position.solver_state, position.anchor
        y, state, anchor = jtu.tree_map(lambda n, o: jnp.where(here, n, o), new, old)
        return tree_replace(
            lambda p: (
                *(p.clock, p.y, p.solver_state, p.cotangent, p.known, p.restarted),
                *(p.anchor, p.drifts),
            ),
            position,
            (
                *(clock, y, state, ct, position.known | here),
                *(position.restarted & jnp.logical_not(here), anchor, drifts),
            ),
        )

    def _undo_restart(
        self, known: Known, ct: Cotangent, restarted: BoolScalarLike
    ) -> tuple[SolverState, Cotangent]:
        """The solver state after a restart, and the cotangent before it, if this element of
        a batch was `restarted`."""
        diff_state, nondiff_state = eqx.partition(known.solver_state, eqx.is_inexact_array)

        def restart(y, diff_state, params):
            context = self.context(params)
            state = eqx.combine(diff_state, nondiff_state)
            return self.problem.solver.restart(
                context.terms, context.times.of(known.t), y, context.args, state
            )

        _, pull = eqx.filter_vjp(restart, known.y, diff_state, self.params)
        y_bar, state_bar, params_bar = pull(ct.solver_state)
        # Not what `filter_vjp` gives, which might round in another way than the solve did.
        after = restart(known.y, diff_state, self.params)
        before = Cotangent(
            tree_add(ct.y, y_bar), state_bar, tree_add(ct.params, params_bar)
        )
        return jtu.tree_map(
            lambda n, o: jnp.where(restarted, n, o),
            (after, before),
            (known.solver_state, ct),
        )

    def drift(self, position: _Position, true: tuple[Y, SolverState]):
        """How far the walk is off the true state and solver state."""
        terms, args = self.bind(self.params)
        # Events may end a solve long before `t1`.
        length = jnp.abs(self.trace.end.tprev - self.problem.t0)
        length = jnp.where(length == 0, 1, length)
        step = position.clock.start, position.clock.end
        y, solver_state = true
        scales = self.problem.solver.error_scales(
            terms, *step, length, y, args, solver_state, *position.anchor
        )
        return drift((position.y, position.solver_state), true, scales)

    def _pull_step_outputs(self, position: _Position, t1: RealScalarLike) -> _Position:
        """Outputs of `SaveAt(steps=n)`, written at the end of a step."""
        for i, output in enumerate(self.outputs):
            steps = output.sub.steps
            if steps == 0:
                continue
            written = True if steps == 1 else position.step % steps == 0
            position, save_index = _take(position, i, jnp.where(written, 1, 0))
            row = output.row(save_index, written)
            position = self.pull_into_state(
                position, output, row, lambda times: times.of(t1)
            )
        return position

    @property
    def _with_dense(self) -> bool:
        return self.dense_rows is not None or self.end_dense is not None

    def _dense_struct(self, t0, t1, y, solver_state) -> DenseInfo:
        terms, args = self.bind(self.params)
        _, _, dense_info, _, _ = eqx.filter_eval_shape(
            advance_densely, self.problem.solver, terms, t0, t1, y, args, solver_state
        )
        return dense_info

    def _pull_dense(
        self,
        position: _Position,
        interpolated: list[int],
        t0: RealScalarLike,
        t1: RealScalarLike,
        dense_info: DenseInfo,
    ) -> tuple[DenseInfo, Cotangent, list[Cursor]]:
        """Outputs of `SaveAt(ts=..., dense=...)`, interpolated within the step."""
        step = position.step - 1
        if self.dense_rows is None:
            dense_bar = jtu.tree_map(lambda d: jnp.zeros(d.shape, d.dtype), dense_info)
        else:
            dense_bar = jtu.tree_map(lambda rows: rows[step], self.dense_rows)
        if self.end_dense is not None:
            last = position.step == self.trace.count
            end_dense = jtu.tree_map(lambda e: jnp.where(last, e, 0), self.end_dense)
            dense_bar = tree_add(dense_bar, end_dense)
        cursors = list(position.cursors)
        params_bar = position.cotangent.params
        # `ts` were written in the first step that ends at or after them.
        last_end = position.clock.previous_end
        for i in interpolated:
            dense_bar, params_bar, cursors[i] = self._pull_ts(
                self.outputs[i],
                lambda t: (step == 0) | (t > last_end),
                (t0, t1, dense_info),
                (dense_bar, params_bar, cursors[i]),
            )
        ct = eqx.tree_at(lambda c: c.params, position.cotangent, params_bar)
        return dense_bar, ct, cursors

    def _pull_ts(
        self,
        output: Output,
        in_step: Callable[[RealScalarLike], BoolScalarLike],
        interpolation: tuple[RealScalarLike, RealScalarLike, DenseInfo],
        carry: tuple[DenseInfo, Params, Cursor],
    ) -> tuple[DenseInfo, Params, Cursor]:
        """Every remaining output of `SaveAt(ts=...)` in the step."""
        t0, t1, dense_info = interpolation
        ts = output.sub.ts
        assert ts is not None

        def more(carry):
            _, _, cursor = carry
            i = cursor.ts_index - 1
            return (i >= 0) & in_step(ts[jnp.maximum(i, 0)])

        def pull(carry):
            dense_bar, params_bar, cursor = carry
            cursor = Cursor(cursor.save_index - 1, cursor.ts_index - 1)

            def time(times):
                ts = times.ts[output.index]
                assert ts is not None
                return ts[cursor.ts_index]

            def evaluate(dense_info, params):
                times = self.context(params).times
                ends = dict(t0=times.of(t0), t1=times.of(t1))
                interpolation = self.problem.solver.interpolation_cls(**ends, **dense_info)
                return interpolation.evaluate(time(times))

            linear = output.saves_state and not self.differentiates_times
            y = None if linear else evaluate(dense_info, self.params)
            row = output.row(cursor.save_index)
            y_bar, params_bar = self.pull_output(output, row, time, y, params_bar)
            if self.differentiates_times:
                _, pull = jax.vjp(evaluate, dense_info, self.params)
                new_bar, more_bar = pull(y_bar)
                params_bar = tree_add(params_bar, more_bar)
            else:
                transpose = jax.linear_transpose(
                    lambda info: evaluate(info, self.params), dense_info
                )
                (new_bar,) = transpose(y_bar)
            return tree_add(dense_bar, new_bar), params_bar, cursor

        return lax.while_loop(more, pull, carry)


def _take(
    position: _Position, i: int, count: IntScalarLike
) -> tuple[_Position, IntScalarLike]:
    """Move the cursor of the `i`-th output back by `count` outputs."""
    save_index = position.cursors[i].save_index - count
    return eqx.tree_at(lambda p: p.cursors[i].save_index, position, save_index), save_index


# In a batch, elements that can undo steps make so many of them while others wait for a
# known state.
_at_once = 16


def _undo_all(walk: _Walk, position: _Position) -> _Position:
    """The whole walk: what cannot be undone is seen to outside of the loop over steps."""

    def undo_steps(position, kept):
        def undoes(carry):
            position, count = carry
            waits = jnp.logical_not(position.undoes_next | position.done)
            waits = eqxi.unvmap_any(waits) & (count >= _at_once)
            return position.undoes_next & jnp.logical_not(waits)

        def undo(carry):
            position, count = carry
            return walk.undo_step(position, kept.record), count + 1

        return lax.while_loop(undoes, undo, (position, jnp.array(0)))[0]

    def segment(carry):
        position, kept = carry
        return walk.go_on(undo_steps(position, kept), kept)

    kept = walk.trace.kept
    if not walk.stops:
        # In memory for fewer states.
        return walk.go_on(undo_steps(position, kept), kept)[0]

    def on_the_way(carry):
        return eqxi.unvmap_any(jnp.logical_not(carry[0].done))

    return lax.while_loop(on_the_way, segment, (position, kept))[0]


def walk_back(
    inputs: Inputs,
    perturbed: Inputs,
    problem: Problem,
    trace: Trace,
    cotangent: State,
) -> tuple[Inputs, list[Float[Array, ""]], list[Float[Array, ""]]]:
    """Undo every step of a solve, and pull the cotangent of its outputs back.

    **Arguments:**

    - `inputs`, `problem`: what was solved.
    - `perturbed`: which leaves of `inputs` are differentiated.
    - `trace`: what `solve_and_record` kept of it.
    - `cotangent`: as the final state of the solve, with `None` for zero.

    **Returns:**

    The cotangent of `inputs`, how far the walk was off where it could be checked, and which
    part of the cotangent has grown where the solution contracts.
    """
    params, nondiff = eqx.partition(inputs.context, perturbed.context)
    with_times = any(jtu.tree_leaves(perturbed.context.times))
    end = trace.end
    pulled = pull_finish(inputs, params, nondiff, problem, trace, cotangent, with_times)
    dense_rows = None
    if len(jtu.tree_leaves(cotangent.dense_infos)) > 0:
        dense_rows = materialise(cotangent.dense_infos, trace.dense_structs)
    walk = _Walk(
        inputs,
        problem,
        trace,
        Replayer(inputs, problem),
        pulled.outputs,
        dense_rows,
        pulled.end_dense,
        params,
        nondiff,
        with_times,
    )
    record, checkpoints = trace.record, trace.kept.checkpoints
    assert checkpoints is not None
    saved = [save_states(end)[output.index] for output in pulled.outputs]
    position = _Position(
        trace.count,
        record.clock(end),
        end.y,
        end.solver_state,
        Cotangent(
            tree_add(materialise(cotangent.y, end.y), pulled.y),
            materialise(cotangent.solver_state, end.solver_state),
            pulled.params,
        ),
        [Cursor(s.save_index, s.saveat_ts_index) for s in saved],
        jnp.logical_not(record.restarted),
        record.restarted,
        jnp.maximum(checkpoints.step_before(trace.count), record.first),
        eqx.filter((end.y, end.solver_state), eqx.is_inexact_array),
        [],
        None,
    )
    start = (inputs.y0, inputs.solver_state)
    drifts = jax.eval_shape(walk.drift, position, start)
    no_drift = jtu.tree_map(lambda d: jnp.zeros(d.shape, d.dtype), drifts)
    growth = Growth.start(position.cotangent.y) if walk.tells_growth(position) else None
    position = tree_replace(lambda p: (p.drifts, p.growth), position, (no_drift, growth))
    position = walk.pull_dense_times(position, cotangent)
    position = _undo_all(walk, position)
    position = walk.pull_start(position)
    position = walk.pull_init(position)
    ct = position.cotangent
    gradient = Inputs(ct.y, ct.solver_state, ct.params)
    drifts = position.drifts
    if len(drifts) > 0:
        # Judged by the tolerance for the state.
        drifts.append(position.clock.drift.astype(drifts[0].dtype))
    shares = []
    if position.growth is not None:
        differentiates_y = any(jtu.tree_leaves((perturbed.y0, perturbed.solver_state)))
        shares = position.growth.shares(ct.y, beside_all=not differentiates_y)
    return gradient, drifts, shares
