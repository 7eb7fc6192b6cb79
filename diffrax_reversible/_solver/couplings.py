"""A step as a chain of couplings, each of which can be undone."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, Terms
from .chain import Chain, Update


class Coupling(NamedTuple):
    """An update of one part of the state by a function of the others, for the steps of an
    `AbstractCouplingSolver`:

        x[target] <- scale * x[target] + increment(*others)

    where `others` are all parts except the `target`, in their order. It is undone by
    evaluating the `increment`, an arbitrary function, once more,

        x[target] <- (x[target] - increment(*others)) / scale

    and cotangents are pulled back through that same evaluation. Couplings are the blocks of
    NICE, RevNets and RealNVP, the kicks and drifts of splitting methods, and leapfrog.

    **Arguments:**

    - `target`: the index of the part that is updated.
    - `increment`: a function of the other parts. It has to return arrays of the structure,
        shapes and dtypes of the `target`.
    - `scale`: a number that is not zero. Rounding errors of the backward pass grow by
        `1 / abs(scale)`.

    Example:

    >>> from diffrax_reversible import Coupling
    >>> kick = Coupling(1, lambda q: -0.1 * q)
    >>> q, p = 1.0, 0.5
    >>> p = kick.scale * p + kick.increment(q)
    >>> print(p, (p - kick.increment(q)) / kick.scale)
    0.4 0.5

    References: Dinh, Krueger & Bengio (2015), arXiv:1410.8516; Gomez, Ren, Urtasun & Grosse
    (2017), arXiv:1707.04585.
    """

    target: int
    increment: Callable[..., PyTree[Array]]
    scale: float = 1.0


def as_chain(
    couplings: Callable[[Terms, Args], Sequence[Coupling]], parts: tuple[PyTree[Array], ...]
) -> Chain:
    """The couplings as a chain, for a state in these parts."""

    def as_update(coupling: Coupling) -> Update:
        _check(coupling, parts)

        def evaluate(*others):
            increment = coupling.increment(*others)
            _check_increment(coupling, parts, increment)
            return increment, None

        return Update(coupling.target, evaluate, coupling.scale)

    def make_round(terms: Terms, args: Args, row: None):
        del row
        return [as_update(coupling) for coupling in couplings(terms, args)]

    return Chain(make_round)


def _check(coupling: Coupling, parts: tuple[PyTree[Array], ...]) -> None:
    """Raise an error unless the update can be undone."""
    target, _, scale = coupling
    if not isinstance(scale, int | float) or scale == 0 or not math.isfinite(scale):
        raise ValueError(
            f"`Coupling({target}, ..., scale={scale})` can be undone only if it scales by "
            "a finite number that is not zero, known when the solve is compiled. Put "
            "dependence on `args` or on the step into the `increment`."
        )
    if not 0 <= target < len(parts):
        raise ValueError(
            f"`Coupling({target}, ...)`: the index has to name one of the {len(parts)} "
            "parts of the state, from zero on."
        )


def _check_increment(
    coupling: Coupling, parts: tuple[PyTree[Array], ...], increment: PyTree[Array]
) -> None:
    target = coupling.target
    part = parts[target]
    if _shapes(increment) != _shapes(part):
        raise ValueError(
            f"The increment of `Coupling({target}, ...)` has to return arrays like part "
            f"{target} of the state, of structure, shapes and dtypes {_shapes(part)}, but "
            f"returned {_shapes(increment)}."
        )


def _shapes(tree: PyTree) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x).name) for x in leaves]
