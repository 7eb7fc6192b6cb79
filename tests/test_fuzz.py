"""Random cases of `fuzz.py`: each gradient is right, or an error that explains."""

import jax
import pytest

import diffrax_reversible as dr

from .fuzz import draw, gradient, outcome, WORDED
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


def first_seeds():
    """The first case of each solver with each controller."""
    first = {}
    for seed in range(1000):
        case = draw(seed)
        first.setdefault((case.solver, case.controller), seed)
    return tuple(first.values())


SEEDS = first_seeds()


@pytest.mark.parametrize(
    "seed", cases((), long=SEEDS[::4], more=[x for x in SEEDS if x not in SEEDS[::4]])
)
def test_tracing(seed):
    """With states that are held, also in double precision."""
    with jax.numpy_dtype_promotion("standard"):
        try:
            gradient(draw(seed), dr.ReversibleAdjoint(checkpoints=1), jax.eval_shape)
        except Exception as error:
            if not any(word in str(error) for word in WORDED):
                raise
