"""A few numbers for each array, which tell how far two gradients differ."""

import functools as ft
import math

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, PyTree

from .._custom_types import RealScalarLike
from .._precision import finest, for_sums


# The numbers for each array. With so many, the estimate of a distance is off by more than a
# factor of two in one case of a hundred, and in five for matrices of rank one.
_count = 16
# At most so many signs are part of the compiled program, which has fewer kernels then.
_constants = 2**14

Sketch = Float[Array, "arrays numbers"]


def sketch(tree: PyTree[Inexact[Array, "..."]]) -> Sketch:
    """The sums of the entries of each array with random signs, always the same ones, over
    the square root of their number; small arrays as they are. A row for each array.

    The mean square of such a sum is the square of the Euclidean norm of the array (Alon,
    Matias & Szegedy 1996, DOI 10.1145/237814.237823), and sums are linear. So the norm of
    the sketch estimates that of the array, and the difference of two sketches tells the
    distance of the arrays, which need not both be in memory. In a matrix, the sign of an
    entry is that of its row times that of its column, which takes a product of matrices,
    and no copy of the array.
    """
    rows = [_of_array(x) for x in jtu.tree_leaves(tree)]
    if len(rows) == 0:
        return jnp.zeros((0, _count))
    dtype, width = finest(rows), max(map(len, rows))
    return jnp.stack([jnp.pad(x.astype(dtype), (0, width - len(x))) for x in rows])


def _of_array(x: Inexact[Array, "..."]) -> Float[Array, " numbers"]:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([_of_array(x.real), _of_array(x.imag)])
    dtype = for_sums(x.dtype)
    if x.size <= _count:
        return jnp.ravel(x).astype(dtype)
    product = ft.partial(
        jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    )
    rows = x.reshape(-1, x.shape[-1])
    if min(rows.shape) >= _count:
        left, right = (
            _signs(_count * (2 * _indices(n)[:, None] + axis) + _indices(_count)[None])
            for axis, n in enumerate(rows.shape)
        )
        sums = product(rows, right.astype(x.dtype))
        sums = jnp.sum(left.astype(dtype) * sums, axis=0)
    elif _count * x.size <= _constants:
        index = _count * _indices(x.size)[:, None] + _indices(_count)[None]
        sums = product(jnp.ravel(x), _signs(index).astype(x.dtype))
    else:
        # Entry by entry, so that an array that is sharded over devices stays so.
        index = sum(
            lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
            for axis, stride in enumerate(_strides(x.shape))
        )
        number = lambda i: jnp.sum(
            x * _signs(_count * index + i).astype(x.dtype), dtype=dtype
        )
        # XLA holds no signs.
        sums = lax.map(number, jnp.arange(_count, dtype=jnp.uint32))
    return sums / math.sqrt(_count)


def _indices(n: int) -> np.ndarray | Array:
    """Those of few entries are constants, and so are the signs made of them."""
    return (np if _count * n <= _constants else jnp).arange(n, dtype=np.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _signs(h: np.ndarray | Array) -> np.ndarray | Array:
    """A random sign for each integer, by the last round of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return 1 - 2 * ((h ^ (h >> 16)) & 1).astype(np.int8)


def norm(sketch: Sketch, scale: Float[Array, "#arrays"]) -> Float[Array, " arrays"]:
    """The Euclidean norm of each array, as a multiple of the `scale`."""
    largest = jnp.max(jnp.abs(sketch), axis=-1, initial=0)
    # Squares of small numbers would be zero.
    relative = sketch / jnp.where(largest == 0, 1, largest)[..., None]
    size = jnp.sqrt(jnp.sum(relative**2, axis=-1))
    return jnp.where(largest == 0, 0, size * (largest / scale))


def alike(first: Sketch, second: Sketch, tol: RealScalarLike) -> Bool[Array, " arrays"]:
    """Whether two arrays differ by no more than this fraction of the norm of the second."""
    scale = largest_number(first, second)
    return norm(first - second, scale) <= tol * norm(second, scale)


def largest_number(first: Sketch, second: Sketch) -> Float[Array, " arrays"]:
    """The largest number of both sketches of each array."""
    return jnp.max(jnp.maximum(jnp.abs(first), jnp.abs(second)), axis=-1, initial=0)
