"""The built-in ALF compositions, each with its source."""

import itertools as it

from .alf_tableau import ALFTableau


def mirror(half: list[float], *middle: float) -> tuple[float, ...]:
    return (*half, *middle, *reversed(half))


def from_splitting(a: list[float], b: list[float]) -> tuple[float, ...]:
    r"""ALF sub-steps from the coefficients of a splitting method.

    The ALF map at `h = 0` is the reflection `R: v -> 2 f(z) - v`. With `Φ_h = R Ψ_h`,
    successive sub-steps alternate between a method `Ψ` and its adjoint method `Ψ*`. A
    composition of `Ψ_{β_i h}` and `Ψ*_{α_i h}` has the order of the splitting method
    `a_1, b_1, a_2, ...` if `β_1 = a_1`, `α_1 = b_1 - β_1`, `β_2 = a_2 - α_1`, and so on
    (McLachlan 1995, doi:10.1137/0916010; Hairer, Lubich & Wanner 2006, section V.3).

    **Arguments:**

    - `a`: the `m + 1` coefficients of the flow that comes first and last.
    - `b`: the `m` coefficients of the other flow.

    **Returns:**

    The `2 m` lengths of the sub-steps.
    """
    interleaved = it.chain.from_iterable(zip(a, b, strict=False))
    # x_1 = a_1, x_2 = b_1 - x_1, x_3 = a_2 - x_2, ...
    return tuple(it.accumulate(interleaved, lambda previous, new: new - previous))


# Mutze (2013), arXiv:1311.6602: the map itself.
alf2 = ALFTableau((1.0,), order=2, error_scale=1.0)

# Five sub-steps from the three-stage splitting method of order 4 of McLachlan & Atela
# (1992), doi:10.1088/0951-7715/5/2/011, by `from_splitting`.
alf4 = ALFTableau(
    mirror([0.26833009578175992, 0.65133142723563993], -0.83932304603479971),
    order=4,
    error_scale=1e-2,
)

# Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, table 2, method S10 of order 6.
s10_kicks = [
    0.0502627644003922,
    0.413514300428344,
    0.0450798897943977,
    -0.188054853819569,
    0.541960678450780,
]
s10_drifts = [0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175]
alf6 = ALFTableau(
    from_splitting(
        list(mirror(s10_kicks, 1 - 2 * sum(s10_kicks))),
        list(mirror([*s10_drifts, 1 / 2 - sum(s10_drifts)])),
    ),
    order=6,
    error_scale=3e-3,
)

# Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9: 17 stages, order 8. On single ALF
# steps these coefficients stall at order 4, since the map at `h = 0` is not the identity.
# Pairs of half steps are a symmetric method near the identity and reach the full order.
_gamma = [
    0.13020248308889008087881763,
    0.56116298177510838456196441,
    -0.38947496264484728640807860,
    0.15884190655515560089621075,
    -0.39590389413323757733623154,
    0.18453964097831570709183254,
    0.25837438768632204729397911,
    0.29501172360931029887096624,
]
gamma_17 = mirror(_gamma, -0.60550853383003451169892108)
alf8 = ALFTableau(
    tuple(half for gamma in gamma_17 for half in (gamma / 2, gamma / 2)),
    order=8,
    error_scale=3e-3,
)
