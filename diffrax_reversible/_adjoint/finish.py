"""The gradient of what happens after the last step."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import DenseInfo, Params, Y
from .._diffrax import State
from .._tree import tree_zeros_like
from .forward import finish, Residuals
from .outputs import materialise, Output, Row
from .problem import Context, Inputs, Problem, save_states, sub_saveats, Times


class PulledFinish(eqx.Module):
    """Cotangents just after the last step.

    - `outputs`: of what had been saved, but for outputs of which the cotangent is known
        to be zero.
    - `y`, `params`: of the state and the differentiated leaves of the context.
    - `end_dense`: of what the last step interpolated with, or `None` if the solve cannot
        end within a step.
    """

    outputs: list[Output]
    y: Y
    params: Params
    end_dense: DenseInfo | None


def pull_finish(
    inputs: Inputs,
    params: Params,
    nondiff: Context,
    problem: Problem,
    residuals: Residuals,
    cotangent: State,
    with_times: bool,
) -> PulledFinish:
    """Pull the cotangent of the final state back to the end of the last step.

    Between them Diffrax locates the event that ended the solve, by a root find that it
    differentiates implicitly, takes back what was saved after it, and writes the outputs
    of `SaveAt(t1=True)`.
    """
    end, with_event = residuals.end, problem.finds_roots
    # The time of an event depends on more than times.
    with_ts = with_times or with_event
    written = [
        (saved.ts if with_ts else None, tree_zeros_like(ys))
        for saved, ys in zip(save_states(end), residuals.zero_ys(), strict=True)
    ]
    bars = {}
    for i, saved in enumerate(save_states(cotangent)):
        bar = (saved.ts if with_ts else None, saved.ys)
        if len(jtu.tree_leaves(bar)) > 0:
            bars[i] = materialise(bar, written[i])
    dense_info = end.event_dense_info if with_event else None
    if len(bars) == 0:
        return PulledFinish([], *tree_zeros_like((end.y, params, dense_info)))

    written = {i: written[i] for i in bars}
    differentiable = _Finish(inputs, nondiff, problem, residuals, with_ts)
    _, pull = jax.vjp(differentiable, end.y, written, dense_info, params)
    y_bar, rows, dense_bar, params_bar = pull(bars)
    subs = sub_saveats(problem.saveat)
    outputs = []
    for i, (ts_bar, ys_bar) in rows.items():
        rows = (ts_bar if with_times else None, ys_bar)
        saves_state = inputs.context.save_fns[i] is None
        outputs.append(Output(subs[i], rows, i, saves_state))
    if with_event:
        y_bar = _poison_rejected(residuals, dense_bar, y_bar)
    return PulledFinish(outputs, y_bar, params_bar, dense_bar)


class _Finish(NamedTuple):
    """What Diffrax does after the last step, as a function that can be differentiated."""

    inputs: Inputs
    nondiff: Context
    problem: Problem
    residuals: Residuals
    with_ts: bool

    def __call__(
        self, y: Y, written: dict[int, Row], dense_info: DenseInfo | None, params: Params
    ) -> dict[int, Row]:
        """From what was `written` before, by the outputs that have a cotangent."""
        context: Context = eqx.combine(params, self.nondiff)
        state = self._end(y, written, dense_info, context.times)
        ys = self.residuals.zero_ys()
        for i, (_, some_ys) in written.items():
            ys[i] = eqx.combine(some_ys, ys[i])
        start = Inputs(y, self.inputs.solver_state, context)
        final = finish(start, self.problem.at(context.times), state, ys)
        return {
            i: (
                saved.ts if self.with_ts else None,
                eqx.filter(saved.ys, eqx.is_inexact_array),
            )
            for i, saved in enumerate(save_states(final))
            if i in written
        }

    def _end(
        self,
        y: Y,
        written: dict[int, Row],
        dense_info: DenseInfo | None,
        times: Times,
    ) -> State:
        """The state after the last step, with what is differentiated of it."""
        end = self.residuals.end
        state = eqx.tree_at(lambda s: (s.y, s.tprev), end, (y, times.of(end.tprev)))
        if self.problem.finds_roots:
            assert end.event_tprev is not None and end.event_tnext is not None
            state = eqx.tree_at(
                lambda s: (s.event_tprev, s.event_tnext, s.event_dense_info),
                state,
                (times.of(end.event_tprev), times.of(end.event_tnext), dense_info),
            )
        if self.with_ts:
            state = eqx.tree_at(
                lambda s: [save_states(s)[i].ts for i in written],
                state,
                [ts for ts, _ in written.values()],
            )
        return state


def _poison_rejected(residuals: Residuals, dense_bar: DenseInfo, y_bar: Y) -> Y:
    """NaN if the step that was interpolated in was rejected: it cannot be walked back."""
    used = sum(jnp.sum(d != 0) for d in jtu.tree_leaves(dense_bar)) != 0
    wrong = (residuals.end.event_tnext != residuals.record.last_end) & used
    return jtu.tree_map(lambda y: jnp.where(wrong, jnp.nan, y), y_bar)
