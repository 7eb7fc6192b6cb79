"""Type aliases, in Diffrax's sense of the names."""

from collections.abc import Callable
from typing import Any, TypeAlias

from diffrax import AbstractTerm
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Real


Args: TypeAlias = PyTree[Any]
BoolScalarLike: TypeAlias = bool | Bool[ArrayLike, ""]
DenseInfo: TypeAlias = dict[str, PyTree[Array]]
FloatScalarLike: TypeAlias = float | Float[ArrayLike, ""]
IntScalarLike: TypeAlias = int | Int[ArrayLike, ""]
Params: TypeAlias = PyTree[Array]
RealScalarLike: TypeAlias = float | int | Real[ArrayLike, ""]
SolverState: TypeAlias = PyTree[Any]
Terms: TypeAlias = PyTree[AbstractTerm]
VF: TypeAlias = PyTree[Array]
Y: TypeAlias = PyTree[Array]

# Rebuilds `(terms, args)` from those of their leaves that are differentiated.
Bind: TypeAlias = Callable[[Params], tuple[Terms, Args]]
