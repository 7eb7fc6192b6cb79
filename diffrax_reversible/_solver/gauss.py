"""Gauss methods, for problems of which the stiffness is oscillatory."""

from typing import ClassVar

import lineax as lx
import optimistix as optx

from .._coefficients.gauss import gauss, GaussTableau
from .abstract_gauss import AbstractGauss
from .stage_equations import StageNewton


def _newton() -> optx.AbstractRootFinder:
    return StageNewton(rtol=0.0, atol=1e-5)


class ImplicitMidpoint(AbstractGauss):
    """The implicit mid-point rule: Gauss collocation of one stage.

    For ordinary differential equations of which the fastest modes oscillate, and need not
    be resolved: waves, the Schrödinger equation, stiff springs. It is symmetric,
    symplectic, keeps quadratic invariants, and is A-stable: steps are not bounded by the
    fastest frequency. Where fast modes are damped, as by heat conduction, their walk back
    is ill-conditioned, known states have to be close to each other, and a dissipative
    solver, as [`diffrax.Kvaerno5`][], serves better.

    Order 2, embedded order 2, linear interpolation of order 1. A step solves equations in
    one state, by the `root_finder` and a last step of Newton's, to rounding; for vector
    fields that are seen to be affine by one linear solve. The error estimate takes two
    evaluations and a linear solve more. The walk back solves the same equations, and its
    pull-back takes one linear solve. Memory of `SaveAt(dense=True)`: three states a step.

    ??? cite "Reference"

        Hairer, Lubich & Wanner (2006), *Geometric Numerical Integration*, section II.1,
        doi:10.1007/3-540-30666-8.
    """

    root_finder: optx.AbstractRootFinder = _newton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(1)


class Gauss4(AbstractGauss):
    """Gauss collocation of two stages.

    For what [`diffrax_reversible.ImplicitMidpoint`][] is for, with higher accuracy, and
    with the same properties.

    Order 4, embedded order 3, interpolation by the collocation polynomial, of order 2. A
    step solves equations in two states. Memory of `SaveAt(dense=True)`: four states a step.

    ??? cite "Reference"

        Hairer & Wanner (1996), *Solving Ordinary Differential Equations II*, section IV.5,
        doi:10.1007/978-3-642-05221-7.
    """

    root_finder: optx.AbstractRootFinder = _newton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(2)


class Gauss6(AbstractGauss):
    """Gauss collocation of three stages.

    For what [`diffrax_reversible.ImplicitMidpoint`][] is for, with higher accuracy, and
    with the same properties.

    Order 6, embedded order 4, interpolation by the collocation polynomial, of order 3. A
    step solves equations in three states. Memory of `SaveAt(dense=True)`: five states a
    step.

    ??? cite "Reference"

        Hairer & Wanner (1996), *Solving Ordinary Differential Equations II*, section IV.5,
        doi:10.1007/978-3-642-05221-7.
    """

    root_finder: optx.AbstractRootFinder = _newton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(3)


for _cls in (ImplicitMidpoint, Gauss4, Gauss6):
    _cls.__init__.__doc__ = """**Arguments:**

- `root_finder`: an optimistix root finder, for the stage equations. They are in units of
    the state, entry by entry (at least 2e-9 of the largest of an array in double precision,
    and that itself in single), so that its `atol` is relative to these. Where it ends, a
    step of Newton's method has to leave nothing but rounding: from an error of 1e-8 in
    double precision. Defaults to Newton's method until a correction is less than 1e-5. As
    `ReversibleAdjoint` relies on the solution, tolerances of a step size controller do not
    serve.
- `linear_solver`: a lineax solver, for Newton's method (but for that of another
    `root_finder`, which has one of its own), the filter of the error estimate and
    pull-backs. Defaults to LU decomposition, for which the Jacobian is made as a dense
    matrix. For large states pass one that makes none, as
    `lineax.GMRES(rtol=1e-12, atol=1e-12)`. With an iterative one, how far the walk back
    misses a known state is measured by the largest entry of an array. The unknowns are
    real: the real and imaginary parts of complex arrays, along a first axis.
- `root_find_max_steps`: after how many iterations a step is given up: rejected by an
    adaptive controller, and an error with steps of constant size.

**Raises:**

`ValueError` in the solve for terms that are not integrated with respect to time.
"""
