"""Type aliases; those that Diffrax has too are Diffrax's own."""

from collections.abc import Callable
from typing import Any, TypeAlias

from diffrax import AbstractTerm
from jaxtyping import Array, PyTree

from ._diffrax import (
    Args as Args,
    BoolScalarLike as BoolScalarLike,
    IntScalarLike as IntScalarLike,
    RealScalarLike as RealScalarLike,
)


DenseInfo: TypeAlias = dict[str, PyTree[Array]]
Params: TypeAlias = PyTree[Array]
SolverState: TypeAlias = PyTree[Any]
Terms: TypeAlias = PyTree[AbstractTerm]
VF: TypeAlias = PyTree[Array]
Y: TypeAlias = PyTree[Array]

# `(terms, args)` from those of their leaves that are differentiated, and the others.
Combine: TypeAlias = Callable[[Params], tuple[Terms, Args]]
