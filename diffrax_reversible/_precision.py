"""The precision of floating-point arrays, real or complex.

Results are Python floats, which have no dtype: before NumPy 2, a power of a NumPy scalar in
single precision has double precision.
"""

import jax.numpy as jnp
from jaxtyping import ArrayLike


def eps(x: ArrayLike) -> float:
    """The spacing of floats at 1."""
    return float(jnp.finfo(jnp.result_type(x)).eps)


def tiny(x: ArrayLike) -> float:
    """The smallest normal number."""
    return float(jnp.finfo(jnp.result_type(x)).tiny)
