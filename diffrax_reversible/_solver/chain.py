"""A step as a chain of updates of its parts, which can be run, undone and pulled back."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, Combine, Params, RealScalarLike, Terms
from .._exact_sum import Sum
from .._tree import read_row, tree_add, tree_scale, tree_where, tree_zeros_like


# What may be stored of a step that is made again.
_most_bytes = 1 << 18


class Update(NamedTuple):
    """One link of a chain, which updates a part by a function of the others:

        x[target] <- scale * x[target] + factor * u,    u, aux = evaluate(*others)

    where `others` are all parts except the `target`, in their order.

    - `evaluate`: `None` if `u` is the only other part itself.
    - `scale`: not zero; 1 or -1 for sums that do not round.
    - `factor`: must not depend on the variables of differentiation.
    - `alike`: a version of `evaluate` that rounds alike wherever it is compiled, to undo
        sums to the last bit.
    - `tap`: zeros that `evaluate` takes as its last argument, to obtain their cotangent.
    """

    target: int
    evaluate: Callable[..., tuple[PyTree, PyTree]] | None
    scale: float = 1.0
    factor: RealScalarLike = 1.0
    alike: Callable[..., tuple[PyTree, PyTree]] | None = None
    tap: PyTree = None


class Chain(NamedTuple):
    """Rounds of a few updates, which differ only in their coefficients.

    - `make_round`: a function of `(terms, args, row)` that returns the updates of a round.
    - `rows`: the coefficients, one row per round along the first axis; `None` for a single
        round.
    """

    make_round: Callable[[Terms, Args, Any], Sequence[Update]]
    rows: PyTree = None


# The state and the solver state of a step, in parts; an update changes one part.
Parts = tuple[Sum, ...]

# The cotangents that one evaluation passed to the other parts and to its tap.
Passed = tuple[PyTree, ...]


class Start(NamedTuple):
    """The `parts` before a chain, if some element of a batch `needs` them, because undoing
    its updates is not accurate enough."""

    needs: BoolScalarLike
    parts: Callable[[], Parts]


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


_Sides = TypeVar("_Sides")
_Carry = TypeVar("_Carry")

# The new side outputs of a chain after a round, from the side outputs so far, the row, and
# the results of `evaluate` for every update.
Collect = Callable[[_Sides, Any, list[tuple[PyTree, PyTree]]], _Sides]


def run(
    chain: Chain,
    terms: Terms,
    args: Args,
    parts: Parts,
    sides: _Sides = None,
    collect: Collect[_Sides] | None = None,
    backwards: bool = False,
) -> tuple[Parts, _Sides]:
    """Apply every update of a chain, or undo it. Returns the parts and the side outputs."""

    def one_round(carry: tuple[Parts, _Sides], x: tuple[Any, None]):
        (parts, sides), (row, _) = carry, x
        updates = chain.make_round(terms, args, row)
        parts, evaluated = _all_of(updates, parts, backwards)
        if collect is not None:
            sides = collect(sides, row, evaluated)
        return (parts, sides), None

    return _scan(chain, one_round, (parts, sides), reverse=backwards)[0]


# Side outputs are collected from the last round to the first.
undo = ft.partial(run, backwards=True)


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
        takes the memory of the parts before each of them, and as many evaluations again;
        or, if that memory is large, `(n + 1) / 2` times as many.
    """
    terms, args = combine(params)

    def like(update):
        others = tree_zeros_like(_others(bars, update))
        passed = others if update.tap is None else (*others, update.tap)
        return None if update.evaluate is None else passed

    row = jtu.tree_map(lambda x: x[0], chain.rows)
    first = [like(update) for update in chain.make_round(terms, args, row)]

    def pull(after, off, stages=None, parts_before=_as_undone):
        one_round = ft.partial(_pull_round, chain, combine, params, sides_bar, parts_before)
        carry = after, bars, params_bar, first
        pulled, _ = _scan(chain, one_round, carry, stages, reverse=True)
        before, bars_before, total, passed = pulled
        return Pulled(before, bars_before, total, passed, off)

    def undo():
        return pull(parts, tree_zeros_like(as_trees(parts)))

    def make(start):
        before = start.parts()
        after, stages, parts_before = _make_rounds(chain, terms, args, before)
        off = jtu.tree_map(jnp.subtract, as_trees(parts), as_trees(after))
        return pull(after, off, stages, parts_before)._replace(parts=before)

    if start is None:
        return undo()
    some = eqxi.unvmap_any(start.needs)
    if chain.rows is not None:
        return lax.cond(some, lambda: make(start), undo)
    # A single round is long, and is compiled once for both.
    updates = chain.make_round(terms, args, None)

    def make_all():
        stages = [start.parts()]
        for update in updates:
            u, _ = _evaluate(update, stages[-1])
            stages.append(_made(stages[-1], update, u))
        off = jtu.tree_map(jnp.subtract, as_trees(parts), as_trees(stages.pop()))
        return stages, off

    def make_none():
        return [parts] * len(updates), tree_zeros_like(as_trees(parts))

    made, off = lax.cond(some, make_all, make_none)
    pulled = pull(parts, off, None, lambda *_: lambda i, p: tree_where(some, made[i], p))
    return pulled._replace(parts=tree_where(some, made[0], pulled.parts))


