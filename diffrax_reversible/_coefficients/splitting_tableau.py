"""The coefficients of a composition of kicks and drifts."""

import dataclasses
import functools as ft

import numpy as np

from .order_conditions import (
    error_functional,
    exact_value,
    largest_residual,
    Target,
    tolerance,
)
from .rooted_trees import rooted_trees, RootedTree, trees_up_to


def _affine(tree: RootedTree, is_drift: bool) -> bool:
    """Whether the elementary differential of a tree can be non-zero if drifts are affine in
    the momentum: every vertex that stands for the drift has at most one branch. Vertices
    stand for drift and kick alternately, from `is_drift` at the root on."""
    if is_drift and len(tree) > 1:
        return False
    return all(_affine(branch, not is_drift) for branch in tree)


@dataclasses.dataclass(frozen=True)
class SplittingTableau:
    """The lengths of kicks and drifts, and the weights that follow from them.

    A step of `q' = f(t, p)`, `p' = g(t, q)` is the chain

        p += h b_0 g(q),    q += h a_1 f(p),    p += h b_1 g(q),    ...,    p += h b_m g(q)

    The time of `g` advances with `q`, and that of `f` with `p`. With the stage derivatives
    `g_0, ..., g_m` and `f_1, ..., f_m` the chain is a partitioned Runge–Kutta method. Its
    order conditions belong to rooted trees whose vertices stand for `f` and `g`
    alternately. The error estimate is a combination of these stage derivatives and
    `f_0 = f(t_0, p_0)`, by the same conditions. They leave some freedom, which
    `error_weights` can fix: the estimate of least norm may miss errors of steps close to
    the limit of stability.

    **Arguments:**

    - `kicks`: the `b_i`, `m + 1` of them; a palindrome that sums to one.
    - `drifts`: the `a_i`, `m` of them; a palindrome that sums to one.
    - `order`: the order of convergence claimed, an even number.
    - `embedded_order`: the order `q` of the embedded method behind the error estimate.
    - `error_scale`: the size of the error estimate: its leading term is about
        `error_scale * h^(q+1) y^(q+1) / (q+1)!`.
    - `error_weights`: the weights of `f_0, ..., f_m` in the error estimate of `q`, and the
        weights of `g_0, ..., g_m` in the error estimate of `p`. By default the smallest
        that satisfy the conditions.
    - `nystrom`: whether the order is claimed only for drifts that are affine in time and
        momentum, as `q' = p / m` is.

    **Raises:**

    `ValueError` if the coefficients do not satisfy these conditions.

    Reference: Hairer, Lubich & Wanner (2006), *Geometric Numerical Integration*, sections
    II.5 and III.2, doi:10.1007/3-540-30666-8.
    """

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]
    order: int
    embedded_order: int
    error_scale: float = 1.0
    nystrom: bool = False
    error_weights: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self):
        for name, lengths in (("kicks", self.kicks), ("drifts", self.drifts)):
            lengths = np.array(lengths)
            if not (
                abs(np.sum(lengths) - 1) <= tolerance
                and np.max(np.abs(lengths - lengths[::-1])) <= tolerance
            ):
                raise ValueError(
                    f"`SplittingTableau({name}=...)` must be a palindrome that sums to 1, "
                    f"got {tuple(lengths)}."
                )
        if len(self.kicks) != len(self.drifts) + 1:
            raise ValueError(
                "`SplittingTableau(kicks=..., drifts=...)` must have one kick more than "
                f"drifts, got {len(self.kicks)} kicks and {len(self.drifts)} drifts."
            )
        for order in range(1, self.order + 1):
            residual = self.residual(order)
            if residual > tolerance:
                raise ValueError(
                    f"`SplittingTableau(..., order={self.order})` violates an order "
                    f"condition of order {order}, by {residual:.1e}."
                )
        for order in range(1, self.embedded_order + 1):
            residual = self.error_residual(order)
            if residual > tolerance:
                raise ValueError(
                    f"`SplittingTableau(..., error_weights=..., "
                    f"embedded_order={self.embedded_order})` violates a condition of order "
                    f"{order}, by {residual:.1e}."
                )
        if not (np.any(self.kick_error_weights) and np.any(self.drift_error_weights)):
            raise ValueError(
                f"`SplittingTableau(..., embedded_order={self.embedded_order})` has no "
                "error estimate. Pass a smaller `embedded_order`."
            )

    @property
    def stages(self) -> int:
        """The number of drifts, and of new evaluations of the force, per step."""
        return len(self.drifts)

    @property
    def kick_times(self) -> np.ndarray:
        """The fractions of the step at which the force is evaluated, shape `(m + 1,)`."""
        return np.concatenate([[0.0], np.cumsum(self.drifts)[:-1], [1.0]])

    @property
    def drift_times(self) -> np.ndarray:
        """The fractions of the step at which drifts are evaluated, shape `(m,)`."""
        return np.cumsum(self.kicks)[:-1]

    @ft.cached_property
    def _phi(self) -> tuple[dict[RootedTree, np.ndarray], dict[RootedTree, np.ndarray]]:
        return self.elementary_weights(max(self.order, self.embedded_order + 1))

    def elementary_weights(
        self, order: int
    ) -> tuple[dict[RootedTree, np.ndarray], dict[RootedTree, np.ndarray]]:
        """The elementary weights of the stages of `g` and of `f`, for the trees up to that
        `order` whose root stands for `g` or `f`."""
        m = self.stages
        drifts, kicks = np.zeros((m + 1, m + 1)), np.zeros((m + 1, m + 1))
        for i in range(m + 1):
            # The argument of `g_i` contains `f_1, ..., f_i`, that of `f_i` contains
            # `g_0, ..., g_(i-1)`.
            drifts[i, 1 : i + 1] = self.drifts[:i]
            kicks[i, :i] = self.kicks[:i]
        g, f = {}, {}
        for tree in trees_up_to(order):
            g[tree], f[tree] = np.ones(m + 1), np.ones(m + 1)
            for branch in tree:
                g[tree] = g[tree] * (drifts @ f[branch])
                f[tree] = f[tree] * (kicks @ g[branch])
        return self._relevant(g, False), self._relevant(f, True)

    def _relevant(self, phi, is_drift: bool) -> dict[RootedTree, np.ndarray]:
        if not self.nystrom:
            return phi
        return {tree: phi[tree] for tree in phi if _affine(tree, is_drift)}

    def residual(self, order: int) -> float:
        """The largest residual of the conditions of that order."""
        weights = (np.array(self.kicks), np.array([0.0, *self.drifts]))
        return self._residual(weights, exact_value, order)

    def error_residual(self, order: int) -> float:
        """The largest elementary weight of that order in the error estimate."""
        weights = (self.kick_error_weights, self.drift_error_weights)
        return self._residual(weights, lambda tree: 0.0, order)

    def _residual(self, weights, target: Target, order: int) -> float:
        return max(
            largest_residual(w, phi, target, (t for t in rooted_trees(order) if t in phi))
            for w, phi in zip(weights, self._phi, strict=True)
        )

    @ft.cached_property
    def kick_error_weights(self) -> np.ndarray:
        """Weights of `g_0, ..., g_m` in the error estimate of `p`."""
        if self.error_weights is not None:
            return np.array(self.error_weights[1])
        return error_functional(self._phi[0], self.embedded_order, self.error_scale)

    @ft.cached_property
    def drift_error_weights(self) -> np.ndarray:
        """Weights of `f_0, ..., f_m` in the error estimate of `q`."""
        if self.error_weights is not None:
            return np.array(self.error_weights[0])
        return error_functional(self._phi[1], self.embedded_order, self.error_scale)
