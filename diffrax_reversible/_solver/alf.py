"""Asynchronous leapfrog, and its compositions of order 4, 6 and 8."""

from typing import ClassVar

import equinox as eqx

from .._coefficients.alf import alf2, alf4, alf6, alf8
from .._coefficients.tableau import ALFTableau
from .abstract_alf import AbstractALF


class ALF2(AbstractALF):
    """Asynchronous leapfrog.

    Order 2, embedded order 1, one evaluation a step (and one at the start), cubic Hermite
    interpolation of order 2, at no evaluation (four states a step with
    `SaveAt(dense=True)`).

    Algebraically reversible: a step is undone by one evaluation, up to rounding. The
    price is the second half of the state, `v`, of which the deviation from the vector
    field grows where the flow contracts. With a single sub-step it cannot be told from the
    local error, so that this solver does not restart as the others do: avoid it on
    dissipative problems, of which the solution itself is lost, with a successful result. On
    `y' = -λ y` that is so past `λ T = 15`.

    ??? cite "Reference"

        Mutze (2013), arXiv:1311.6602; Zhuang, Dvornek, Tatikonda & Duncan (2021), *MALI*,
        arXiv:2102.04668.
    """

    tableau: ClassVar[ALFTableau] = alf2
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF4(AbstractALF):
    """Fourth-order composition of asynchronous leapfrog.

    Order 4, embedded order 3, five evaluations a step (and one at the start), Hermite
    interpolation of order 4 (five states a step with `SaveAt(dense=True)`). That takes two
    evaluations more in each step that is interpolated in, at its ends, and without
    `ReversibleAdjoint` in every step if there is anything to interpolate. The one to start
    with at the tolerances of machine learning, 1e-3 to 1e-6.

    Algebraically reversible: a step is undone by five evaluations, up to rounding. Where
    the flow contracts, the deviation of `v` from the vector field grows, and `v` is
    restarted, at one evaluation, before it matters: about once for every `λ T = 10`, and
    more often if steps are as large as is stable. Every entry of the state
    is watched by a scale of its own, the largest that it has been. That is no less than
    `eps^(3/4)` of the largest of its array: what is smaller may be rounding. Of arrays of
    more than 2,048 entries about 1,024 are watched.

    The error estimate is the largest of three, of which two count for steps next to the
    limit of stability: there the first may be blind. On `y' = λ y` it is at least a quarter
    of the error of a step wherever that exceeds 1e-3, for `Re λ <= 0` and `|h λ| <= 15`.

    ??? cite "Reference"

        McLachlan & Atela (1992), doi:10.1088/0951-7715/5/2/011, for the splitting method
        that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf4
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF6(AbstractALF):
    """Sixth-order composition of asynchronous leapfrog.

    Order 6, embedded order 5, twenty evaluations a step (and one at the start), Hermite
    interpolation of order 6 (eight states a step with `SaveAt(dense=True)`). That takes
    three evaluations more in each step that is interpolated in, at its ends and at its
    mid-point, and without `ReversibleAdjoint` in every step if there is anything to
    interpolate. For tolerances of 1e-6 and below, and for long integrations.

    Algebraically reversible: a step is undone by twenty evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does, and its error estimate is no blinder.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, method S10 of order 6,
        for the splitting method that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf6
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF8(AbstractALF):
    """Eighth-order composition of asynchronous leapfrog.

    Order 8, embedded order 7, thirty-four evaluations a step (and one at the start),
    Hermite interpolation of order 7 (seven states a step with `SaveAt(dense=True)`). That
    takes two evaluations more in each step that is interpolated in, as with
    [`diffrax_reversible.ALF4`][]. For tolerances of 1e-10 and below.

    Algebraically reversible: a step is undone by thirty-four evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does, and its error estimate is no blinder.

    ??? cite "Reference"

        Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9, composition of 17 stages, on
        pairs of sub-steps.
    """

    tableau: ClassVar[ALFTableau] = alf8
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF(AbstractALF):
    """Asynchronous leapfrog composed with coefficients of your own.

    As [`diffrax_reversible.ALF4`][], with the order, embedded order, evaluations and
    interpolation of the tableau.
    """

    tableau: ALFTableau = eqx.field(static=True)
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if not isinstance(self.tableau, ALFTableau):
            raise ValueError(
                f"`ALF({self.tableau})` needs an `ALFTableau`. Write "
                "`ALF(ALFTableau(lengths, order=...))`."
            )


rounding = """\
- `compensated`: whether sums are carried with twice the precision, and do not round. The
    walk back then differs from the forward pass by no more than the vector field does
    when it is evaluated again. For single precision, long solves, and chaotic ones.
    Costs the memory of up to five more states, seven where steps are rejected, and about
    thirty operations for each entry of the state in a sub-step.
- `bitwise`: as `compensated`, and whether the vector field is compiled by itself, so
    that the walk back gives every state to the last bit. Costs one more evaluation a
    sub-step in the backward pass. Entries that are smaller than `2^(-3p/4)` of the
    largest of their array where the solve began, with `p` bits of precision, may differ
    by `2^(-7p/4)` of it; and states must not outgrow it by `2^(p/4 - 2)` (by 2,000 in
    float64, by 16 in float32), as then sums round after all. Times of steps that are
    replayed, because the record of a long solve had no room for them, may round
    differently. Under `jax.jvp` of a gradient, as in `jax.hessian`, the vector field is
    compiled together with its derivative, and the walk back is as `compensated`: in
    float32 it may miss a sensitive solution by more than `drift_tol`, which is an
    error.
"""

for _cls in (ALF2, ALF4, ALF6, ALF8):
    _cls.__init__.__doc__ = f"""**Arguments:**

{rounding}"""

ALF.__init__.__doc__ = f"""**Arguments:**

- `tableau`: an [`diffrax_reversible.ALFTableau`][], which checks its coefficients.
{rounding}
**Raises:**

`ValueError` for a `tableau` of another type.
"""
