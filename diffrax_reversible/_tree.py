"""Arithmetic on PyTrees, each leaf in its own dtype."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import RealScalarLike


def tree_scale(a: RealScalarLike, x: PyTree[Array]) -> PyTree[Array]:
    """`a x`."""
    return jtu.tree_map(lambda xi: jnp.asarray(a, xi.dtype) * xi, x)


def tree_axpy(a: RealScalarLike, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`a x + y`."""
    return jtu.tree_map(lambda xi, yi: jnp.asarray(a, yi.dtype) * xi + yi, x, y)


def tree_add(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`x + y`."""
    return jtu.tree_map(jnp.add, x, y)


def tree_zeros_like(x: PyTree[Any]) -> PyTree[Any]:
    """Zeros for every floating-point leaf, `None` for every other."""
    return jtu.tree_map(jnp.zeros_like, eqx.filter(x, eqx.is_inexact_array))
