"""A chain that is made again from its start, where undoing it is not accurate enough."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, Terms
from .._tree import read_row, tree_select, tree_zeros_like, tree_zeros_of
from .chain import all_of, as_trees, Chain, Parts, scan_rounds, Update


# What may be stored of a chain.
_most_bytes = 1 << 18


class Start(NamedTuple):
    """The `parts` before a chain, of those elements of a batch that need them.

    - `needs`: whether this element does. The parts of others are not used.
    - `tells_errors`: whether the errors of the parts after the chain are wanted.
    """

    needs: BoolScalarLike
    parts: Callable[[], Parts]
    tells_errors: bool


class Again(NamedTuple):
    """A chain that is made again from its start, if an element of a batch `needs` that.

    Only the parts are chosen by a conditional: all that passes through one is copied, and
    its branches are compiled apart.

    - `start`: the parts before the chain.
    - `off`: the errors of the parts after the chain; zeros if it is not made again, or if
        these are not wanted.
    - `stages`: the data of every round: the parts before it, or its index.
    - `before`: the parts before an update, from the updates before it in its round, the
        data of the round, and the parts if the chain is not made again.
    """

    needs: BoolScalarLike
    start: Parts
    off: tuple[PyTree, ...]
    stages: PyTree
    before: Callable[[Sequence[Update], Any, Parts], Parts]


def make_again(chain: Chain, terms: Terms, args: Args, start: Start, parts: Parts) -> Again:
    """Make a chain again which ended at `parts`.

    The parts before each round are stored. If they are large, they are computed from the
    start of the chain whenever they are needed.
    """
    some = eqxi.unvmap_any(start.needs)
    leaves = jtu.tree_leaves(chain.rows)
    count = 1 if len(leaves) == 0 else len(leaves[0])
    nbytes = sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(parts))
    stores = 1 < count and count * nbytes <= _most_bytes

    def make_round(parts, x):
        after, _ = all_of(chain.make_round(terms, args, x[0]), parts)
        return after, parts if stores else None

    def make():
        first = start.parts()
        if not stores and not start.tells_errors:
            return tree_zeros_like(as_trees(parts)), first
        after, stages = scan_rounds(chain, make_round, first)
        off = jtu.tree_map(jnp.subtract, as_trees(parts), as_trees(after))
        return off, stages if stores else first

    def pass_by():
        off = tree_zeros_like(as_trees(parts))
        if not stores:
            return off, parts
        _, stages = jax.eval_shape(make)
        return off, tree_zeros_of(stages)

    off, known = lax.cond(some, make, pass_by)
    if stores:

        def stored(updates, stage, parts):
            before, _ = all_of(updates, stage)
            return tree_select(start.needs, before, parts)

        return Again(start.needs, jtu.tree_map(lambda x: x[0], known), off, known, stored)

    def up_to(updates, i):
        if count == 1:
            return all_of(updates, known)[0]
        again = lambda i, parts: make_round(parts, (read_row(chain.rows, i),))[0]
        return all_of(updates, lax.fori_loop(0, i, again, known))[0]

    def computed(updates, i, parts):
        before = lambda: tree_select(start.needs, up_to(updates, i), parts)
        return lax.cond(some, before, lambda: parts)

    stages = jnp.arange(count) if count > 1 else None
    return Again(start.needs, known, off, stages, computed)
