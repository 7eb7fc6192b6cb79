import jax


# Strict, so that nothing is promoted by accident; `test_precision.py` uses float32 too.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
