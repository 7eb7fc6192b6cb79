"""Symplectic solvers for separable Hamiltonian systems."""

from typing import ClassVar

import equinox as eqx

from .._coefficients.splitting import (
    blanes_moan4,
    blanes_moan4_nystrom,
    blanes_moan6,
    blanes_moan6_nystrom,
    kahan_li8,
    SplittingTableau,
    stormer_verlet,
)
from .alf import rounding
from .splitting import AbstractSplitting


class StormerVerlet(AbstractSplitting):
    """Störmer–Verlet, or leapfrog, in its velocity form: kick, drift, kick.

    For `terms=(term_q, term_p)` and `y0=(q, p)`, as for [`diffrax.SemiImplicitEuler`][]:
    `q' = term_q.vf(t, p, args)` and `p' = term_p.vf(t, q, args)`, where either may depend
    on time. Symplectic if these are derivatives of a Hamiltonian `T(t, p) + V(t, q)`.

    Order 2, embedded order 1, one evaluation of each vector field a step (and one of the
    force at the start), cubic Hermite interpolation of order 2 (four states a step with
    `SaveAt(dense=True)`). An error estimate and interpolation take one evaluation of the
    drift more.

    Algebraically reversible: a step is undone by as many evaluations, up to rounding. There
    is nothing that grows where the flow contracts but rounding, and no restart.

    ??? cite "Reference"

        Verlet (1967), doi:10.1103/PhysRev.159.98; Hairer, Lubich & Wanner (2003),
        doi:10.1017/S0962492902000144.
    """

    tableau: ClassVar[SplittingTableau] = stormer_verlet
    nystrom_tableau: ClassVar[SplittingTableau] = stormer_verlet
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class BlanesMoan4(AbstractSplitting):
    """The method of order 4 and six stages of Blanes and Moan.

    For systems as [`diffrax_reversible.StormerVerlet`][]. Of their two methods, that for
    systems of second order is used if `term_q` is seen to be affine in time and momentum,
    as `p / m` is, and otherwise that for any drift.

    Order 4, embedded order 3, six evaluations of each vector field a step (and one of the
    force at the start), cubic Hermite interpolation of order 4 (four states a step with
    `SaveAt(dense=True)`). An error estimate and interpolation take one evaluation of the
    drift more.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN6b and S6.
    """

    tableau: ClassVar[SplittingTableau] = blanes_moan4
    nystrom_tableau: ClassVar[SplittingTableau] = blanes_moan4_nystrom
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class BlanesMoan6(AbstractSplitting):
    """The methods of order 6 and eleven or ten stages of Blanes and Moan.

    For systems as [`diffrax_reversible.StormerVerlet`][]. Of two methods, that for systems
    of second order is used if `term_q` is seen to be affine in time and momentum, as
    `p / m` is, and otherwise that for any drift.

    Order 6, embedded order 4, eleven evaluations of each vector field a step if affine,
    and ten otherwise (and one of the force at the start). Quintic Hermite interpolation of
    order 6 from second derivatives at both ends (six states a step with
    `SaveAt(dense=True)`), which take a forward-mode derivative of the vector fields each,
    if there is anything to interpolate.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN11b and S10.
    """

    tableau: ClassVar[SplittingTableau] = blanes_moan6
    nystrom_tableau: ClassVar[SplittingTableau] = blanes_moan6_nystrom
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class KahanLi8(AbstractSplitting):
    """The composition of order 8 of 17 Störmer–Verlet steps of Kahan and Li.

    For systems as [`diffrax_reversible.StormerVerlet`][].

    Order 8, embedded order 5, seventeen evaluations of each vector field a step (and one
    of the force at the start). Septic Hermite interpolation of order 8 from second and
    third derivatives at both ends (eight states a step with `SaveAt(dense=True)`), by
    forward mode, if there is anything to interpolate.

    ??? cite "Reference"

        Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9.
    """

    tableau: ClassVar[SplittingTableau] = kahan_li8
    nystrom_tableau: ClassVar[SplittingTableau] = kahan_li8
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


for _cls in (StormerVerlet, BlanesMoan4, BlanesMoan6, KahanLi8):
    _cls.__init__.__doc__ = f"""**Arguments:**

{rounding}"""