# The parts before the `i`-th update of a round, by the updates of the round and what is
# stored of it; a function of `i` and of the parts that are undone.
_PartsBefore = Callable[[Sequence[Update], Any], Callable[[int, Parts], Parts]]


def _as_undone(updates: Sequence[Update], stage: Any) -> Callable[[int, Parts], Parts]:
    del updates, stage
    return lambda i, parts: parts


def _pull_round(
    chain: Chain,
    combine: Combine,
    params: Params,
    sides_bar: Callable[[Any], Sequence[Any]] | None,
    parts_before: _PartsBefore,
    carry: tuple[Parts, tuple[PyTree, ...], Params, list[Passed | None]],
    x: tuple[Any, Any],
):
    """`undo_and_pull` for a round."""
    (parts, bars, params_bar, _), (row, stage) = carry, x
    again = lambda i, params: chain.make_round(*combine(params), row)[i]
    updates = chain.make_round(*combine(params), row)
    before = parts_before(updates, stage)
    more = [None] * len(updates) if sides_bar is None else sides_bar(row)
    first: list[Passed | None] = [None] * len(updates)
    for i in reversed(range(len(updates))):
        parts = before(i, parts)
        u, bars, more_bar, first[i] = _pull_update(
            updates[i], ft.partial(again, i), params, parts, bars, more[i]
        )
        if more_bar is not None:
            params_bar = tree_add(params_bar, more_bar)
        parts = _undone(parts, updates[i], u)
    return (parts, bars, params_bar, first), None


def _make_rounds(
    chain: Chain, terms: Terms, args: Args, start: Parts
) -> tuple[Parts, PyTree, _PartsBefore]:
    """The parts after all rounds of a chain; what is stored of each round; and the parts
    before an update, as a function of that."""

    def make_round(parts, row):
        return _all_of(chain.make_round(terms, args, row), parts)[0]

    count = len(jtu.tree_leaves(chain.rows)[0])
    if count * sum(x.nbytes for x in jtu.tree_leaves(start)) <= _most_bytes:
        store = lambda parts, x: (make_round(parts, x[0]), parts)
        after, stages = _scan(chain, store, start)
        before_round = lambda parts: parts
    else:
        again = lambda i, parts: make_round(parts, read_row(chain.rows, i))
        before_round = lambda i: lax.fori_loop(0, i, again, start)
        after, stages = before_round(count), jnp.arange(count)

    def parts_before(updates, stage):
        before = before_round(stage)
        return lambda i, _: _all_of(updates[:i], before)[0]

    return after, stages, parts_before


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
    u_bar = _times(update.factor, bar)
    if update.evaluate is None:
        (u,), passed = _arguments(update, parts), (u_bar,)
    else:

        def evaluate(params, *arguments):
            fn = again(params).evaluate
            assert fn is not None
            return fn(*arguments)

        arguments = params, *_arguments(update, parts)
        u, (params_bar, *passed) = _pull(evaluate, arguments, u_bar, side_bar)
        if update.alike is not None:
            u, _ = _evaluate(update, parts)
        evaluated = passed = tuple(passed)
    others = tuple(map(tree_add, _others(bars, update), passed))
    return u, _insert(others, update, _times(update.scale, bar)), params_bar, evaluated


