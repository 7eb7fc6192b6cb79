"""The solution within a step, from the stages of that step."""

import dataclasses
from collections.abc import Callable

import numpy as np

from .linear_response import left_half_plane, LinearResponse
from .order_conditions import null_space_of, tolerance
from .rooted_trees import (
    density,
    elementary_weights,
    order_of,
    rooted_trees,
    RootedTree,
    tall_tree,
    trees_up_to,
)


# Where the conditions leave freedom, a residual of the next order of size `_residual`
# counts as much as an error on `y' = λ y` as large as that of the step, and as an effect of
# the deviation of `v` that is `_parasitic` times its effect on the end of the step.
# Residuals count more the further their order is below that of the step.
_residual = 1e-2
_per_order = 1e-3
_parasitic = 3.0


@dataclasses.dataclass(frozen=True)
class ContinuousExtension:
    """Weights of the stage derivatives in the solution at given `fractions` of a step.

    Together with the solution and its derivatives at both ends of the step, these values
    determine a polynomial, see `HermiteInterpolation`. The derivatives have to be
    evaluated, as `v` deviates from them. The values hardly depend on that deviation.

    - `weights`: the weights of `u_0, ..., u_s`, shape `(fractions, s + 1)`.
    - `slope_weights`: the weights of the derivatives at both ends and, if
        `evaluates_midpoint`, at the mid-point, shape `(fractions, 2)` or `(fractions, 3)`.
    - `order`: the order of the solution between the ends of steps.
    """

    fractions: tuple[float, ...]
    weights: np.ndarray
    slope_weights: np.ndarray
    order: int

    @property
    def evaluates_midpoint(self) -> bool:
        return self.slope_weights.shape[1] == 3

    @staticmethod
    def of(
        matrix: np.ndarray, step_weights: np.ndarray, order: int
    ) -> "ContinuousExtension":
        """The extension of the largest order. Among several, the first choice is the one
        with the fewest evaluations, and then one exact to one more order on `y' = λ y`.

        **Arguments:**

        - `matrix`: weights of `u_0 = v_0, ..., u_s` in the argument of each stage.
        - `step_weights`: their weights in the solution at the end of the step.
        """
        count = len(matrix)
        fractions = {2: (), 4: (0.5,)}.get(order, (0.25, 0.5, 0.75))
        stages = _Stages(matrix, step_weights, order)
        stages = stages.with_stage(np.zeros(count))
        stages = stages.with_stage(np.append(step_weights, 0.0))
        # A higher order than a polynomial of that degree allows is of no use.
        for exact in range(min(order - 1, len(fractions) + 3), 1, -1):
            for evaluates in (False, True):
                for exact_on_linear in (exact + 1, exact):
                    weights = stages.fit_all(fractions, exact, exact_on_linear, evaluates)
                    if weights is not None:
                        parts = weights[:, :count], weights[:, count:]
                        return ContinuousExtension(fractions, *parts, exact + 1)
        none = np.zeros((0, count)), np.zeros((0, 2))
        return ContinuousExtension((), *none, 2)


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The stages `u_0 = v_0, ..., u_s` of a method, and stages that are evaluated after the
    step."""

    matrix: np.ndarray
    step_weights: np.ndarray
    order: int

    def with_stage(self, weights: np.ndarray) -> "_Stages":
        """With one more stage, whose argument has these weights."""
        count = len(self.matrix)
        matrix = np.zeros((count + 1, count + 1))
        matrix[:count, :count] = self.matrix
        matrix[count, :count] = weights
        return _Stages(matrix, self.step_weights, self.order)

    def fit_all(
        self,
        fractions: tuple[float, ...],
        exact: int,
        exact_on_linear: int,
        evaluates: bool,
    ) -> np.ndarray | None:
        """Weights for all fractions, with one more stage at the mid-point if `evaluates`.

        `None` if the conditions have no solution."""
        stages, rows = self, {}
        if evaluates:
            midpoint = self.fit(0.5, exact, exact_on_linear)
            if midpoint is None:
                return None
            stages = self.with_stage(midpoint)
            rows[0.5] = np.append(midpoint, 0.0)
        for theta in fractions:
            if theta not in rows:
                rows[theta] = stages.fit(theta, exact, exact_on_linear)
            if rows[theta] is None:
                return None
        return np.array([rows[theta] for theta in fractions]) if rows else None

    def fit(self, theta: float, exact: int, exact_on_linear: int) -> np.ndarray | None:
        """Weights of the solution at a fraction `theta` of the step.

        They satisfy the order conditions up to `exact`, and on `y' = λ y` up to
        `exact_on_linear`. The effect of the deviation of `v` on them is of order `h^p` for
        a method of order `2p`. The remaining freedom minimises the residuals of the next
        order and the errors on `y' = λ y`.
        """

        def target(tree: RootedTree) -> float:
            return theta ** order_of(tree) / density(tree)

        phi = elementary_weights(self.matrix, max(exact + 1, exact_on_linear))
        trees = [*trees_up_to(exact)]
        trees += [tall_tree(n) for n in range(exact + 1, exact_on_linear + 1)]
        parasitic = [self.matrix[:, 0]]
        for _ in range(self.order // 2 - 2):
            parasitic.append(self.matrix @ parasitic[-1])
        matrix = np.stack([*(phi[tree] for tree in trees), *parasitic])[:, 1:]
        rhs = np.array([*map(target, trees), *(0.0 for _ in parasitic)])
        weights = np.linalg.lstsq(matrix, rhs, rcond=1e-11)[0]
        if np.max(np.abs(matrix @ weights - rhs)) > tolerance:
            return None
        null_space = null_space_of(matrix)
        if null_space.shape[1] > 0:
            trees = rooted_trees(exact + 1)
            residual = _residual * _per_order ** (self.order - exact)
            next_order = (
                np.array([phi[tree][1:] for tree in trees]) / residual,
                np.array([target(tree) for tree in trees]) / residual,
            )
            on_linear = self._on_linear(lambda z: np.exp(theta * z) - 1)
            systems = zip(next_order, on_linear, strict=True)
            matrix, rhs = (np.concatenate(parts) for parts in systems)
            freedom = np.linalg.lstsq(
                matrix @ null_space, rhs - matrix @ weights, rcond=1e-3
            )
            weights = weights + null_space @ freedom[0]
        return np.append(0.0, weights)

    def _on_linear(self, target: Callable) -> tuple[np.ndarray, np.ndarray]:
        """A linear system for the weights. Its least-squares solution minimises two errors.

        - The error on `y' = λ y` against `target(z)`, relative to the error of the step, in
            the root mean square over `z` where that is small and above rounding.
        - The effect of a deviation of `v`, relative to its effect on the end of the step.
        """
        response = LinearResponse.of(
            self.matrix, self.step_weights, left_half_plane(15.0, 5, 10)
        )
        size = np.abs(response.error)
        response = response.at((size > 1e-10) & (size < 1))
        size = np.abs(response.error)
        parasitic = response.parasitic[: len(self.step_weights)]
        parasitic = _parasitic * np.abs(self.step_weights @ parasitic)
        rows = [(response.stages[1:] / size).T, (response.parasitic[1:] / parasitic).T]
        rhs = [target(response.z) / size, np.zeros_like(size)]
        matrix = np.concatenate([part for row in rows for part in (row.real, row.imag)])
        rhs = np.concatenate([part for x in rhs for part in (x.real, x.imag)])
        count = np.sqrt(len(size))
        return matrix / count, rhs / count
