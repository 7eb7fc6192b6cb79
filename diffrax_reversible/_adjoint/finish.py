"""The gradient of locating an event after the last step."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import DenseInfo, Params, Y
from .._diffrax import State
from .._tree import any_nonzero, tree_zeros_like
from .forward import finish, Residuals
from .outputs import materialise, Output, Row
from .problem import Inputs, save_states, sub_saveats
from .times import Times
from .walk import Walk


class PulledFinish(eqx.Module):
    """Cotangents just after the last step.

    - `outputs`: of the saved outputs, except those whose cotangent is known to be zero.
    - `y`, `params`: of the state and the differentiated leaves of the context.
    - `end_dense`: of the interpolation data of the last step, or `None` if the solve cannot
        end within a step.
    """

    outputs: list[Output]
    y: Y
    params: Params
    end_dense: DenseInfo | None


def pull_finish(walk: Walk, cotangent: State) -> PulledFinish:
    """Pull the cotangent of the final state back to the end of the last step.

    If an event may have ended the solve, Diffrax then locates it, by a root find that it
    differentiates implicitly, discards the outputs after it, and writes those of
    `SaveAt(t1=True)`. Otherwise `pull_last` pulls these back.
    """
    problem, residuals, with_times = walk.problem, walk.residuals, walk.differentiates_times
    end, with_event = residuals.end, problem.finds_roots
    # The time of an event depends on more than `Times`.
    with_ts = with_times or with_event
    bars = {}
    for i, saved in enumerate(save_states(cotangent)):
        bar = (saved.ts if with_ts else None, saved.ys)
        if len(jtu.tree_leaves(bar)) > 0:
            ts = save_states(end)[i].ts if with_ts else None
            bars[i] = materialise(bar, (ts, residuals.ys_structs[i]))

    def outputs(bars: dict[int, Row]) -> list[Output]:
        fns = walk.context(walk.params).save_fns
        subs = sub_saveats(problem.saveat)
        with_ts = lambda ts: ts if with_times else None
        return [
            Output(subs[i], (with_ts(ts), ys), i, fns[i] is None)
            for i, (ts, ys) in bars.items()
        ]

    dense_info = end.event_dense_info if with_event else None
    if not with_event or len(bars) == 0:
        zeros = tree_zeros_like((end.y, walk.params, dense_info))
        return PulledFinish(outputs(bars), *zeros)
    zero_ys = residuals.zero_ys()
    written = {i: (save_states(end)[i].ts, zero_ys[i]) for i in bars}
    _, pull = jax.vjp(_Finish(walk), end.y, written, dense_info, walk.params)
    y_bar, rows, dense_bar, params_bar = pull(bars)
    y_bar = _poison_rejected(residuals, dense_bar, y_bar)
    return PulledFinish(outputs(rows), y_bar, params_bar, dense_bar)


class _Finish(NamedTuple):
    """Diffrax's work after the last step, as a differentiable function."""

    walk: Walk

    def __call__(
        self, y: Y, written: dict[int, Row], dense_info: DenseInfo, params: Params
    ) -> dict[int, Row]:
        """The final outputs that have a cotangent, from those `written` before."""
        walk, context = self.walk, self.walk.context(params)
        state = self._end(y, written, dense_info, context.times)
        ys = walk.residuals.zero_ys()
        for i, (_, some_ys) in written.items():
            ys[i] = eqx.combine(some_ys, ys[i])
        start = Inputs(y, walk.start_states[1], context)
        final = finish(start, walk.problem.at(context.times), state, ys)
        return {
            i: (saved.ts, eqx.filter(saved.ys, eqx.is_inexact_array))
            for i, saved in enumerate(save_states(final))
            if i in written
        }

    def _end(
        self,
        y: Y,
        written: dict[int, Row],
        dense_info: DenseInfo,
        times: Times,
    ) -> State:
        """The state after the last step, with its differentiated leaves replaced."""
        end = self.walk.residuals.end
        state = eqx.tree_at(lambda s: (s.y, s.tprev), end, (y, times.of(end.tprev)))
        assert end.event_tprev is not None and end.event_tnext is not None
        state = eqx.tree_at(
            lambda s: (s.event_tprev, s.event_tnext, s.event_dense_info),
            state,
            (times.of(end.event_tprev), times.of(end.event_tnext), dense_info),
        )
        return eqx.tree_at(
            lambda s: [save_states(s)[i].ts for i in written],
            state,
            [ts for ts, _ in written.values()],
        )


def _poison_rejected(residuals: Residuals, dense_bar: DenseInfo, y_bar: Y) -> Y:
    """NaN if the interpolated step was rejected, as the walk undoes accepted steps only."""
    rejected = residuals.end.event_tnext != residuals.record.last_end
    wrong = rejected & any_nonzero(dense_bar)
    return jtu.tree_map(lambda y: jnp.where(wrong, jnp.nan, y), y_bar)
