"""Rooted trees, and the functions of them that occur in order conditions.

A tree is the sorted tuple of its sub-trees: `()` is the single vertex and `((),)` the tree
with two vertices.

Reference: Hairer, Lubich & Wanner (2006), *Geometric Numerical Integration*, section III.1,
doi:10.1007/3-540-30666-8.
"""

import functools as ft
import itertools as it
import math
from typing import TypeAlias

import numpy as np


RootedTree: TypeAlias = tuple["RootedTree", ...]


def _partitions(total: int, largest: int):
    """Every way to write `total` as a non-increasing sum of integers `<= largest`."""
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)


@ft.cache
def rooted_trees(order: int) -> tuple[RootedTree, ...]:
    """All rooted trees with `order` vertices; their number is 1, 1, 2, 4, 9, 20, 48, ..."""
    out = set()
    for orders in _partitions(order - 1, order - 1):
        forests = [
            it.combinations_with_replacement(rooted_trees(k), len(tuple(group)))
            for k, group in it.groupby(orders)
        ]
        for forest in it.product(*forests):
            out.add(tuple(sorted(it.chain.from_iterable(forest))))
    return tuple(sorted(out))


def trees_up_to(order: int) -> tuple[RootedTree, ...]:
    """All rooted trees with at most `order` vertices."""
    return tuple(it.chain.from_iterable(map(rooted_trees, range(1, order + 1))))


def tall_tree(order: int) -> RootedTree:
    """The tree without branches, the only one that counts on `y' = λ y`."""
    return () if order == 1 else (tall_tree(order - 1),)


@ft.cache
def order_of(tree: RootedTree) -> int:
    """The number of vertices, |τ|."""
    return 1 + sum(map(order_of, tree))


@ft.cache
def density(tree: RootedTree) -> int:
    """γ(τ) = |τ| Π γ(children): the exact solution has elementary weight 1/γ(τ)."""
    return order_of(tree) * math.prod(map(density, tree))


def elementary_weights(stages: np.ndarray, order: int) -> dict[RootedTree, np.ndarray]:
    """The elementary weight of every stage derivative, for every tree up to `order`.

    **Arguments:**

    - `stages`: the Runge–Kutta matrix, shape `(s, s)`; row `i` holds the weights of the
        stage derivatives in the argument of stage `i`.
    - `order`: the largest number of vertices.

    **Returns:**

    A dictionary from tree to an array of shape `(s,)`. The elementary weight of
    `h Σ b_i u_i` is then `b @ weights[tree]`.
    """
    weights: dict[RootedTree, np.ndarray] = {}
    for tree in trees_up_to(order):
        weights[tree] = np.ones(len(stages))
        for child in tree:
            weights[tree] = weights[tree] * (stages @ weights[child])
    return weights
