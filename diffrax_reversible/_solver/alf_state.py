"""The solver state of asynchronous leapfrog, and the sums that it consists of."""

import equinox as eqx

from .._custom_types import BoolScalarLike, VF, Y
from .._exact_sum import LowPart, Sum
from .._tree import tree_add
from .cotangent import Cotangent
from .deviation import Deviation


class ALFState(eqx.Module):
    """The solver state of asynchronous leapfrog.

    - `v`: the approximation to the vector field.
    - `deviation`: the known facts about its deviation.
    - `low`: the low parts of `z` and `v`, if sub-steps are compensated.
    - `evaluated`: whether `v` was evaluated at the current state, after any jump there.

    In a cotangent, every field except `v` is `None`.
    """

    v: VF
    deviation: Deviation | None
    low: tuple[LowPart, LowPart] | None
    evaluated: BoolScalarLike | None


def sums_of(y: Y, solver_state: ALFState) -> tuple[Sum, Sum]:
    """`z` and `v` as sums."""
    low_y, low_v = (None, None) if solver_state.low is None else solver_state.low
    return LowPart.join(y, low_y), LowPart.join(solver_state.v, low_v)


def split_sums(z: Sum, v: Sum) -> tuple[Y, VF, tuple[LowPart, LowPart] | None]:
    """The inverse of `sums_of`: the state, `v`, and their low parts."""
    (y, low_y), (v_high, low_v) = LowPart.split(z), LowPart.split(v)
    low = None if low_y is None or low_v is None else (low_y, low_v)
    return y, v_high, low


def with_v(state: ALFState, v: VF) -> ALFState:
    return ALFState(v, state.deviation, state.low, state.evaluated)


def add_to_state(cotangent: Cotangent, y: Y, v: VF) -> Cotangent:
    return Cotangent(
        tree_add(cotangent.y, y),
        with_v(cotangent.solver_state, tree_add(cotangent.solver_state.v, v)),
        cotangent.params,
        cotangent.probe,
    )
