"""PyTrees in few arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrax_reversible._adjoint.packed import Packed
from diffrax_reversible._tree import read_row, write_row


def test_packed():
    """Small arrays share one for each dtype, large ones stay, and all come back."""
    tree = {
        "scalars": (jnp.array(1.5), jnp.array(True), jnp.array(3), None),
        "matrix": jnp.arange(6.0).reshape(2, 3),
        "single": jnp.array([0.1, 0.2], jnp.float32),
        "complex": jnp.array([1 + 2j]),
        "empty": jnp.zeros((0, 2)),
        "large": jnp.arange(100.0),
        "flags": jnp.array([False, True]),
    }
    packed = Packed.of(tree)
    assert [x.size for x in packed.large] == [100]
    sizes = {name: x.size for name, x in packed.small.items()}
    assert sizes == dict(float64=7, bool=3, int64=1, float32=2, complex128=1)
    unpacked = packed.unpack(jax.eval_shape(lambda: tree))
    assert jax.tree.structure(unpacked) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(unpacked), jax.tree.leaves(tree), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


def test_rows_of_a_batch():
    """Every member writes a row of its own, if it is to, and reads it."""
    rows = jnp.zeros((3, 4, 2)), jnp.zeros((3, 4), bool)
    row = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.ones(3, bool)
    places, writes = jnp.array([3, 0, 2]), jnp.array([True, True, False])
    written = jax.vmap(write_row)(rows, places, row, writes)
    for new, x in zip(jax.vmap(read_row)(written, places), row, strict=True):
        np.testing.assert_array_equal(new, x.at[2].set(jnp.zeros_like(x[2])))
    assert [jnp.count_nonzero(x) for x in written] == [4, 2]
