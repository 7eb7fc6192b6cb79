"""Order conditions, independent of the kind of method."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from .rooted_trees import density, order_of, rooted_trees, RootedTree, trees_up_to


# Published coefficients have 15 or more digits; a wrong digit shows far above this.
tolerance = 1e-11

Target: TypeAlias = Callable[[RootedTree], float]


def exact_value(tree: RootedTree) -> float:
    """The elementary weight of the solution at the end of a step."""
    return 1 / density(tree)


def exact_derivative(tree: RootedTree) -> float:
    """The elementary weight of its derivative there, times the length of the step."""
    return order_of(tree) / density(tree)


def largest_residual(
    weights: np.ndarray,
    phi: dict[RootedTree, np.ndarray],
    target: Target,
    trees: Iterable[RootedTree],
) -> float:
    """The largest residual of the order conditions for `h Σ weights[i] u_i`."""
    return max(abs(float(weights @ phi[tree]) - target(tree)) for tree in trees)


def null_space_of(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the null space, one vector per column."""
    scaled = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    _, singular_values, vt = np.linalg.svd(scaled)
    return vt[np.sum(singular_values > 1e-9) :].T


def error_functional(
    phi: dict[RootedTree, np.ndarray],
    embedded_order: int,
    error_scale: float,
    extra: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """Weights of an error estimate, zero if there is none.

    They annihilate every tree of order up to `embedded_order`, and `extra`. Among all
    solutions this is the one that is most nearly parallel, for its size, to the Taylor term
    `h^(q+1) y^(q+1) / (q+1)!` with `q = embedded_order`. It is scaled to `error_scale` of
    that term.

    **Arguments:**

    - `phi`: the elementary weights of the stages, for the trees that count.
    """
    conditions = [phi[tree] for tree in trees_up_to(embedded_order) if tree in phi]
    null_space = null_space_of(np.stack([*conditions, *extra]))
    leading = [tree for tree in rooted_trees(embedded_order + 1) if tree in phi]
    matrix = np.stack([phi[tree] for tree in leading])
    taylor = np.array([exact_value(tree) for tree in leading])
    direction = null_space @ (null_space.T @ (matrix.T @ taylor))
    size = (matrix @ direction) @ taylor / (taylor @ taylor)
    if null_space.shape[1] == 0 or abs(size) <= tolerance:
        return np.zeros(matrix.shape[1])
    return error_scale / size * direction
