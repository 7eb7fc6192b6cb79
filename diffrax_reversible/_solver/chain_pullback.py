"""Undoing a chain and pulling cotangents back through it."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import Combine, Params
from .._members import value_and_pullback
from .._tree import tree_add, tree_cond, tree_zeros_like
from .chain import (
    arguments_of,
    as_trees,
    Chain,
    evaluate_update,
    insert,
    others_of,
    Parts,
    scan_rounds,
    times,
    undone,
    Update,
)
from .chain_again import Again, make_again, Start


# The cotangents that one evaluation passed to the other parts and to its tap.
Passed = tuple[PyTree, ...]


class Pulled(NamedTuple):
    """The parts before a chain, and the cotangents there.

    - `first`: for every update of the first round, the cotangents that its evaluation
        passed on; `None` if it evaluates nothing.
    - `off`: the errors of the parts after the chain, if the updates were made again from
        its start; zeros otherwise.
    """

    parts: Parts
    bars: tuple[PyTree, ...]
    params_bar: Params
    first: list[Passed | None]
    off: tuple[PyTree, ...]


def undo_and_pull(
    chain: Chain,
    combine: Combine,
    params: Params,
    parts: Parts,
    bars: tuple[PyTree, ...],
    params_bar: Params,
    sides_bar: Callable[[Any], Sequence[Any]] | None = None,
    start: Start | None = None,
) -> Pulled:
    """Undo every update of a chain and pull cotangents back through it, with one evaluation
    and one pull-back for each of its evaluations:

        ū = factor * x̄[target] + (cotangent of u from side outputs),    x̄[target] *= scale,
        others̄ += (∂u/∂others)ᵀ ū,    params̄ += (∂u/∂params)ᵀ ū

    **Arguments:**

    - `combine`, `params`: `terms, args = combine(params)`.
    - `parts`, `bars`: the parts after the chain, and their cotangents.
    - `params_bar`: the cotangent of `params` so far.
    - `sides_bar`: a function of a row. For every update it returns the cotangent of
        `(u, aux)` from the side outputs, or `None`.
    - `start`: if it is needed, the updates are made again from there. For `n` rounds this
        takes the memory of the parts before each of them, and makes `n` rounds again. If
        that memory is large, it makes `n (n - 1) / 2` rounds, and `n` more if errors are
        wanted.
    """
    terms, args = combine(params)

    def like(update):
        others = tree_zeros_like(others_of(bars, update))
        passed = others if update.tap is None else (*others, update.tap)
        return None if update.evaluate is None else passed

    row = jtu.tree_map(lambda x: x[0], chain.rows)
    first = [like(update) for update in chain.make_round(terms, args, row)]

    again = start and make_again(chain, terms, args, start, parts)
    one_round = ft.partial(_pull_round, chain, combine, params, sides_bar, again)
    carry, stages = (parts, bars, params_bar, first), again and again.stages
    carry, _ = scan_rounds(chain, one_round, carry, stages, reverse=True)
    before, bars_before, params_bar, passed = carry
    if again is None:
        off = tree_zeros_like(as_trees(parts))
        return Pulled(before, bars_before, params_bar, passed, off)
    before = tree_cond(again.needs, again.start, before)
    return Pulled(before, bars_before, params_bar, passed, again.off)


def _pull_round(
    chain: Chain,
    combine: Combine,
    params: Params,
    sides_bar: Callable[[Any], Sequence[Any]] | None,
    made: Again | None,
    carry: tuple[Parts, tuple[PyTree, ...], Params, list[Passed | None]],
    x: tuple[Any, Any],
):
    """`undo_and_pull` for a round."""
    (parts, bars, params_bar, _), (row, stage) = carry, x
    again = lambda i, params: chain.make_round(*combine(params), row)[i]
    updates = chain.make_round(*combine(params), row)
    more = [None] * len(updates) if sides_bar is None else sides_bar(row)
    first: list[Passed | None] = [None] * len(updates)
    for i in reversed(range(len(updates))):
        if made is not None and updates[i].evaluate is not None:
            parts = made.before(updates[:i], stage, parts)
        u, bars, more_bar, first[i] = _pull_update(
            updates[i], ft.partial(again, i), params, parts, bars, more[i]
        )
        if more_bar is not None:
            params_bar = tree_add(params_bar, more_bar)
        parts = undone(parts, updates[i], u)
    return (parts, bars, params_bar, first), None


def _pull_update(
    update: Update,
    again: Callable[[Params], Update],
    params: Params,
    parts: Parts,
    bars: tuple[PyTree, ...],
    side_bar: tuple[PyTree, PyTree] | None,
) -> tuple[PyTree, tuple[PyTree, ...], Params | None, Passed | None]:
    """Pull cotangents back through an update, which is `again(params)`.

    Returns `u`, the cotangents of the parts before the update and, if it evaluates
    anything, the cotangent of `params` and those passed on."""
    bar, params_bar, evaluated = bars[update.target], None, None
    u_bar = times(update.factor, bar)
    if update.evaluate is None:
        (u,), passed = arguments_of(update, parts), (u_bar,)
    else:

        def evaluate(params, *arguments):
            fn = again(params).evaluate
            assert fn is not None
            return fn(*arguments)

        arguments = params, *arguments_of(update, parts)
        u, (params_bar, *passed) = _pull(evaluate, arguments, u_bar, side_bar)
        if update.alike is not None:
            u, _ = evaluate_update(update, parts)
        evaluated = passed = tuple(passed)
    others = tuple(map(tree_add, others_of(bars, update), passed))
    return u, insert(others, update, times(update.scale, bar)), params_bar, evaluated


def _pull(
    evaluate: Callable[..., tuple[PyTree, PyTree]],
    arguments: tuple[PyTree, ...],
    u_bar: PyTree,
    side_bar: tuple[PyTree, PyTree] | None,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """The value of `u`, and the cotangents of the arguments."""
    if side_bar is None:
        return value_and_pullback(lambda *xs: evaluate(*xs)[0], arguments, u_bar)
    bars = tree_add(u_bar, side_bar[0]), side_bar[1]
    (u, _), pulled = value_and_pullback(evaluate, arguments, bars)
    return u, pulled
