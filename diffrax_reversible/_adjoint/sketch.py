"""A few numbers for each array, which tell how far two gradients differ."""

import math

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree


# The numbers for each array. With so many, the estimate of a distance is off by more than a
# factor of two in one case of a hundred, and in five for matrices of rank one.
_count = 16

Sketch = Float[Array, " numbers"]


def sketch(tree: PyTree[Array]) -> list[Sketch]:
    """The sums of the entries of each array with random signs, always the same ones; small
    arrays as they are.

    The mean square of such a sum is the square of the Euclidean norm of the array (Alon,
    Matias & Szegedy 1996, DOI 10.1145/237814.237823), and sums are linear. So the
    difference of two sketches tells the distance of the arrays, which need not both be in
    memory. The sign of an entry is that of its row times that of its column, which takes a
    product of matrices, and no copy of the array.
    """
    return [_of_array(x) for x in jtu.tree_leaves(tree)]


def _of_array(x: Array) -> Sketch:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([_of_array(x.real), _of_array(x.imag)])
    if x.size <= _count:
        return jnp.ravel(x)
    rows = x.reshape(-1, x.shape[-1])
    if min(rows.shape) < _count:
        width = math.isqrt(x.size - 1) + 1
        rows = jnp.pad(jnp.ravel(x), (0, width**2 - x.size)).reshape(width, width)
    left, right = (_signs(n, i).astype(x.dtype) for i, n in enumerate(rows.shape))
    sums = jnp.matmul(rows, right, precision=lax.Precision.HIGHEST)
    return jnp.sum(left * sums, axis=0)


def _signs(count: int, axis: int) -> Array:
    """Random signs for each index along one of two axes, by the last round of
    MurmurHash3."""
    h = 2 * jnp.arange(count, dtype=jnp.uint32) + axis
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    h = h ^ (h >> 16)
    bits = (h[:, None] >> jnp.arange(_count, dtype=jnp.uint32)[None]) & 1
    return 2 * bits.astype(jnp.int32) - 1


def alike(
    first: list[Sketch],
    second: list[Sketch],
    tol: float,
) -> Bool[Array, ""]:
    """Whether all arrays differ by no more than this fraction of the norm of the second."""

    def one(a, b):
        scale = jnp.max(jnp.maximum(jnp.abs(a), jnp.abs(b)), initial=0)
        scale = jnp.where(scale == 0, 1, scale)
        norm = lambda x: jnp.sqrt(jnp.sum((x / scale) ** 2))
        return norm(a - b) <= tol * norm(b)

    pairs = zip(first, second, strict=True)
    return jnp.stack([jnp.array(True), *(one(a, b) for a, b in pairs)]).all()
