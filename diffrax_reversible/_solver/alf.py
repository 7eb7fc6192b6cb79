"""Asynchronous leapfrog and its compositions of order 4, 6 and 8."""

from typing import ClassVar

import equinox as eqx

from .._coefficients.alf import alf2, alf4, alf6, alf8
from .._coefficients.alf_tableau import ALFTableau
from .abstract_alf import AbstractALF


class ALF2(AbstractALF):
    """Asynchronous leapfrog of order 2, for problems that do not contract.

    Order 2, embedded order 1, one evaluation per step (and one at the start). Cubic Hermite
    interpolation of order 2 takes no evaluation. Memory of `SaveAt(dense=True)`: four
    states per step.

    Algebraically reversible: undoing a step takes one evaluation, and is exact up to
    rounding. The price is the second half of the state, `v`, whose deviation from the
    vector field grows where the flow contracts. With a single sub-step, the deviation
    cannot be distinguished from the local error, so this solver does not restart as `ALF4`
    does. Avoid it on dissipative problems: the solution itself is lost, with a successful
    result. On `y' = -λ y` that happens past `λ T = 15`. Its error estimate does not show a
    jump of the vector field in the second half of a step: give `jump_ts` to the controller.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF2
    >>> term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    >>> sol = diffrax.diffeqsolve(term, ALF2(), 0, 1, 0.01, jnp.array([1.0, 0.0]))
    >>> print(f"{sol.ys[0, 0]:.3f}")
    0.540

    References: Mutze (2013), arXiv:1311.6602; Zhuang, Dvornek, Tatikonda & Duncan (2021),
    *MALI*, arXiv:2102.04668.
    """

    tableau: ClassVar[ALFTableau] = alf2
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF4(AbstractALF):
    """Composition of asynchronous leapfrog of order 4: the solver to start with.

    It suits the tolerances of machine learning, 1e-3 to 1e-6.

    Order 4, embedded order 3, five evaluations per step (and one at the start). Hermite
    interpolation of order 4 takes two more, at both ends of each step with an interpolated
    output; without `ReversibleAdjoint`, in every step if there is any such output. Memory
    of `SaveAt(dense=True)`: five states per step.

    Algebraically reversible: undoing a step takes five evaluations, and is exact up to
    rounding. Where the flow contracts, the deviation of `v` from the vector field grows.
    `v` is restarted, at the cost of one evaluation, before the deviation matters: about
    once per `λ T = 10`, and more often if steps are close to the limit of stability. Every
    entry of the state is watched on its own scale: its largest magnitude so far, but at
    least `eps^(3/4)` of the largest entry of its array, as smaller values may be rounding.
    Rounding errors of `v` do not decay with an entry, and would keep steps short: so it is
    also watched on the scale of what is left of it.

    The `λ` above is that of the direction that contracts fastest. Chaotic problems need as
    many restarts as dissipative ones, conservative ones few or none.

    The error estimate is the largest of three. Two of them count for steps close to the
    limit of stability, where the first may miss the error. On `y' = λ y` the estimate is at
    least a quarter of the error of a step wherever that exceeds 1e-3, for `Re λ <= 0` and
    `|h λ| <= 15`. The last 13 % of a step follow its last evaluation, and would hide a jump
    of the vector field, or a singularity at the end of the solve. So adaptive steps take a
    sixth evaluation for the estimate, at their end, if the field may have jumps or kinks:
    if it compares, rounds, looks up tables, takes maxima or angles, takes complex
    logarithms or roots, or calls a function with a `jax.custom_jvp` or `jax.custom_vjp`;
    and if it may be singular in time, as those of diffusion models are: if it divides by
    what depends on the time, or takes a logarithm or a root of that. The backward pass
    takes none.

    Example:

    >>> import diffrax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF4, ReversibleAdjoint
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> solve = lambda y0: diffrax.diffeqsolve(
    ...     term, ALF4(), 0, 1, 0.1, y0, adjoint=ReversibleAdjoint()
    ... )
    >>> print(f"{jax.grad(lambda y0: solve(y0).ys[0])(jnp.array(1.0)):.4f}")
    0.3679

    Reference: McLachlan & Atela (1992), doi:10.1088/0951-7715/5/2/011: the splitting method
    behind its coefficients.
    """

    tableau: ClassVar[ALFTableau] = alf4
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF6(AbstractALF):
    """Composition of asynchronous leapfrog of order 6, for tolerances of 1e-6 and below.

    It also suits long integrations.

    Order 6, embedded order 5, twenty evaluations per step (and one at the start). Hermite
    interpolation of order 6 takes three more, at both ends and at the mid-point of each
    step with an output before its end; without `ReversibleAdjoint`, in every step if there
    is any output between steps. Memory of `SaveAt(dense=True)`: eight states per step.

    Algebraically reversible: undoing a step takes twenty evaluations, and is exact up to
    rounding. It restarts as `ALF4` does, and the same bound holds for its error estimate,
    for which fields that may have jumps, kinks or singularities in time are evaluated once
    more, as with `ALF4`.
    Explicit reversible methods without restarts overflow on Lorenz' equations over a time
    of 10. With 100 steps per unit of time this solver takes at most 12 restarts for an
    error below 1e-6.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF6
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> sol = diffrax.diffeqsolve(term, ALF6(), 0, 1, 0.5, jnp.array(1.0))
    >>> print(f"{sol.ys[0]:.4f}")
    0.3679

    Reference: Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, method S10 of order
    6: the splitting method behind its coefficients.
    """

    tableau: ClassVar[ALFTableau] = alf6
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF8(AbstractALF):
    """Composition of asynchronous leapfrog of order 8, for errors below 1e-9.

    Order 8, embedded order 7, thirty-four evaluations per step (and one at the start).
    Hermite interpolation of order 7 takes two more, as with `ALF4`. Memory of
    `SaveAt(dense=True)`: seven states per step.

    Algebraically reversible: undoing a step takes thirty-four evaluations, and is exact up
    to rounding. It restarts as `ALF4` does, and the same bound holds for its error
    estimate, for which fields that may have jumps, kinks or singularities in time are
    evaluated once more, as with `ALF4`.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF8
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> sol = diffrax.diffeqsolve(term, ALF8(), 0, 1, 0.5, jnp.array(1.0))
    >>> print(f"{sol.ys[0]:.4f}")
    0.3679

    Reference: Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9: their composition of 17
    stages, on pairs of sub-steps.
    """

    tableau: ClassVar[ALFTableau] = alf8
    compensated: bool = eqx.field(default=False, static=True)
    bitwise: bool = eqx.field(default=False, static=True)


