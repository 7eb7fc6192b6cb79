"""The solver state of compositions of kicks and drifts, and the sums that it holds."""

import equinox as eqx

from .._custom_types import BoolScalarLike, VF, Y
from .._exact_sum import LowPart, Sum


class SplittingState(eqx.Module):
    """The solver state of a composition of kicks and drifts.

    - `force`: the force at the current state.
    - `low`: the low parts of `q` and `p`, if sums are compensated.
    - `evaluated`: whether the force was evaluated at the start of the next step, after any
        jump there, as at the start of a solve.

    In a cotangent, every field except `force` is `None`.
    """

    force: VF
    low: tuple[LowPart, LowPart] | None
    evaluated: BoolScalarLike | None


def sums_of(y: Y, solver_state: SplittingState) -> tuple[Sum, Sum]:
    """`q` and `p` as sums."""
    low_q, low_p = (None, None) if solver_state.low is None else solver_state.low
    return LowPart.join(y[0], low_q), LowPart.join(y[1], low_p)


def split_sums(q: Sum, p: Sum) -> tuple[Y, tuple[LowPart, LowPart] | None]:
    (q_high, low_q), (p_high, low_p) = LowPart.split(q), LowPart.split(p)
    low = None if low_q is None or low_p is None else (low_q, low_p)
    return (q_high, p_high), low


def with_force(state: SplittingState, force: VF) -> SplittingState:
    return SplittingState(force, state.low, state.evaluated)
