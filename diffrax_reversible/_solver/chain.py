"""A step as a chain of updates of its parts, which can be run, undone and pulled back."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import Args, RealScalarLike, Terms
from .._exact_sum import Sum
from .._tree import tree_scale


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
        parts, evaluated = all_of(updates, parts, backwards)
        if collect is not None:
            sides = collect(sides, row, evaluated)
        return (parts, sides), None

    return scan_rounds(chain, one_round, (parts, sides), reverse=backwards)[0]


# Side outputs are collected from the last round to the first.
undo = ft.partial(run, backwards=True)


def as_sums(parts: tuple[PyTree, ...]) -> Parts:
    """The parts as sums whose addition rounds."""
    return tuple(Sum(part, None, None) for part in parts)


def as_trees(parts: Parts) -> tuple[PyTree, ...]:
    return tuple(part.high for part in parts)


def scan_rounds(
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


def all_of(
    updates: Sequence[Update], parts: Parts, backwards: bool = False
) -> tuple[Parts, list[tuple[PyTree, PyTree]]]:
    """Make updates one after the other, or undo them.

    Returns the parts, and what was evaluated for every update."""
    change = undone if backwards else _made
    evaluated = [(None, None)] * len(updates)
    order = range(len(updates))
    for i in reversed(order) if backwards else order:
        evaluated[i] = evaluate_update(updates[i], parts)
        parts = change(parts, updates[i], evaluated[i][0])
    return parts, evaluated


def evaluate_update(update: Update, parts: Parts) -> tuple[PyTree, PyTree]:
    arguments = arguments_of(update, parts)
    evaluate = update.evaluate if update.alike is None else update.alike
    return (*arguments, None) if evaluate is None else evaluate(*arguments)


def arguments_of(update: Update, parts: Parts) -> tuple[PyTree, ...]:
    others = as_trees(others_of(parts, update))
    return others if update.tap is None else (*others, update.tap)


def _made(parts: Parts, update: Update, u: PyTree) -> Parts:
    part = parts[update.target].scaled(update.scale).plus(times(update.factor, u))
    return insert(others_of(parts, update), update, part)


def undone(parts: Parts, update: Update, u: PyTree) -> Parts:
    part, increment = parts[update.target], times(update.factor, u)
    if update.scale == -1:
        part = part.scaled(-1).plus(increment)
    else:
        part = part.minus(increment).divided(update.scale)
    return insert(others_of(parts, update), update, part)


def others_of(parts: tuple, update: Update) -> tuple:
    return parts[: update.target] + parts[update.target + 1 :]


def insert(others: tuple, update: Update, part: PyTree) -> tuple:
    return *others[: update.target], part, *others[update.target :]


def times(a: RealScalarLike, x: PyTree) -> PyTree:
    return x if isinstance(a, int | float) and a == 1 else tree_scale(a, x)
