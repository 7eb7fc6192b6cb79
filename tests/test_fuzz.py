"""A few random cases of `fuzz.py`: each gradient is right, or an error that explains."""

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
    # Diffrax divides complex states by real numbers.
    with jax.numpy_dtype_promotion("standard"):
        what, more = outcome(draw(seed))
    assert what != "defect", more
