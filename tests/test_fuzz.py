"""A few of the random cases of `fuzz.py`: each is right, or an error in words."""

import jax
import pytest

from .fuzz import draw, outcome
from .problems import cases


pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize(
    "seed", cases((), more=(1000, 1005), slow=(1003, *range(1006, 1012)))
)
def test_outcome(seed):
    # Complex states are divided by real numbers in Diffrax.
    with jax.numpy_dtype_promotion("standard"):
        what, more = outcome(draw(seed))
    assert what != "defect", more
