"""A step as a chain of like parts."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree


_Carry = TypeVar("_Carry")


def scan(
    part: Callable[[_Carry, Any], _Carry],
    carry: _Carry,
    parts: PyTree,
    reverse: bool = False,
) -> _Carry:
    """`carry = part(carry, x)` for every `x` along the first axis of `parts`.

    Compiles faster than unrolling them, but if there is just one.
    """
    if len(jtu.tree_leaves(parts)[0]) == 1:
        return part(carry, jtu.tree_map(lambda x: x[0], parts))
    carry, _ = lax.scan(lambda c, x: (part(c, x), None), carry, parts, reverse=reverse)
    return carry
