"""Symplectic solvers for separable Hamiltonian systems."""

from typing import ClassVar

import equinox as eqx

from .._coefficients.splitting import (
    blanes_moan4,
    blanes_moan4_nystrom,
    blanes_moan6,
    blanes_moan6_nystrom,
    kahan_li8,
    stormer_verlet,
)
from .._coefficients.splitting_tableau import SplittingTableau
from .abstract_splitting import AbstractSplitting
from .alf import rounding
from .base import check_flags


class StormerVerlet(AbstractSplitting):
    """Störmer–Verlet (leapfrog in velocity form), for separable Hamiltonian systems.

    It solves `q' = term_q.vf(t, p, args)` and `p' = term_p.vf(t, q, args)` for
    `terms=(term_q, term_p)` and `y0=(q, p)`, as `diffrax.SemiImplicitEuler` does. Both
    vector fields may depend on time. The method (kick, drift, kick) is symplectic if they
    are derivatives of a Hamiltonian `T(t, p) + V(t, q)`.

    Order 2, embedded order 1, one evaluation of each vector field per step (and one of the
    force at the start). The error estimate takes another evaluation of the drift,
    at the start of the step, and interpolation one there and one at the end. Cubic Hermite
    interpolation is of order 2. Memory of `SaveAt(dense=True)`: four states per step.

    Algebraically reversible: undoing a step takes as many evaluations, and one more of the
    force, and is exact up to rounding. Where the flow contracts nothing grows but rounding
    errors, so there are no restarts. Over any number of equal steps the energy stays close
    to its initial value.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import StormerVerlet
    >>> drift = diffrax.ODETerm(lambda t, p, args: p)
    >>> force = diffrax.ODETerm(lambda t, q, args: -q)
    >>> y0 = (jnp.array(1.0), jnp.array(0.0))
    >>> sol = diffrax.diffeqsolve((drift, force), StormerVerlet(), 0, 1, 0.01, y0)
    >>> print(f"{sol.ys[0][0]:.3f}")
    0.540

    References: Verlet (1967), doi:10.1103/PhysRev.159.98; Hairer, Lubich & Wanner (2003),
    doi:10.1017/S0962492902000144.
    """

    tableau: ClassVar[SplittingTableau] = stormer_verlet
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class BlanesMoan4(AbstractSplitting):
    """Methods of order 4 of Blanes and Moan, for separable Hamiltonian systems.

    Terms and state are as for `StormerVerlet`. The default method works for any drift.
    `nystrom=True` chooses the more accurate method for systems of second order, whose
    `term_q` is affine in time and momentum, as `p / m` is. Both have six stages.

    Order 4, embedded order 3, six evaluations of each vector field per step (and one of the
    force at the start). The error estimate and interpolation evaluate the drift besides, as
    with `StormerVerlet`. Cubic Hermite interpolation is of order 4. Memory of
    `SaveAt(dense=True)`: four states per step.

    Algebraically reversible: undoing a step takes as many evaluations, and one more of the
    force. Rounding, restarts and the energy are as for `StormerVerlet`.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import BlanesMoan4
    >>> drift = diffrax.ODETerm(lambda t, p, args: p / 2)
    >>> force = diffrax.ODETerm(lambda t, q, args: -2 * q)
    >>> y0, solver = (jnp.array(1.0), jnp.array(0.0)), BlanesMoan4(nystrom=True)
    >>> sol = diffrax.diffeqsolve((drift, force), solver, 0, 1, 0.1, y0)
    >>> print(f"{sol.ys[0][0]:.4f}")
    0.5403

    Reference: Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN6b and
    S6.
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
    """Methods of order 6 of Blanes and Moan, for separable Hamiltonian systems.

    Terms and state are as for `StormerVerlet`. The default method, of ten stages, works for
    any drift. `nystrom=True` chooses the more accurate method, of eleven stages, for
    systems of second order, whose `term_q` is affine in time and momentum, as `p / m` is.

    Order 6, embedded order 4, ten evaluations of each vector field per step, or eleven if
    `nystrom` (and one of the force at the start). Quintic Hermite interpolation of order 6
    uses second derivatives at both ends of a step. Each takes a forward-mode derivative of
    the vector fields, if there is anything to interpolate. Memory of `SaveAt(dense=True)`:
    six states per step.

    Algebraically reversible: undoing a step takes as many evaluations, and one more of the
    force. Rounding, restarts and the energy are as for `StormerVerlet`.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import BlanesMoan6
    >>> drift = diffrax.ODETerm(lambda t, p, args: p / 2)
    >>> force = diffrax.ODETerm(lambda t, q, args: -2 * q)
    >>> y0, solver = (jnp.array(1.0), jnp.array(0.0)), BlanesMoan6(nystrom=True)
    >>> sol = diffrax.diffeqsolve((drift, force), solver, 0, 1, 0.5, y0)
    >>> print(f"{sol.ys[0][0]:.4f}")
    0.5403

    Reference: Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, methods SRKN11b and
    S10.
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
    """Method of order 8 of Kahan and Li, for separable Hamiltonian systems.

    Terms and state are as for `StormerVerlet`. Each step composes 17 of its steps.

    Order 8, embedded order 5, seventeen evaluations of each vector field per step (and one
    of the force at the start). Septic Hermite interpolation of order 8 uses second and
    third derivatives at both ends of a step, by forward mode, if there is anything to
    interpolate. Memory of `SaveAt(dense=True)`: eight states per step.

    Algebraically reversible: undoing a step takes as many evaluations, and one more of the
    force. Rounding, restarts and the energy are as for `StormerVerlet`.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import KahanLi8
    >>> drift = diffrax.ODETerm(lambda t, p, args: p)
    >>> force = diffrax.ODETerm(lambda t, q, args: -q)
    >>> y0 = (jnp.array(1.0), jnp.array(0.0))
    >>> sol = diffrax.diffeqsolve((drift, force), KahanLi8(), 0, 1, 0.5, y0)
    >>> print(f"{sol.ys[0][0]:.4f}")
    0.5403

    Reference: Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9.
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
- `nystrom`: whether to use the method for systems of second order.

**Raises:**

`ValueError` in the solve, if `nystrom` and `term_q` is not recognised as affine: if any
operation makes its derivative depend on time or momentum, as for `p**1.5`.
"""
