"""The precision of floating-point arrays, real or complex.

Results are Python floats, which have no dtype: before NumPy 2, a power of a NumPy scalar in
single precision has double precision.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def eps(x: ArrayLike) -> float:
    """The spacing of floats at 1."""
    return float(jnp.finfo(jnp.result_type(x)).eps)


def as_floats(*times: ArrayLike) -> list[Float[Array, ""]]:
    """Times in one precision. `diffeqsolve` has floats only, but `step` and `backward_step`
    may be given integers."""
    is_float = lambda t: jnp.issubdtype(jnp.result_type(t), jnp.floating)
    floats = [t for t in times if is_float(t)]
    dtype = jnp.result_type(*floats) if len(floats) > 0 else float
    return [jnp.asarray(t, dtype) for t in times]


def finest(xs: Iterable[Array]) -> Any:
    """The dtype of the highest precision among arrays of real numbers."""
    return max((x.dtype for x in xs), key=lambda dtype: dtype.itemsize)


def for_sums(dtype: Any) -> Any:
    """The dtype for sums over many: half precision has too few digits and overflows."""
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def tiny(x: ArrayLike) -> float:
    """The smallest normal number."""
    return float(jnp.finfo(jnp.result_type(x)).tiny)
