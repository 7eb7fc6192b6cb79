import dataclasses
import functools
import gc
import inspect
import re

import diffrax as dfx
import equinox as eqx
import jax
import numpy as np
import pytest
from jax._src import compiler


# Strict, so that nothing is promoted by accident; some tests use float32 as well.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.__version_info__ < (0, 7):
    # So that errors are raised by the call that causes them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_make_parametrize_id(val):
    """Readable ids where pytest would only number the parameters: for solvers, controllers
    and other modules, arrays, and tuples and dictionaries of these. A tuple that begins
    with a function is a problem, named after its vector field."""
    if isinstance(val, type):
        return val.__name__
    if isinstance(val, dfx.AbstractStepSizeController):
        return type(val).__name__
    if dataclasses.is_dataclass(val):
        text = re.sub(r"\b(solver|coupling)=", "", repr(val))
        return text if len(text) < 50 and "\n" not in text else type(val).__name__
    if isinstance(val, jax.Array | np.ndarray):
        return str(val) if val.size == 1 else eqx.tree_pformat(val)
    if isinstance(val, tuple) and hasattr(val, "controller"):
        # A `Case`.
        val = val.solver, val.controller
    if isinstance(val, tuple) and val and inspect.isfunction(val[0]):
        val = val[:1]
    if isinstance(val, tuple | dict):
        if len(val) > 9:
            return f"{len(val)} parts"
        return ",".join(map(pytest_make_parametrize_id, val))
    return getattr(val, "__name__", str(val))


# Tracing creates millions of objects, and few become garbage. Looking for garbage took a
# third of the time of tracing, so it is collected only after each file.
gc.disable()


@pytest.fixture(autouse=True, scope="module")
def clear_caches():
    """Hundreds of compiled gradients in one process exhaust its memory maps."""
    yield
    jax.clear_caches()
    gc.collect()


# These options leave out the work that takes most of the compile time and is of no use in
# tests: large kernels, their division among threads, moving code out of loops, and a first
# round of simplifications, which is repeated anyway.
QUICK_OPTIONS = dict(
    xla_cpu_use_fusion_emitters=False,
    xla_cpu_parallel_codegen_split_count=1,
    xla_disable_hlo_passes="simplification,while-loop-invariant-code-motion",
)


@functools.cache
def quick_options():
    """The `QUICK_OPTIONS` that this version of XLA knows."""
    known = {}
    for name, value in QUICK_OPTIONS.items():
        try:
            jax.jit(lambda: 0.0, compiler_options={name: value}).lower().compile()
            known[name] = value
        except RuntimeError:
            pass
    return known


def quick_flags(*, optimised=False):
    """These options, as flags for a subprocess. Unless `optimised`, LLVM does little too,
    and programs run more slowly."""
    slow = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
    options = quick_options() | ({} if optimised else slow)
    return " ".join(f"--{name}={value}" for name, value in options.items())


@pytest.fixture(autouse=True)
def compile_quickly(request, monkeypatch):
    """Compiles with few optimisations, as compiling takes most of the time. Only in tests
    marked `optimised` does the last bit or the run time matter."""
    if request.node.get_closest_marker("optimised"):
        yield
        return
    get_compile_options = compiler.get_compile_options

    def get_quick_options(*args, env_options_overrides=None, **kwargs):
        options = quick_options() | (env_options_overrides or {})
        return get_compile_options(*args, env_options_overrides=options, **kwargs)

    quick_options()
    monkeypatch.setattr(compiler, "get_compile_options", get_quick_options)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
