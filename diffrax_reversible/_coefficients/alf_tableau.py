"""The coefficients of a composition of asynchronous-leapfrog (ALF) sub-steps."""

import dataclasses
import functools as ft
import itertools as it
import math

import numpy as np

from .coarse_error import coarse_error_weights
from .continuous_extension import ContinuousExtension
from .deviation import effect_of_deviation, growth_of_deviation, slope_at_end
from .linear_response import LinearResponse
from .order_conditions import error_functional, exact_value, largest_residual, tolerance
from .rooted_trees import elementary_weights, RootedTree, tall_tree, trees_up_to


@dataclasses.dataclass(frozen=True)
class ALFTableau:
    """Checked coefficients of a composition of asynchronous leapfrog (ALF), for `ALF`.

    One sub-step of length `h` takes `(z, v)` to `(z', v')` by

        k = z + h/2 v,    u = f(t + h/2, k),    v' = 2u - v,    z' = k + h/2 v'

    A step of the solver is the chain of sub-steps of lengths `sub_steps[i] * h`. With
    `u_0 = v_0` the chain is an explicit Runge–Kutta method in the stage derivatives
    `u_0, ..., u_s`. So the rooted-tree conditions for both halves of the state decide its
    order exactly. The weights of the error estimate and of dense output solve the same
    conditions: they are derived from `sub_steps`, not tabulated.

    **Arguments:**

    - `sub_steps`: the lengths of the sub-steps as fractions of the step. They have to sum
        to one and to be a palindrome: the composition is then symmetric, and its inverse
        is the same method with the sign of `h` reversed.
    - `order`: the order of convergence claimed, an even number.
    - `embedded_order`: the order `q` of the embedded method behind the error estimate.
        Defaults to `order - 1`.
    - `error_scale`: the size of the error estimate: its leading term is about
        `error_scale * h^(q+1) y^(q+1) / (q+1)!`.

    **Raises:**

    `ValueError` if the sub-steps do not sum to one, are not a palindrome, do not satisfy
    the order conditions, or leave no freedom for an error estimate; if orders are not
    integers, or `error_scale` is not a positive number.

    Example:

    >>> from diffrax_reversible import ALFTableau
    >>> gamma = 1 / (2 - 2 ** (1 / 3))  # Yoshida's composition, on pairs of half steps
    >>> halves = [g / 2 for g in (gamma, 1 - 2 * gamma, gamma) for _ in range(2)]
    >>> tableau = ALFTableau(halves, order=4)
    >>> print(tableau.stages, tableau.embedded_order)
    6 3

    References: Sub-step: Mutze (2013), arXiv:1311.6602; Zhuang et al. (2021),
    arXiv:2102.04668. Order conditions of Runge–Kutta methods, and of compositions of a
    method with its adjoint method: Hairer, Lubich & Wanner (2006), *Geometric Numerical
    Integration*, chapters II and III, doi:10.1007/3-540-30666-8.
    """

    sub_steps: tuple[float, ...]
    order: int
    embedded_order: int | None = None
    error_scale: float = 1e-2

    def __post_init__(self):
        object.__setattr__(self, "sub_steps", tuple(map(float, self.sub_steps)))
        if self.embedded_order is None:
            object.__setattr__(self, "embedded_order", self.order - 1)
        self._check_types()
        self._check_composition()
        self._check_orders()
        if not np.any(self.error_weights):
            raise ValueError(
                f"`ALFTableau(..., embedded_order={self.embedded_order})` has no error "
                f"estimate: {len(self.sub_steps)} sub-steps cannot satisfy the order "
                "conditions that it needs. Pass more sub-steps or, if it is more than 1, "
                "a smaller `embedded_order`."
            )

    def _check_types(self):
        for name in ("order", "embedded_order"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer):
                raise ValueError(f"`ALFTableau({name}={value})` must be an integer.")
        if not 0 < self.error_scale < math.inf:
            raise ValueError(
                f"`ALFTableau(error_scale={self.error_scale})` must be a positive number."
            )

    def _check_composition(self):
        c = np.asarray(self.sub_steps)
        if c.ndim != 1 or len(c) == 0 or not np.all(np.isfinite(c)):
            raise ValueError(
                "`ALFTableau(sub_steps=...)` must be a non-empty sequence of finite "
                f"numbers, got {self.sub_steps}."
            )
        if abs(math.fsum(c) - 1) > tolerance:
            raise ValueError(
                "`ALFTableau(sub_steps=...)` must sum to 1, got "
                f"{math.fsum(c):.16g}. Divide every sub-step by the sum, or check for a "
                "mistyped coefficient."
            )
        if np.max(np.abs(c - c[::-1])) > tolerance:
            raise ValueError(
                "`ALFTableau(sub_steps=...)` must be a palindrome (`sub_steps[i] == "
                "sub_steps[-1 - i]`), so that the composition is symmetric; got "
                f"{self.sub_steps}."
            )

    def _check_orders(self):
        if self.order < 2 or self.order % 2 != 0:
            raise ValueError(
                f"`ALFTableau(order={self.order})` must be an even number and at least "
                "2: symmetric methods have even order."
            )
        if not 1 <= self._embedded_order < self.order:
            raise ValueError(
                f"`ALFTableau(embedded_order={self.embedded_order})` must be at least 1 "
                f"and less than `order={self.order}`."
            )
        for order in range(1, self.order + 1):
            residual = largest_residual(
                self._step_weights, self._phi, exact_value, trees_up_to(order)
            )
            if residual > tolerance:
                raise ValueError(
                    f"`ALFTableau(sub_steps=..., order={self.order})` violates an order "
                    f"condition of order {order}, by {residual:.1e}. Pass `order="
                    f"{(order - 1) // 2 * 2}`, or check for a mistyped coefficient. "
                    "(Coefficients for symmetric methods lose their order on single ALF "
                    "steps, whose map at `h = 0` is not the identity. Use them on pairs of "
                    "half steps, or use the coefficients of a splitting method.)"
                )

    @property
    def stages(self) -> int:
        """The number of sub-steps, and of vector-field evaluations, per step."""
        return len(self.sub_steps)

    @ft.cached_property
    def midpoints(self) -> np.ndarray:
        """The fractions of the step at which sub-steps evaluate the vector field, shape
        `(s,)`."""
        c = np.asarray(self.sub_steps)
        return np.cumsum(c) - c / 2

    @ft.cached_property
    def drifts(self) -> np.ndarray:
        """The lengths of the drifts from the start of the step by way of the mid-points to
        its end, each by the `v` between two evaluations; shape `(s+1,)`."""
        c = np.asarray(self.sub_steps)
        return np.convolve(c, [0.5, 0.5])

    @ft.cached_property
    def _runge_kutta(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = self.stages
        z, v = np.zeros(s + 1), np.eye(s + 1)[0]
        rows = [z]
        for i, c in enumerate(self.sub_steps, start=1):
            u = np.eye(s + 1)[i]
            rows.append(z + c / 2 * v)
            v = 2 * u - v
            z = z + c * u
        return np.stack(rows), z, v

    @property
    def runge_kutta_matrix(self) -> np.ndarray:
        """Weights of `u_0 = v_0, u_1, ..., u_s` in the argument of each stage, shape
        `(s+1, s+1)`."""
        return self._runge_kutta[0]

    @property
    def _step_weights(self) -> np.ndarray:
        return self._runge_kutta[1]

    @ft.cached_property
    def _phi(self) -> dict[RootedTree, np.ndarray]:
        return elementary_weights(self.runge_kutta_matrix, self.order)

    @ft.cached_property
    def velocity_order(self) -> int:
        """The largest `p` for which `v` satisfies its order conditions.

        A tree with sub-trees `τ_1, ..., τ_m` has the elementary weight `Π 1/γ(τ_i)` in
        the exact derivative at the end of the step.
        """

        def target(tree):
            return math.prod(map(exact_value, tree))

        _, _, weights = self._runge_kutta

        def holds(p):
            trees = trees_up_to(p)
            return largest_residual(weights, self._phi, target, trees) <= tolerance

        return len(list(it.takewhile(holds, range(1, self.order + 1))))

    @ft.cached_property
    def error_weights(self) -> np.ndarray:
        """Weights `e_0, ..., e_s` of the error estimate `h Σ e_i u_i`.

        They annihilate every tree of order up to `q = embedded_order`. With more than one
        sub-step they are also independent of the parasitic deviation `v - f(t, z)`, which
        does not decay: `e_0 = 0` and `Σ e_i a_i0 = 0`, with `a_i0` the weight of `v_0` in
        stage `i`. Among all solutions this is the one that is most nearly parallel, for its
        size, to the Taylor term `h^(q+1) y^(q+1) / (q+1)!`.
        """
        weights = np.zeros(self.stages + 1)
        if self.stages == 1:
            # One sub-step leaves no freedom: the estimate is `h (u_1 - v_0)`, whose leading
            # term is half of `h^2 y''`, the Taylor term itself.
            return self.error_scale * np.array([-1.0, 1.0])
        embedded_order = self._embedded_order
        phi = {tree: weights[1:] for tree, weights in self._phi.items()}
        parasitic = self.runge_kutta_matrix[1:, 0]
        weights[1:] = error_functional(
            phi, embedded_order, self.error_scale, extra=[parasitic]
        )
        return weights

    @ft.cached_property
    def coarse_error_weights(self) -> np.ndarray:
        """Weights of `u_0, ..., u_s` in a second error estimate, for steps close to the
        limit of stability. Zero if there is none.

        Its order is one less than that of the first. It is independent of the parasitic
        deviation too.
        """
        order = self._embedded_order - 1
        if self.stages == 1 or order < 1:
            return np.zeros(self.stages + 1)
        matrix, _, v_weights = self._runge_kutta
        conditions = [self._phi[tree][1:] for tree in trees_up_to(order)]
        return coarse_error_weights(
            self.linear_response,
            self.error_weights,
            self._deviation_error_weights,
            v_weights,
            np.stack([*conditions, matrix[1:, 0]]),
        )

    @ft.cached_property
    def deviation_error_scale(self) -> float:
        """The factor of a third error estimate: it multiplies the deviation that `v` gains
        in a step, times the length of the step.

        With this factor the third estimate equals the first on `y' = λ y` with small steps.
        Zero if there is no third estimate, because the deviation is of another order. Only
        methods of order 4 need one: those of higher order have enough freedom for a first
        and a second estimate that miss nothing.
        """
        if self.order != 4 or self.deviation_weights is None:
            return 0.0
        tall = tall_tree(self.order)
        first, third = self.error_weights, self.deviation_weights
        first, third = abs(first @ self._phi[tall]), abs(third @ self._phi[tall])
        return float(first / third) if third > tolerance else 0.0

    @ft.cached_property
    def deviation_growth(self) -> float:
        """The factor by which a deviation grows in one step, if the step is not close to
        the limit of stability."""
        assert self.deviation_weights is not None
        return growth_of_deviation(self.linear_response, self.deviation_weights)

    @ft.cached_property
    def deviation_effect(self) -> float:
        """The effect on the solution of a deviation of size one that grows by a factor of
        two in a step, in units of the error of the step over its first estimate."""
        assert self.deviation_weights is not None
        return effect_of_deviation(
            self.linear_response,
            self.deviation_weights,
            self._step_weights,
            self.error_weights,
        )

    @ft.cached_property
    def departure(self) -> float:
        """The deviation of `v`, times the step size, after a step of `y' = λ y` with
        `h λ = -2` from `y = 1` without a deviation."""
        z = np.array([-2.0])
        response = self.linear_response(z)
        _, _, v = self._runge_kutta
        return float(np.real(v @ response.stages - z * response.solution)[0])

    def linear_response(self, z: np.ndarray) -> LinearResponse:
        """The response of a step to `y' = λ y`, as a function of `z = h λ`."""
        return LinearResponse.of(self.runge_kutta_matrix, self._step_weights, z)

    @property
    def _deviation_error_weights(self) -> np.ndarray:
        if self.deviation_weights is None:
            return np.zeros(self.stages + 1)
        return self.deviation_error_scale * self.deviation_weights

    @property
    def _embedded_order(self) -> int:
        assert self.embedded_order is not None
        return self.embedded_order

    @ft.cached_property
    def continuous_extension(self) -> ContinuousExtension:
        """The solution within a step."""
        return ContinuousExtension.of(
            self.runge_kutta_matrix, self._step_weights, self.order
        )

    @ft.cached_property
    def deviation_weights(self) -> np.ndarray | None:
        """Weights of `u_0 = v_0, ..., u_s` in the deviation `v - f(t, z)` at the end of a
        step.

        The vector field is not evaluated but extrapolated from the stages, see
        `slope_at_end`. `None` if that is not possible, or for a single sub-step, whose
        deviation cannot be distinguished from the local error.
        """
        if self.stages == 1:
            return None

        _, _, v = self._runge_kutta
        slope = slope_at_end(self._phi, self.order)
        return None if slope is None else v - slope
