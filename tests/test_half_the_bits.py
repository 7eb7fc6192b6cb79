"""Numbers in half their bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible._tree import from_half_the_bits, to_half_the_bits


@pytest.mark.parametrize(
    "dtype, bits, error",
    (
        (jnp.float64, 32, 2.0**-20),
        (jnp.float32, 16, 2.0**-7),
        (jnp.float16, 16, 0.0),
        (jnp.bfloat16, 16, 0.0),
    ),
)
def test_range_and_digits(dtype, bits, error):
    """They keep their range, and are rounded down."""
    info = jnp.finfo(dtype)
    x = jnp.array([0, info.tiny, 0.3, 1, 1.999, info.max, jnp.inf], dtype)
    half = to_half_the_bits(x)
    assert half.dtype.itemsize * 8 == bits
    back = from_half_the_bits(half, x)
    assert back.dtype == dtype
    new, old = np.asarray(back, np.float64), np.asarray(x, np.float64)
    assert np.all(new <= old)
    np.testing.assert_allclose(new, old, rtol=error)
