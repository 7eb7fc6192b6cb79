"""The response of a step to `y' = λ y`, as a function of `z = h λ`."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearResponse:
    """A step of `y' = λ y` at many `z = h λ` at once.

    - `z`: shape `(n,)`.
    - `stages`: the `h u_i` of a step from `y = 1` and `v = λ`, shape `(stages + 1, n)`.
    - `parasitic`: the `h u_i` of a step from `y = 0` and `h v = 1`: a deviation of `v`
        alone.
    - `solution`: `y` at the end of the step from `y = 1`, shape `(n,)`.
    """

    z: np.ndarray
    stages: np.ndarray
    parasitic: np.ndarray
    solution: np.ndarray

    @staticmethod
    def of(matrix: np.ndarray, step_weights: np.ndarray, z: np.ndarray) -> "LinearResponse":
        """The response of an explicit Runge–Kutta method.

        **Arguments:**

        - `matrix`: weights of the stage derivatives in the argument of each stage, shape
            `(stages + 1, stages + 1)`. The row of stage 0, which is `v`, is zero.
        - `step_weights`: the weights of some or all stages in the solution at the end.
        """
        stages, parasitic = np.zeros((2, len(matrix), len(z)), complex)
        parasitic[0] = 1
        # By `einsum`, as products by BLAS wait for its threads wherever cores are busy.
        for i, row in enumerate(matrix):
            stages[i] = z * (1 + np.einsum("j,jn", row[:i], stages[:i]))
            if i > 0:
                parasitic[i] = z * np.einsum("j,jn", row[:i], parasitic[:i])
        solution = 1 + step_weights @ stages[: len(step_weights)]
        return LinearResponse(z, stages, parasitic, solution)

    @property
    def error(self) -> np.ndarray:
        """The error of the solution at the end of the step."""
        return self.solution - np.exp(self.z)

    def at(self, where: np.ndarray) -> "LinearResponse":
        return LinearResponse(
            self.z[where],
            self.stages[:, where],
            self.parasitic[:, where],
            self.solution[where],
        )


def left_half_plane(radius: float, per_unit: int, angles: int) -> np.ndarray:
    """Points `z` with `Re z <= 0` and `0 < |z| <= radius`."""
    radii = np.linspace(0, radius, round(radius * per_unit) + 1)[1:]
    directions = np.exp(1j * np.linspace(np.pi / 2, np.pi, angles))
    return np.outer(radii, directions).ravel()
