"""A sketch of two gradients tells how far they differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible._adjoint.agreement import same_together
from diffrax_reversible._adjoint.sketch import alike as _alike, norm, sketch


def alike(first, second, tol):
    """Whether all arrays are."""
    return _alike(first, second, tol).all()


def _dense(rng, shape):
    return rng.normal(size=shape)


def _of_many_sizes(rng, shape):
    return rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, shape[-1])


def _rank_one(rng, shape):
    return np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[-1]))


@pytest.mark.parametrize("make", (_dense, _of_many_sizes, _rank_one))
@pytest.mark.parametrize("shape", ((64, 48), (30, 7), (400, 3)), ids=str)
def test_estimated_distance(shape, make):
    """The estimate is within a factor of two in 93 of 100 cases, for matrices with signs
    for rows and columns, also where these fit worst, and for thin ones, with signs that
    are constants or not."""
    rng = np.random.default_rng(0)
    both = jax.jit(lambda x, y: (sketch(x)[0], sketch(y)[0]))
    ratios = []
    for _ in range(200):
        first, moved = make(rng, shape), make(rng, shape)
        a, b = both(jnp.asarray(first), jnp.asarray(first + moved))
        ratios.append(np.linalg.norm(a - b) / np.linalg.norm(moved))
    within = (np.array(ratios) > 0.5) & (np.array(ratios) < 2)
    assert np.mean(within) >= 0.93


def test_alike():
    rng = np.random.default_rng(0)
    first, moved = jnp.asarray(rng.normal(size=(2, 40, 30)))
    for share in (1e-3, 0.3):
        moved = share * moved * jnp.linalg.norm(first) / jnp.linalg.norm(moved)
        pair = sketch(first), sketch(first + moved)
        assert alike(*pair, 3 * share) and not alike(*pair, share / 3)
        # Each array counts.
        assert not alike(sketch((first, first)), sketch((first, first + moved)), share / 3)


def test_small_arrays_are_compared_entry_by_entry():
    first = jnp.array([3.0, 4.0j]), jnp.array(1e-300)
    second = jnp.array([3.0, 4.0j + 0.5]), jnp.array(1e-300)
    assert alike(sketch(first), sketch(second), 0.1)
    assert not alike(sketch(first), sketch(second), 0.09)
    # Each array counts on its own, however small it is.
    assert not alike(sketch(first), sketch((first[0], jnp.array(2e-300))), 0.1)


def test_norm_of_small_and_large_numbers():
    """Squares of these would underflow, or overflow."""
    for size in (1e-30, 1e30):
        x = jnp.full(4, size, jnp.float32)
        assert abs(norm(x, jnp.float32(size)) - 2) < 1e-5


def test_sums_in_half_precision():
    for shape in ((40, 30), (200, 3), (400, 3)):
        numbers = sketch(jnp.full(shape, 6e4, jnp.float16))
        assert numbers.dtype == jnp.float32 and jnp.isfinite(numbers).all()


def test_nan_and_zero():
    nan, zero = jnp.full(3, jnp.nan), jnp.zeros(3)
    assert not alike(sketch(nan), sketch(nan), 1.0)
    assert alike(sketch(zero), sketch(zero), 0.0)
    assert alike(sketch(()), sketch(()), 0.0)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.float32))
def test_arrays_together(dtype):
    """One array may differ by more than all of them do, but not by much more."""
    large, small = 100.0 * jnp.ones((20, 10), dtype), jnp.ones(3, jnp.float32)
    last = sketch((large, small))
    for of_large, of_small, same in (
        (0, 0.2, 1),
        (0, 0.5, 0),
        (0.08, 0, 0),
        (0.02, 0.2, 1),
    ):
        here = sketch(((1 + of_large) * large, (1 + of_small) * small))
        assert same_together(last, here) == bool(same)
    nan = sketch((large, jnp.full(3, jnp.nan, jnp.float32)))
    assert not same_together(nan, nan)
