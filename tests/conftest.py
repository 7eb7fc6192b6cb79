import jax
import pytest


# Strict, so that nothing is promoted by accident; some tests use float32 as well.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def clear_caches():
    """Hundreds of compiled gradients in one process exhaust its memory maps."""
    yield
    jax.clear_caches()
