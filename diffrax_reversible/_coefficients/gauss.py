"""Coefficients of Gauss collocation."""

from typing import NamedTuple

import numpy as np


class GaussTableau(NamedTuple):
    """The Runge–Kutta method of collocation at the `s` Gauss nodes, of order `2s`.

    - `nodes`: the zeros of the shifted Legendre polynomial of degree `s`.
    - `matrix`, `weights`: `a_ij` and `b_i` of the Butcher tableau.
    - `basis`: the coefficients of the Lagrange polynomials at the nodes, one row for each
        polynomial, from the constant coefficient on.

    With the nodes `c`, matrix and weights are defined by the simplifying assumptions `B(s)`
    and `C(s)`,

        sum_i b_i c_i^(q-1) = 1 / q,    sum_j a_ij c_j^(q-1) = c_i^q / q,    q = 1, ..., s

    They imply `B(2s)`, as the nodes are those of Gauss quadrature, and `D(s)`.

    Reference: Hairer & Wanner (1996), *Solving Ordinary Differential Equations II*, section
    IV.5, doi:10.1007/978-3-642-05221-7.
    """

    nodes: np.ndarray
    matrix: np.ndarray
    weights: np.ndarray
    basis: np.ndarray

    @property
    def stages(self) -> int:
        return len(self.nodes)

    @property
    def order(self) -> int:
        return 2 * self.stages

    @property
    def backward_matrix(self) -> np.ndarray:
        """The matrix seen from the end of a step: `a_ij - b_j`."""
        return self.matrix - self.weights

    @property
    def integrals(self) -> np.ndarray:
        """The coefficients of the integrals of the Lagrange polynomials from zero, from the
        linear coefficient on."""
        return self.basis / np.arange(1, self.stages + 1)

    @property
    def defect_weights(self) -> np.ndarray:
        """The values of the Lagrange polynomials at both ends, `l_j(0)` and `l_j(1)`."""
        return np.stack([self.basis[:, 0], np.sum(self.basis, axis=1)])


def gauss(stages: int) -> GaussTableau:
    """The tableau with one, two or three stages, whose coefficients have closed forms."""
    w3, w15 = 3**0.5, 15**0.5
    nodes, weights, matrix = {
        1: ([1 / 2], [1.0], [[1 / 2]]),
        2: (
            [1 / 2 - w3 / 6, 1 / 2 + w3 / 6],
            [1 / 2, 1 / 2],
            [[1 / 4, 1 / 4 - w3 / 6], [1 / 4 + w3 / 6, 1 / 4]],
        ),
        3: (
            [1 / 2 - w15 / 10, 1 / 2, 1 / 2 + w15 / 10],
            # Their sum is one to the last bit.
            [5 / 18, 1 - 2 * (5 / 18), 5 / 18],
            [
                [5 / 36, 2 / 9 - w15 / 15, 5 / 36 - w15 / 30],
                [5 / 36 + w15 / 24, 2 / 9, 5 / 36 - w15 / 24],
                [5 / 36 + w15 / 30, 2 / 9 + w15 / 15, 5 / 36],
            ],
        ),
    }[stages]
    nodes, weights, matrix = map(np.array, (nodes, weights, matrix))
    # `b_i a_ij + b_j a_ji = b_i b_j` preserves quadratic invariants. Its rounding error
    # would add up over millions of steps.
    for i in range(stages):
        matrix[i, i] = weights[i] / 2
        for j in range(i):
            matrix[j, i] = weights[i] - weights[i] * matrix[i, j] / weights[j]
    # `sum_q basis[j, q] c_i^q` is one if `i = j`, and zero otherwise.
    basis = np.linalg.inv(np.vander(nodes, increasing=True)).T
    return GaussTableau(nodes, matrix, weights, basis)
