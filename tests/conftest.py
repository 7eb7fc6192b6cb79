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


@pytest.fixture(scope="module")
def compile_quickly(clear_caches):
    """Where compiling takes the time, and neither the last bit nor running matters."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
