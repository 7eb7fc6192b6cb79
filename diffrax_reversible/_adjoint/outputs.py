"""The cotangents of the outputs of a solve."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import SubSaveAt
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike


# The cotangents of the time and the value of one output. The former is `None` if no times
# are differentiated.
Row = tuple[Float[Array, ""] | None, PyTree[Array]]


class Cursor(eqx.Module):
    """The numbers of outputs and of `ts` of a `SubSaveAt` that are still to be read."""

    save_index: IntScalarLike
    ts_index: IntScalarLike


class Output(eqx.Module):
    """The cotangents of the outputs of one `SubSaveAt`."""

    sub: SubSaveAt
    rows: tuple[Float[Array, " rows"] | None, PyTree[Array]]
    # The index of its function in `Context.save_fns`.
    index: int = eqx.field(static=True)
    saves_state: bool = eqx.field(static=True)

    def row(self, i: IntScalarLike, written: BoolScalarLike = True) -> Row:
        """The cotangent of the `i`-th output, zero unless it was `written`."""

        def get(rows):
            row = lax.dynamic_index_in_dim(rows, i, keepdims=False)
            return row if written is True else jnp.where(written, row, 0)

        return jtu.tree_map(get, self.rows)

    def rows_from(self, start: IntScalarLike, written: Bool[Array, " count"]) -> Row:
        """The cotangents of several outputs, zero unless they were `written`."""

        def get(rows):
            some = lax.dynamic_slice_in_dim(rows, start, len(written))
            return jnp.where(written[(...,) + (None,) * (rows.ndim - 1)], some, 0)

        return jtu.tree_map(get, self.rows)


def materialise(cotangent: PyTree, like: PyTree) -> PyTree[Array]:
    """Zeros for the leaves of `like` that have no cotangent."""
    return jtu.tree_map(
        lambda l, c: jnp.zeros(l.shape, l.dtype) if c is None else c,
        eqx.filter(like, lambda l: jnp.issubdtype(l.dtype, jnp.inexact)),
        cotangent,
    )
