"""Arithmetic on PyTrees, each leaf in its own dtype."""

import functools as ft
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike


_Tree = TypeVar("_Tree")


def tree_scale(a: RealScalarLike, x: PyTree[Array]) -> PyTree[Array]:
    """`a x`."""
    return jtu.tree_map(lambda xi: jnp.asarray(a, xi.dtype) * xi, x)


def tree_axpy(a: RealScalarLike, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`a x + y`."""
    return jtu.tree_map(lambda xi, yi: jnp.asarray(a, yi.dtype) * xi + yi, x, y)


def tree_add(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`x + y`."""
    return jtu.tree_map(jnp.add, x, y)


def tree_outer(weights: Array | np.ndarray, x: PyTree[Array]) -> PyTree[Array]:
    """The product of every weight with `x`, stacked along a first axis."""

    def product(x):
        return jnp.asarray(weights, x.dtype).reshape((-1,) + (1,) * x.ndim) * x[None]

    return jtu.tree_map(product, x)


def tree_combine(weights: Array | np.ndarray, rows: PyTree[Array]) -> PyTree[Array]:
    """The sum of the rows of every array, times `weights`; the transpose of `tree_outer`.

    Several columns of weights give as many sums.
    """

    def combine(rows):
        return jnp.tensordot(jnp.asarray(weights, rows.dtype), rows, axes=(0, 0))

    return jtu.tree_map(combine, rows)


def tree_replace(where: Callable[[Any], Any], tree: Any, replacement: Any) -> Any:
    """`equinox.tree_at`, which here can replace `None` too."""
    return eqx.tree_at(where, tree, replacement, is_leaf=lambda x: x is None)


def tree_select(pred: BoolScalarLike, x: _Tree, y: _Tree) -> _Tree:
    """`x` if `pred`, otherwise `y`, leaf by leaf."""
    return jtu.tree_map(lambda x, y: jnp.where(pred, x, y), x, y)


def any_nonzero(tree: PyTree[Any]) -> BoolScalarLike:
    """Whether some entry of a floating-point array is not zero."""
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    return ft.reduce(jnp.logical_or, [jnp.any(x != 0) for x in leaves], False)


def tree_zeros_of(structs: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Zeros of the shapes and dtypes of `structs`."""
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structs)


def tree_cond(pred: BoolScalarLike, x: _Tree, y: _Tree) -> _Tree:
    """As `tree_select`, by a conditional.

    XLA compiles no kernels for a conditional, and one for every array that is selected. In
    a batch, JAX turns the conditional into selections.
    """
    return lax.cond(pred, lambda: x, lambda: y)


def _row_index(i: IntScalarLike) -> Int[Array, ""]:
    """`i >= 0`, unsigned: otherwise XLA spends instructions on indices that count from the
    end. Before JAX 0.7.2, members of a batch write nothing at unsigned indices."""
    i = jnp.asarray(i)
    return i if jax.__version_info__ < (0, 7, 2) else i.astype(jnp.uint32)


def read_row(rows: PyTree[Array], i: IntScalarLike) -> PyTree[Array]:
    """The `i`-th row of every array, for `i >= 0`."""
    i = _row_index(i)
    return jtu.tree_map(
        lambda rows: lax.dynamic_index_in_dim(rows, i, keepdims=False), rows
    )


def write_row(
    rows: PyTree[Array], i: IntScalarLike, row: PyTree[Array], pred: BoolScalarLike
) -> PyTree[Array]:
    """Replace the `i`-th row of every array, for `i >= 0`, if `pred`."""
    i = _row_index(i)
    row = tree_select(pred, row, read_row(rows, i))
    return jtu.tree_map(
        lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0), rows, row
    )


def tree_zeros_like(x: PyTree[Any]) -> PyTree[Any]:
    """Zeros for every floating-point array, `None` for every other leaf."""
    return jtu.tree_map(jnp.zeros_like, eqx.filter(x, eqx.is_inexact_array))


def largest(x: PyTree[Array]) -> PyTree[Float[Array, ""]]:
    """The largest magnitude in every array."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), x)


def larger(*xs: Array) -> Array:
    """The largest magnitude of several arrays, entry by entry."""
    return ft.reduce(jnp.maximum, map(jnp.abs, xs))


def sum_of_magnitudes(x: PyTree[Array], parts: Iterable[PyTree[Array]]) -> PyTree[Array]:
    """The sum of the magnitudes of `parts`, PyTrees like `x`; zeros if there are none."""
    zeros = jtu.tree_map(lambda x: jnp.zeros_like(jnp.abs(x)), x)
    add = lambda total, part: jtu.tree_map(lambda t, p: t + jnp.abs(p), total, part)
    return ft.reduce(add, parts, zeros)


def is_complex(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def real_like(x: Array) -> jax.ShapeDtypeStruct:
    """A real array of the shape and precision of `x`, which may be complex."""
    return jax.ShapeDtypeStruct(x.shape, jnp.finfo(x.dtype).dtype)


def to_real(x: PyTree[Array]) -> PyTree[Array]:
    """Complex arrays as their real and imaginary parts, stacked along a first axis."""
    return jtu.tree_map(lambda x: jnp.stack([x.real, x.imag]) if is_complex(x) else x, x)


def from_real(x: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """The inverse of `to_real`, in the dtypes of `like`."""
    return jtu.tree_map(lambda x, like: lax.complex(*x) if is_complex(like) else x, x, like)


def to_bits(x: PyTree[Array]) -> PyTree[Array]:
    """The bits as integers, which are neither differentiated nor compared in the backward
    pass.

    Real and imaginary parts are stacked along a first axis.
    """

    def convert(x):
        dtype: Any = np.dtype(f"int{8 * x.dtype.itemsize}")
        return lax.bitcast_convert_type(lax.stop_gradient(x), dtype)

    return jtu.tree_map(convert, to_real(x))


def from_bits(bits: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """The inverse of `to_bits`, in the dtypes of `like`."""

    def convert(bits, like):
        return lax.bitcast_convert_type(bits, real_like(like).dtype)

    return from_real(jtu.tree_map(convert, bits, like), like)


def to_half_the_bits(x: Array) -> Array:
    """The upper half of the bits of real numbers that are not negative, as integers.

    They have the same range, and two or six digits, rounded down. Numbers in half precision
    keep all.
    """
    bits, half = to_bits(x), 4 * x.dtype.itemsize
    return bits if half == 8 else (bits >> half).astype(f"int{half}")


def from_half_the_bits(bits: Array, like: Array) -> Array:
    """The inverse of `to_half_the_bits`, in the precision of `like`."""
    half = 4 * real_like(like).dtype.itemsize
    if half > 8:
        bits = bits.astype(f"int{2 * half}") << half
    return from_bits(bits, real_like(like))
