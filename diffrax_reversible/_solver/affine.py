"""Functions that are seen to be affine."""

from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jax.interpreters import partial_eval
from jaxtyping import Array, PyTree


def is_affine(fn: Callable[..., PyTree[Array]], *point: PyTree[Array]) -> bool:
    """Whether the derivative of `fn(*point)` is seen not to depend on the point: whether no
    operation makes it from the point. It is not seen of all that are affine."""

    def derivative(point, direction):
        return jax.jvp(fn, point, direction)[1]

    jaxpr = jax.make_jaxpr(derivative)(point, point).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return not any(used[: len(jtu.tree_leaves(point))])
