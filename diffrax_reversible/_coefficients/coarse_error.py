"""Error estimates for steps close to the limit of stability.

For small steps an error estimate is a multiple of the leading term of the error. For large
steps it need not resemble the error: on `y' = λ y` it is a polynomial in `z = h λ`, which
may vanish where the step is unstable. The fine estimate, of order 3, of five sub-steps
vanishes near `z = -3` and `z = -6`, and in between it is less than a twentieth of the
error. Two more estimates bound it from below.
"""

from collections.abc import Callable

import numpy as np

from .linear_response import left_half_plane, LinearResponse
from .order_conditions import null_space_of


# The coarse estimate counts in full where it exceeds `threshold` times the sum of the
# slopes at both ends of the step. Where it is smaller, it is reduced by this `power` of the
# quotient, which preserves the order of the fine estimate.
threshold = 0.1
power = 2

# The estimate by the deviation counts as far as it exceeds this multiple of the fine one.
usual_deviation = 0.5

# Estimates have to be a quarter of an error that exceeds 1e-3; 0.3 leaves a margin.
_fraction = 0.3
_least_error = 1e-3
_radius = 15.0
_fitted_radius = 6.0
# Points per unit of `|z|`, and number of angles.
_dense = 40, 181
_sparse = 10, 31


def combine(fine: np.ndarray, coarse: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The size of the combined estimate."""
    coarse = np.abs(coarse)
    quotient = np.minimum(coarse / (threshold * slopes), 1)
    return np.maximum(np.abs(fine), coarse * quotient**power)


def coarse_error_weights(
    response_of: Callable[[np.ndarray], LinearResponse],
    fine_weights: np.ndarray,
    deviation_weights: np.ndarray,
    v_weights: np.ndarray,
    conditions: np.ndarray,
) -> np.ndarray:
    """Weights of `u_0, ..., u_s` in the coarse estimate, zero if there is none.

    The coarse estimate is a multiple of `d + b e`, where `e` is the fine estimate and `d`
    is the estimate of the lower order that is closest to the error on `y' = λ y`. The
    multiple is the smallest with which all estimates together bound the error from below on
    the left half-plane. `b` makes the coarse estimate smallest where errors are below 1e-3:
    it should not affect smaller tolerances.

    **Arguments:**

    - `response_of`: the `LinearResponse` of a step, as a function of `z`.
    - `fine_weights`: the weights of `u_0, ..., u_s` in the fine estimate.
    - `deviation_weights`: their weights in the estimate by the deviation, zero if there is
        none.
    - `v_weights`: their weights in `v` at the end of the step.
    - `conditions`: the functionals of `u_1, ..., u_s` that the coarse estimate has to
        annihilate.
    """
    weights = np.zeros_like(fine_weights)
    unit = fine_weights[1:] / np.linalg.norm(fine_weights[1:])
    null_space = null_space_of(np.concatenate([conditions, unit[None]]))
    if null_space.shape[1] == 0:
        return weights
    dense, sparse = (
        response_of(left_half_plane(_radius, *resolution))
        for resolution in (_dense, _sparse)
    )
    direction = null_space @ _closest(sparse, null_space)

    def parts(response):
        fine = np.abs(fine_weights @ response.stages)
        deviation = np.abs(deviation_weights @ response.stages) - usual_deviation * fine
        slopes = np.abs(response.z) + np.abs(v_weights @ response.stages)
        coarse = direction @ response.stages[1:], unit @ response.stages[1:]
        return np.maximum(fine, deviation), slopes, coarse

    others, slopes, (along, across) = parts(sparse)
    size = np.maximum(others, np.abs(sparse.error))

    def cost(b):
        coarse = along + b * across
        multiple = _multiple(sparse, others, coarse, slopes)
        total = combine(others, multiple * coarse, slopes)
        return np.max((total / size)[size < _least_error], initial=0)

    # Among equally good estimates, take the one closest to `direction`.
    b = min(np.linspace(-2, 2, 81), key=lambda b: (round(cost(b), 2), abs(b)))
    others, slopes, (along, across) = parts(dense)
    multiple = _multiple(dense, others, along + b * across, slopes)
    weights[1:] = multiple * (direction + b * unit)
    return weights


def _closest(response: LinearResponse, basis: np.ndarray) -> np.ndarray:
    """Coordinates of the estimate closest to the error on `y' = λ y`, in relative terms."""
    if basis.shape[1] == 1:
        return np.ones(1)
    size = np.abs(response.error)
    response = response.at((size > _least_error) & (np.abs(response.z) <= _fitted_radius))
    size = np.abs(response.error)
    matrix = (basis.T @ response.stages[1:] / size).T
    target = response.error / size
    matrix, target = (np.concatenate([x.real, x.imag]) for x in (matrix, target))
    return np.linalg.lstsq(matrix, target, rcond=1e-2)[0]


def _multiple(
    response: LinearResponse, others: np.ndarray, coarse: np.ndarray, slopes: np.ndarray
) -> float:
    """The smallest multiple of the coarse estimate that suffices where others do not."""
    error = np.abs(response.error)
    needed = (error > _least_error) & (others < _fraction * error)
    if not np.any(needed):
        return 0.0
    target, limit = _fraction * error[needed], threshold * slopes[needed]
    # Solve `x min(x / limit, 1)^power = target`.
    x = np.where(target < limit, (target * limit**power) ** (1 / (power + 1)), target)
    return float(np.max(x / np.abs(coarse[needed])))
