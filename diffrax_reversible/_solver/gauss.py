"""Gauss methods, for problems with oscillatory stiffness."""

from typing import ClassVar

import lineax as lx
import optimistix as optx

from .._coefficients.gauss import gauss, GaussTableau
from .abstract_gauss import AbstractGauss
from .stage_newton import StageNewton


class ImplicitMidpoint(AbstractGauss):
    """The implicit mid-point rule (Gauss collocation of one stage), for stiff oscillations.

    Use it where the fastest modes oscillate and need not be resolved: waves, the
    Schrödinger equation, stiff springs. It is symmetric, symplectic and A-stable, and
    preserves quadratic invariants. So the fastest frequency does not bound the step size.

    Order 2, embedded order 2, linear interpolation of order 1. A step solves equations in
    one state to rounding, by the `root_finder` and a final Newton step, or by one linear
    solve if the vector field is recognised as affine. The error estimate takes two more
    evaluations and two linear solves, by one factorisation. Of a fast oscillation it is a
    fraction of the amplitude, so one well above the tolerance is resolved. If only some
    entries matter, such as positions, give these to `diffrax.PIDController(norm=...)`.
    Under `ReversibleAdjoint`, `sol.stats["num_root_find_steps"]` counts iterations. Memory
    of `SaveAt(dense=True)`: three states per step.

    The backward pass solves the same equations, and a pull-back takes one linear solve.
    Where fast modes are damped, as in heat conduction, undoing them is ill-conditioned and
    the backward pass needs known states close to each other: a dissipative solver, such as
    `diffrax.Kvaerno5`, works better.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ImplicitMidpoint
    >>> term = diffrax.ODETerm(lambda t, y, args: 1000 * jnp.stack([y[1], -y[0]]))
    >>> y0 = jnp.array([1.0, 0.0])
    >>> sol = diffrax.diffeqsolve(term, ImplicitMidpoint(), 0, 1, 0.1, y0)
    >>> print(f"{jnp.sum(sol.ys**2):.3f}")
    1.000

    Reference: Hairer, Lubich & Wanner (2006), *Geometric Numerical Integration*, section
    II.1, doi:10.1007/3-540-30666-8.
    """

    root_finder: optx.AbstractRootFinder = StageNewton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(1)


class Gauss4(AbstractGauss):
    """Gauss collocation of two stages, for stiff oscillations.

    It has the purpose and the properties of `ImplicitMidpoint`, with higher accuracy.

    Order 4, embedded order 3, interpolation of order 2 by the collocation polynomial. A
    step solves equations in two states, and so does undoing it. Each iteration takes two
    evaluations and a linear solve; the error estimate costs what it does there. Memory of
    `SaveAt(dense=True)`: four states per step.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import Gauss4
    >>> term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])]))
    >>> sol = diffrax.diffeqsolve(term, Gauss4(), 0, 1, 0.1, jnp.array([1.0, 0.0]))
    >>> print(f"{sol.ys[0, 0]:.3f}")
    0.600

    Reference: Hairer & Wanner (1996), *Solving Ordinary Differential Equations II*, section
    IV.5, doi:10.1007/978-3-642-05221-7.
    """

    root_finder: optx.AbstractRootFinder = StageNewton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(2)


class Gauss6(AbstractGauss):
    """Gauss collocation of three stages, for stiff oscillations.

    It has the purpose and the properties of `ImplicitMidpoint`, with higher accuracy.

    Order 6, embedded order 4, interpolation of order 3 by the collocation polynomial. A
    step solves equations in three states, and so does undoing it. Each iteration takes
    three evaluations and a linear solve; the error estimate costs what it does there.
    Memory of `SaveAt(dense=True)`: five states per step.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import Gauss6
    >>> term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])]))
    >>> sol = diffrax.diffeqsolve(term, Gauss6(), 0, 1, 0.5, jnp.array([1.0, 0.0]))
    >>> print(f"{sol.ys[0, 0]:.3f}")
    0.600

    Reference: Hairer & Wanner (1996), *Solving Ordinary Differential Equations II*, section
    IV.5, doi:10.1007/978-3-642-05221-7.
    """

    root_finder: optx.AbstractRootFinder = StageNewton()
    linear_solver: lx.AbstractLinearSolver = lx.AutoLinearSolver(well_posed=True)
    root_find_max_steps: int = 20

    tableau: ClassVar[GaussTableau] = gauss(3)


for _cls in (ImplicitMidpoint, Gauss4, Gauss6):
    _cls.__init__.__doc__ = """**Arguments:**

- `root_finder`: an optimistix root finder for the stage equations. `ReversibleAdjoint`
    relies on one Newton step from its result to reach rounding, in double precision from an
    error of 1e-8, so the tolerances of a step-size controller are not enough. Its `atol` is
    relative to the size of the state, entry by entry: at least 2e-9 of the largest entry of
    the array in double precision, and that entry itself in single precision. Defaults to
    Newton's method until every correction is less than 1e-5 of its entry (3e-4 in single
    precision), or the residual is rounding.
- `linear_solver`: a lineax solver for Newton's method (another `root_finder` uses its
    own), for the filter of the error estimate and for pull-backs. Defaults to LU
    decomposition of a dense Jacobian. For large states pass a matrix-free solver, such as
    `lineax.GMRES(rtol=1e-12, atol=1e-12)`. With an iterative solver, reconstruction errors
    are measured relative to the largest entry of an array. The unknowns are real: the real
    and imaginary parts of complex arrays, stacked along a first axis.
- `root_find_max_steps`: the number of iterations after which a step is given up. An
    adaptive controller then rejects the step; with constant steps it is an error.

**Raises:**

`ValueError` in the solve for terms that are not integrated with respect to time, for a
state in half precision, and for a vector field without a derivative by forward mode.
"""
