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
from .base import check_flags
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
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class BlanesMoan4(AbstractSplitting):
    """The method of order 4 and six stages of Blanes and Moan.

    For systems as [`diffrax_reversible.StormerVerlet`][]. Of their two methods, `nystrom`
    is the more accurate one for systems of second order, of which `term_q` is affine in
    time and momentum, as `p / m` is. The default is for any drift.

    Order 4, embedded order 3, six evaluations of each vector field a step (and one of the
    force at the start), cubic Hermite interpolation of order 4 (four states a step with
    `SaveAt(dense=True)`). An error estimate and interpolation take one evaluation of the
    drift more.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN6b and S6.
    """

    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)
    nystrom: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_flags(self, "nystrom")

    @property
    def tableau(self) -> SplittingTableau:
        return blanes_moan4_nystrom if self.nystrom else blanes_moan4


class BlanesMoan6(AbstractSplitting):
    """The methods of order 6 and eleven or ten stages of Blanes and Moan.

    For systems as [`diffrax_reversible.StormerVerlet`][]. Of two methods, `nystrom` is the
    more accurate one for systems of second order, of which `term_q` is affine in time and
    momentum, as `p / m` is. The default is for any drift.

    Order 6, embedded order 4, ten evaluations of each vector field a step, or eleven if
    `nystrom` (and one of the force at the start). Quintic Hermite interpolation of
    order 6 from second derivatives at both ends (six states a step with
    `SaveAt(dense=True)`), which take a forward-mode derivative of the vector fields each,
    if there is anything to interpolate.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN11b and S10.
    """

    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)
    nystrom: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_flags(self, "nystrom")

    @property
    def tableau(self) -> SplittingTableau:
        return blanes_moan6_nystrom if self.nystrom else blanes_moan6


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
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


for _cls in (StormerVerlet, BlanesMoan4, BlanesMoan6, KahanLi8):
    _cls.__init__.__doc__ = f"""**Arguments:**

{rounding}"""

for _cls in (BlanesMoan4, BlanesMoan6):
    assert _cls.__init__.__doc__ is not None
    _cls.__init__.__doc__ += """
- `nystrom`: `True` for the method for systems of second order.

**Raises:**

`ValueError` in the solve, if `nystrom` and `term_q` is not seen to be affine: if its
derivative depends on time or momentum by any operation, as that of `p**1.5` does.
"""
