"""Functions with everything that they depend on as leaves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree


def close(fn: Callable, *args, **kwargs) -> Callable:
    """`fn` with everything it depends on as leaves, for calls as `fn(*args, **kwargs)`."""
    # Equinox passes a function without a closure through, although its arguments may
    # contain functions with one.
    return eqx.filter_closure_convert(lambda *a, **k: fn(*a, **k), *args, **kwargs)


def has_tracers(closed: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(closed))


def as_arrays(tree: PyTree) -> PyTree[Array]:
    return jtu.tree_map(jnp.asarray, tree)


def structs_of(leaves: list[Any]) -> list[Any]:
    """Shapes, dtypes and shardings in place of arrays, among leaves of any kind."""
    arrays, others = eqx.partition(leaves, eqx.is_array)
    return eqx.combine(jax.eval_shape(lambda: arrays), others)
