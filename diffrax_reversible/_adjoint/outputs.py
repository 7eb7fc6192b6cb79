"""The cotangents of what a solve has saved."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import SubSaveAt
from jaxtyping import Array, Float, PyTree

from .._custom_types import BoolScalarLike, IntScalarLike


# The cotangents of the time and of the state, or what was made of it, of one output: the
# former is `None` if no times are differentiated.
Row = tuple[Float[Array, ""] | None, PyTree[Array]]


class Cursor(eqx.Module):
    """How many outputs, and how many of its `ts`, a `SubSaveAt` has left to read."""

    save_index: IntScalarLike
    ts_index: IntScalarLike


class Output(eqx.Module):
    """The cotangent of what one `SubSaveAt` wrote."""

    sub: SubSaveAt
    rows: tuple[Float[Array, " rows"] | None, PyTree[Array]]
    # Which of `Context.save_fns` made it.
    index: int = eqx.field(static=True)
    saves_state: bool = eqx.field(static=True)

    def row(self, i: IntScalarLike, written: BoolScalarLike = True) -> Row:
        """The cotangent of the `i`-th output, zero unless it was `written`."""

        def get(rows):
            row = lax.dynamic_index_in_dim(rows, i, keepdims=False)
            return row if written is True else jnp.where(written, row, 0)

        return jtu.tree_map(get, self.rows)

    def sum_of_rows(self, start: IntScalarLike, count: int, written: BoolScalarLike) -> Row:
        """The sum of the cotangents of `count` outputs, zero unless they were `written`."""

        def get(rows):
            i = jnp.arange(len(rows))
            among = written & (i >= start) & (i < start + count)
            among = among[(...,) + (None,) * (rows.ndim - 1)]
            return jnp.sum(jnp.where(among, rows, 0), axis=0)

        return jtu.tree_map(get, self.rows)


def materialise(cotangent: PyTree, like: PyTree) -> PyTree[Array]:
    """Zeros for the leaves of `like` that have no cotangent."""
    return jtu.tree_map(
        lambda l, c: jnp.zeros(l.shape, l.dtype) if c is None else c,
        eqx.filter(like, lambda l: jnp.issubdtype(l.dtype, jnp.inexact)),
        cotangent,
    )
