"""The coefficients of a composition of kicks and drifts, and the built-in ones."""

import dataclasses
import functools as ft

import numpy as np

from .alf import gamma_17, mirror, s10_drifts, s10_kicks
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


# Störmer (1907), Verlet (1967), doi:10.1103/PhysRev.159.98.
stormer_verlet = SplittingTableau((0.5, 0.5), (1.0,), order=2, embedded_order=1)


def _symmetric(half: list[float], count: int) -> tuple[float, ...]:
    """All `count` lengths from the first half without the middle one or two."""
    if count % 2 == 1:
        return mirror(half, 1 - 2 * sum(half))
    return mirror([*half, 1 / 2 - sum(half)])


# Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7: tables 2 and 3, methods S6 and
# S10 for two parts of any kind, and SRKN6b and SRKN11b for affine drifts.
# `examples/benchmarks/error_weights.py` computes the error weights here and below.
blanes_moan4 = SplittingTableau(
    _symmetric([0.0792036964311957, 0.353172906049774, -0.0420650803577195], 7),
    _symmetric([0.209515106613362, -0.143851773179818], 6),
    order=4,
    embedded_order=3,
    error_scale=3e-3,
)
blanes_moan4_nystrom = SplittingTableau(
    _symmetric([0.0829844064174052, 0.396309801498368, -0.0390563049223486], 7),
    _symmetric([0.245298957184271, 0.60487266571108], 6),
    order=4,
    embedded_order=3,
    error_scale=3e-3,
    nystrom=True,
    error_weights=(
        (
            0.0020968800119918127,
            -0.031716149842605436,
            -0.5623420205365436,
            0.8184806281851013,
            -0.2756045483811671,
            -0.05322628951462067,
            0.1023115000778437,
        ),
        (
            0.0011951345880733657,
            -0.28357123664260725,
            0.1369708322192589,
            0.28228876471719094,
            0.14414431504442576,
            -0.29106333558872766,
            0.010035525662385757,
        ),
    ),
)
blanes_moan6 = SplittingTableau(
    _symmetric(s10_kicks, 11),
    _symmetric(s10_drifts, 10),
    order=6,
    embedded_order=4,
    error_scale=1e-3,
)
blanes_moan6_nystrom = SplittingTableau(
    _symmetric(
        [
            0.0414649985182624,
            0.198128671918067,
            -0.0400061921041533,
            0.0752539843015807,
            -0.0115113874206879,
        ],
        12,
    ),
    _symmetric(
        [
            0.123229775946271,
            0.290553797799558,
            -0.127049212625417,
            -0.246331761062075,
            0.357208872795928,
        ],
        11,
    ),
    order=6,
    embedded_order=4,
    error_scale=1e-3,
    nystrom=True,
    error_weights=(
        (
            -0.0103635061726241,
            0.016545733920682548,
            -0.04421730263841966,
            0.05645214187250835,
            -0.00793099390413154,
            -0.03329014292589842,
            0.012625601682911998,
            0.07334946441383385,
            -0.0515238113425022,
            -0.10420885815390281,
            0.09443713483276259,
            -0.0018754615852206217,
        ),
        (
            -0.018908524414859584,
            0.12866954726479402,
            0.11082196414625164,
            -0.07776756685032551,
            -0.036730573926225016,
            -0.151735687011466,
            0.15514363753811605,
            0.03335993363344048,
            0.0742313395473435,
            -0.10645747722889586,
            -0.1381197371142948,
            0.02749314441612095,
        ),
    ),
)

# Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9: 17 steps of Störmer–Verlet.
_halves = np.array(gamma_17) / 2
kahan_li8 = SplittingTableau(
    tuple(map(float, np.append(_halves, 0) + np.append(0, _halves))),
    gamma_17,
    order=8,
    embedded_order=5,
    error_scale=3e-3,
    error_weights=(
        (
            -0.02614485985510131,
            0.020362048587674948,
            -0.6715621579564239,
            0.22116377828039127,
            -0.036430552995936574,
            0.2479495947038952,
            0.0005798269592946145,
            -0.07988954802462668,
            -0.0896892469962422,
            0.8207728249735131,
            -0.13712588215116753,
            -0.009463554998170164,
            -0.08830052999470232,
            0.21193673860772502,
            0.003158555308832224,
            0.2230758391702337,
            -0.6356280118065704,
            0.025235138187380976,
        ),
        (
            0.14323681178048517,
            -2.5138055063628366,
            0.715264878042336,
            -0.17724187396143176,
            -0.6009071495185397,
            0.6638618477624425,
            1.6662348421890556,
            -0.46105175300168805,
            -0.0036399473386704573,
            0.8838439879790095,
            -0.4082367911765775,
            1.7811720954260017,
            0.232169774795212,
            -0.17132353835329756,
            -0.5204543528041191,
            0.16665181064054216,
            -1.645113774465797,
            0.2493386383678716,
        ),
    ),
)
