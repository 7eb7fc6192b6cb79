"""A few numbers for each array, which tell how far two gradients differ."""

import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import RealScalarLike


# The numbers for each array. With so many, the estimate of a distance is off by more than a
# factor of two in one case of a hundred, and in five for matrices of rank one.
_count = 16
# Arrays of at most so many entries take all numbers at once.
_small = 4096

Sketch = Float[Array, " numbers"]


def sketch(tree: PyTree[Array]) -> list[Sketch]:
    """The sums of the entries of each array with random signs, always the same ones, over
    the square root of their number; small arrays as they are.

    The mean square of such a sum is the square of the Euclidean norm of the array (Alon,
    Matias & Szegedy 1996, DOI 10.1145/237814.237823), and sums are linear. So the norm of
    the sketch estimates that of the array, and the difference of two sketches tells the
    distance of the arrays, which need not both be in memory. In a matrix, the sign of an
    entry is that of its row times that of its column, which takes a product of matrices,
    and no copy of the array.
    """
    return [_of_array(x) for x in jtu.tree_leaves(tree)]


def _of_array(x: Array) -> Sketch:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([_of_array(x.real), _of_array(x.imag)])
    if x.size <= _count:
        return jnp.ravel(x)
    indices = ft.partial(jnp.arange, dtype=jnp.uint32)
    rows = x.reshape(-1, x.shape[-1])
    if min(rows.shape) < _count:
        # Entry by entry, so that an array that is sharded over devices stays so.
        index = sum(
            lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
            for axis, stride in enumerate(_strides(x.shape))
        )
        # XLA compiles no loop for small arrays, and holds no signs.
        of_all = jax.vmap if x.size <= _small else lambda fn: ft.partial(lax.map, fn)
        number = lambda i: jnp.sum(x * _signs(_count * index + i, x))
        return of_all(number)(indices(_count)) / math.sqrt(_count)
    left, right = (
        _signs(_count * (2 * indices(n)[:, None] + axis) + indices(_count)[None], x)
        for axis, n in enumerate(rows.shape)
    )
    sums = jnp.matmul(rows, right, precision=lax.Precision.HIGHEST)
    return jnp.sum(left * sums, axis=0) / math.sqrt(_count)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _signs(h: Array, like: Array) -> Array:
    """A random sign for each integer, by the last round of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return 1 - 2 * ((h ^ (h >> 16)) & 1).astype(like.dtype)


def norm(sketch: Sketch, scale: Float[Array, ""]) -> Float[Array, ""]:
    """The Euclidean norm of the array, as a multiple of the `scale`."""
    largest = jnp.max(jnp.abs(sketch), initial=0)
    # Squares of small numbers would be zero.
    size = jnp.sqrt(jnp.sum((sketch / jnp.where(largest == 0, 1, largest)) ** 2))
    return jnp.where(largest == 0, 0, size * (largest / scale))


def alike(first: Sketch, second: Sketch, tol: RealScalarLike) -> Bool[Array, ""]:
    """Whether two arrays differ by no more than this fraction of the norm of the second."""
    scale = jnp.max(jnp.maximum(jnp.abs(first), jnp.abs(second)), initial=0)
    return norm(first - second, scale) <= tol * norm(second, scale)
