"""A step as a chain of couplings, each of which undoes itself."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, Combine, Params, Terms
from .._tree import tree_add, tree_scale


# The state and the solver state of a step, in parts of which a coupling updates one.
Parts = tuple[PyTree[Array], ...]


class Coupling(NamedTuple):
    """An update of one part of the state by a function of the other parts:

        x[target] <- scale * x[target] + increment(*others)

    where `others` are all parts but the `target`, in their order. Whatever the `increment`
    is, this is undone by evaluating it once more,

        x[target] <- (x[target] - increment(*others)) / scale

    and cotangents are pulled back through that same evaluation. So the blocks of NICE,
    RevNets and RealNVP are made, the kicks and drifts of splitting methods, and leapfrog.

    **Arguments:**

    - `target`: the index of the part that is updated.
    - `increment`: takes the other parts. It has to return arrays of the structure, shapes
        and dtypes of the `target`.
    - `scale`: a number that is not zero. Rounding errors of the walk back grow by
        `1 / abs(scale)`.

    ??? cite "Reference"

        Dinh, Krueger & Bengio (2015), arXiv:1410.8516; Gomez, Ren, Urtasun & Grosse
        (2017), arXiv:1707.04585.
    """

    target: int
    increment: Callable[..., PyTree[Array]]
    scale: float = 1.0


# The chain of a step as a function of what it is differentiated by.
MakeChain = Callable[[Terms, Args], Sequence[Coupling]]


def run(chain: Sequence[Coupling], parts: Parts) -> Parts:
    """Make every update of a chain."""
    for coupling in chain:
        _check(coupling, parts)
        increment = coupling.increment(*_others(parts, coupling))
        _check_increment(coupling, parts, increment)
        update = tree_add(_scaled(coupling.scale, parts[coupling.target]), increment)
        parts = _with(parts, coupling, update)
    return parts


def undo(chain: Sequence[Coupling], parts: Parts) -> Parts:
    """Undo every update of a chain."""
    for coupling in reversed(chain):
        increment = coupling.increment(*_others(parts, coupling))
        parts = _with(parts, coupling, _undone(coupling, parts, increment))
    return parts


def undo_and_pull(
    make_chain: MakeChain,
    combine: Combine,
    params: Params,
    parts: Parts,
    bars: Parts,
    params_bar: Params,
) -> tuple[Parts, Parts, Params]:
    """Undo every update of a chain and pull cotangents back through it, with one evaluation
    and one pull-back of each increment.

    **Arguments:**

    - `combine`, `params`: `make_chain(*combine(params))` is the chain.
    - `parts`, `bars`: after the chain, and their cotangents.
    - `params_bar`: the cotangent of `params` so far.

    **Returns:**

    The parts and the cotangents before the chain, and the cotangent of `params`.
    """
    chain = make_chain(*combine(params))
    for i in reversed(range(len(chain))):
        coupling = chain[i]
        others = _others(parts, coupling)

        def increment(others, params, i=i):
            return make_chain(*combine(params))[i].increment(*others)

        increased, pull = jax.vjp(increment, others, params)
        bar = bars[coupling.target]
        others_bar, more_params_bar = pull(bar)
        bars = tuple(
            tree_add(b, o) for b, o in zip(_others(bars, coupling), others_bar, strict=True)
        )
        bars = _insert(bars, coupling.target, _scaled(coupling.scale, bar))
        params_bar = tree_add(params_bar, more_params_bar)
        parts = _with(parts, coupling, _undone(coupling, parts, increased))
    return parts, bars, params_bar


def _others(parts: Parts, coupling: Coupling) -> Parts:
    return parts[: coupling.target] + parts[coupling.target + 1 :]


def _insert(others: Parts, target: int, part: PyTree[Array]) -> Parts:
    return (*others[:target], part, *others[target:])


def _with(parts: Parts, coupling: Coupling, part: PyTree[Array]) -> Parts:
    return _insert(_others(parts, coupling), coupling.target, part)


def _scaled(scale: float, x: PyTree[Array]) -> PyTree[Array]:
    return x if scale == 1 else tree_scale(scale, x)


def _undone(coupling: Coupling, parts: Parts, increment: PyTree[Array]) -> PyTree[Array]:
    rest = jtu.tree_map(jnp.subtract, parts[coupling.target], increment)
    return _scaled(1 / coupling.scale, rest)


def _check(coupling: Coupling, parts: Parts) -> None:
    """Raise an error unless the update can be undone."""
    target, _, scale = coupling
    if not isinstance(scale, int | float) or scale == 0 or not math.isfinite(scale):
        raise ValueError(
            f"`Coupling({target}, ..., scale={scale})` has to scale by a number that is "
            "not zero, known when the solve is compiled, for it to be undone. What depends "
            "on `args` or on the step belongs into the `increment`."
        )
    if not 0 <= target < len(parts):
        raise ValueError(
            f"`Coupling({target}, ...)` has to name one of the {len(parts)} parts of the "
            "state by its index, from zero on."
        )


def _check_increment(coupling: Coupling, parts: Parts, increment: PyTree[Array]) -> None:
    target = coupling.target
    part = parts[target]
    if _shapes(increment) != _shapes(part):
        raise ValueError(
            f"The increment of `Coupling({target}, ...)` has to return arrays like the "
            f"part {target} of the state, of the structure, shapes and dtypes "
            f"{_shapes(part)}, and returned {_shapes(increment)}."
        )


def _shapes(tree: PyTree) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x).name) for x in leaves]
