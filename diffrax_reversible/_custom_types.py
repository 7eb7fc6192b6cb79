"""Type aliases; those that Diffrax defines too are imported from it."""

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

# Rebuilds `(terms, args)` from their differentiated leaves.
Combine: TypeAlias = Callable[[Params], tuple[Terms, Args]]
