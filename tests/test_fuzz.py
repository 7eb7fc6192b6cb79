"""A few of the random cases of `fuzz.py`: each is right, or an error in words."""

import jax
import pytest

from .fuzz import draw, outcome


pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("seed", range(1000, 1006))
def test_outcome(seed):
    # Complex states are divided by real numbers in Diffrax.
    with jax.numpy_dtype_promotion("standard"):
        what, more = outcome(draw(seed))
    assert what != "defect", more
