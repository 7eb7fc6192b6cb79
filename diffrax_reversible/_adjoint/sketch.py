"""A few numbers for each array, which tell how far two gradients differ."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree


# The numbers for each array. With so many, the estimate of a distance is off by more than a
# factor of two in one case of fifty.
_count = 8


def sketch(tree: PyTree[Array]) -> list[Float[Array, " numbers"]]:
    """The sums of the entries of each array with random signs, always the same ones; small
    arrays as they are.

    The mean square of such a sum is the square of the Euclidean norm of the array (Alon,
    Matias & Szegedy 1996, DOI 10.1145/237814.237823), and sums are linear. So the
    difference of two sketches tells the distance of the arrays, which need not both be in
    memory.
    """
    return [_of_array(x) for x in jtu.tree_leaves(tree)]


def _of_array(x: Array) -> Float[Array, " numbers"]:
    x = jnp.ravel(x)
    if jnp.iscomplexobj(x):
        x = jnp.concatenate([x.real, x.imag])
    if x.size <= _count:
        return x
    bits = _hash(jnp.arange(x.size, dtype=jnp.uint32))
    signed = (jnp.where((bits >> k) & 1 == 1, x, -x) for k in range(_count))
    return jnp.stack([jnp.sum(s, dtype=x.dtype) for s in signed])


def _hash(i: Array) -> Array:
    """Random bits for every index: the last round of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        i = (i ^ (i >> shift)) * jnp.uint32(factor)
    return i ^ (i >> 16)


def alike(
    first: list[Float[Array, " numbers"]],
    second: list[Float[Array, " numbers"]],
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