class ALF(AbstractALF):
    """Composition of asynchronous leapfrog with coefficients of your own.

    Order, embedded order, evaluations per step and interpolation are those of the
    `tableau`; otherwise it works as `ALF4` does, which also names the sources.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF, ALFTableau
    >>> gamma = 1 / (2 - 2 ** (1 / 3))  # Yoshida's composition, on pairs of half steps
    >>> halves = [g / 2 for g in (gamma, 1 - 2 * gamma, gamma) for _ in range(2)]
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> solver = ALF(ALFTableau(halves, order=4))
    >>> sol = diffrax.diffeqsolve(term, solver, 0, 1, 0.1, jnp.array(1.0))
    >>> print(f"{sol.ys[0]:.3f}")
    0.368
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
- `compensated`: whether sums have twice the precision and do not round. The backward pass
    then differs from the forward pass only as far as the vector field does when it is
    evaluated again. For single precision, and for long or chaotic solves, where rounding
    errors of plain sums grow in the backward pass. In float32 the gradient is then about as
    accurate as with the default adjoint, or more so. It costs the memory of up to seven
    more states, ten where steps are rejected, and about thirty operations per entry of the
    state and sub-step.
- `bitwise`: as `compensated`, and the vector field is compiled separately, so that the
    backward pass reconstructs every state to the last bit. It costs one more evaluation
    per sub-step in the backward pass.
    Reason: where a vector field is differentiated, XLA may compile it in another way, fuse
    a multiplication with an addition, or replace a division by a power.
    Tests: on CPUs, over a million steps. GPUs were not tried.
    Limits: Let `M` be the largest entry of an array at the start of the solve, and `p` the
    bits of precision. Entries smaller than `2^(-3p/4) M` may differ by `2^(-7p/4) M`.
    States must not outgrow `M` by `2^(p/4 - 2)` (2,000 in float64, 16 in float32), or sums
    round, with twice the precision. So do those of an array that starts at zero, with
    derivatives of zero. Times may round differently in steps that are replayed because the
    record of a long solve had no room for them. Under `jax.jvp` of a gradient, as in
    `jax.hessian`, the vector field is compiled together with its derivative, and the
    backward pass is as with `compensated`: in float32 it may miss a sensitive solution by
    more than `drift_tol`, which raises an error.
"""

for _cls in (ALF2, ALF4, ALF6, ALF8):
    _cls.__init__.__doc__ = f"""**Arguments:**

{rounding}"""

ALF.__init__.__doc__ = f"""**Arguments:**

- `tableau`: an `ALFTableau`, which checks its coefficients.
{rounding}
**Raises:**

`ValueError` for a `tableau` of another type.
"""