def _pull(
    evaluate: Callable[..., tuple[PyTree, PyTree]],
    arguments: tuple[PyTree, ...],
    u_bar: PyTree,
    side_bar: tuple[PyTree, PyTree] | None,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """The value of `u`, and the cotangents of the arguments."""
    if side_bar is None:
        u, pull, _ = jax.vjp(evaluate, *arguments, has_aux=True)
        return u, pull(u_bar)
    (u, _), pull = jax.vjp(evaluate, *arguments)
    return u, pull((tree_add(u_bar, side_bar[0]), side_bar[1]))


def as_sums(parts: tuple[PyTree, ...]) -> Parts:
    """The parts as sums whose addition rounds."""
    return tuple(Sum(part, None, None) for part in parts)


def as_trees(parts: Parts) -> tuple[PyTree, ...]:
    return tuple(part.high for part in parts)


def _scan(
    chain: Chain,
    one_round: Callable[[_Carry, tuple[Any, PyTree]], tuple[_Carry, PyTree]],
    carry: _Carry,
    stages: PyTree = None,
    reverse: bool = False,
) -> tuple[_Carry, PyTree]:
    """A scan over the rounds, which compiles faster than unrolled rounds, except for one.

    - `one_round`: takes the coefficients and what `stages` hold for a round.
    """
    xs = chain.rows, stages
    if len(leaves := jtu.tree_leaves(chain.rows)) == 0:
        return one_round(carry, xs)
    if len(leaves[0]) == 1:
        carry, y = one_round(carry, jtu.tree_map(lambda x: x[0], xs))
        return carry, jtu.tree_map(lambda y: y[None], y)
    return lax.scan(one_round, carry, xs, reverse=reverse)


def _all_of(
    updates: Sequence[Update], parts: Parts, backwards: bool = False
) -> tuple[Parts, list[tuple[PyTree, PyTree]]]:
    """Make updates one after the other, or undo them.

    Returns the parts, and what was evaluated for every update."""
    change = _undone if backwards else _made
    evaluated = [(None, None)] * len(updates)
    order = range(len(updates))
    for i in reversed(order) if backwards else order:
        evaluated[i] = _evaluate(updates[i], parts)
        parts = change(parts, updates[i], evaluated[i][0])
    return parts, evaluated


def _evaluate(update: Update, parts: Parts) -> tuple[PyTree, PyTree]:
    arguments = _arguments(update, parts)
    evaluate = update.evaluate if update.alike is None else update.alike
    return (*arguments, None) if evaluate is None else evaluate(*arguments)


def _arguments(update: Update, parts: Parts) -> tuple[PyTree, ...]:
    others = as_trees(_others(parts, update))
    return others if update.tap is None else (*others, update.tap)


def _made(parts: Parts, update: Update, u: PyTree) -> Parts:
    part = parts[update.target].scaled(update.scale).plus(_times(update.factor, u))
    return _insert(_others(parts, update), update, part)


def _undone(parts: Parts, update: Update, u: PyTree) -> Parts:
    part, increment = parts[update.target], _times(update.factor, u)
    if update.scale == -1:
        part = part.scaled(-1).plus(increment)
    else:
        part = part.minus(increment).divided(update.scale)
    return _insert(_others(parts, update), update, part)


def _others(parts: tuple, update: Update) -> tuple:
    return parts[: update.target] + parts[update.target + 1 :]


def _insert(others: tuple, update: Update, part: PyTree) -> tuple:
    return *others[: update.target], part, *others[update.target :]


def _times(a: RealScalarLike, x: PyTree) -> PyTree:
    return x if isinstance(a, int | float) and a == 1 else tree_scale(a, x)
