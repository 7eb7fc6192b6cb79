"""A PyTree in few arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Shaped


# Larger arrays stay as they are, as packing copies.
_most_entries = 64


class Packed(eqx.Module):
    """A PyTree whose small arrays share one for each dtype.

    To write and to read a row of every array takes XLA a kernel each. The states of a
    solver and a controller have some twenty arrays, most of them scalars.
    """

    large: list[Array]
    small: dict[str, Shaped[Array, " entries"]]

    @staticmethod
    def of(tree: PyTree[Array]) -> "Packed":
        large, small = [], {}
        for leaf in jtu.tree_leaves(tree):
            if _is_small(leaf):
                small.setdefault(leaf.dtype.name, []).append(leaf.reshape(-1))
            else:
                large.append(leaf)
        return Packed(large, {name: jnp.concatenate(x) for name, x in small.items()})

    def unpack(self, like: PyTree[Array | jax.ShapeDtypeStruct]) -> PyTree[Array]:
        """The PyTree, with the structure of `like`."""
        leaves, structure = jtu.tree_flatten(like)
        large, begin, unpacked = iter(self.large), dict.fromkeys(self.small, 0), []
        for leaf in leaves:
            if _is_small(leaf):
                name = leaf.dtype.name
                end = begin[name] + leaf.size
                entries = self.small[name][begin[name] : end]
                begin[name] = end
                unpacked.append(entries.reshape(leaf.shape))
            else:
                unpacked.append(next(large))
        return jtu.tree_unflatten(structure, unpacked)


def _is_small(x: Array | jax.ShapeDtypeStruct) -> bool:
    return x.size <= _most_entries and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
