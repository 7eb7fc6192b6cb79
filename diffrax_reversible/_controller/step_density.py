"""Step-size control by a density of steps that is evolved along with the solution."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractTerm, RESULTS
from jax.core import Tracer
from jaxtyping import PyTree

from .._custom_types import Args, IntScalarLike, RealScalarLike, VF, Y
from .._exact_sum import LowPart
from .._jaxpr import derives_custom_vjp, no_derivative
from .._precision import eps
from .base import AbstractReversibleStepSizeController
from .step_density_state import Closed, StepDensityState, to_unit, unit_of
from .time_scale import Field, squared_time_scale


_call = "`diffeqsolve(..., stepsize_controller=StepDensityController(...))`"

# The first step has at least so many units of time, unless it begins at a large time.
_least_units = 512

_no_first_step = (
    f"{_call}: the length of the first step, given by `dt0=...` or by `step_size` at "
    "`(t0, y0)`, is not a positive and finite number."
)


class StepDensityController(
    AbstractReversibleStepSizeController[StepDensityState, RealScalarLike | None]
):
    """Reversible adaptive steps, whose length is a function of the state.

    Use it for long solves of reversible systems, and for gradients that record no steps.

    The density of steps, `ρ = 1/h`, is evolved along with the solution,

        ρ_{n+1/2} = ρ_{n-1/2} + G(t_n, y_n),    G = -d/dt log s(t, y(t)),
        t_{n+1} = t_n + 1/ρ_{n+1/2},

    where `s` is the desired step size and the derivative is along the solution. It starts
    from `ρ_{1/2} = 1/s(t_0, y_0) + G(t_0, y_0)/2`. No step is rejected, and the past enters
    only through `ρ`. So a solve backwards in time takes the same steps, and a symmetric
    method keeps the long-time behaviour that it has with constant steps: on a reversible
    system, such as a planetary system, the error of the energy does not drift.

    `ReversibleAdjoint` does not record the steps (except with `diffrax.LeapfrogMidpoint`):
    the backward pass recomputes them, so that compiled memory is the same to the byte for
    any number of steps.
    Gradients hold the steps fixed.

    The evolution of `ρ` changes the length by at most a factor of four from one step to the
    next. Steps follow `s` where it changes little per step. Where it changes faster, steps
    fall behind and do not catch up, as that would not be reversible. Only steps more than
    twice as long as desired are shortened, by any factor, to at most four times the desired
    length. That is invertible, but
    not symmetric, and where it persists the backward pass raises an error. To bound the
    error step by step, and where `s` jumps, use `diffrax.PIDController`. If `s` is NaN or
    not positive, the solve ends with `RESULTS.dt_min_reached`.

    The controller works with any solver for ordinary differential equations, of this
    package or of Diffrax. Each step costs one evaluation of `G`. Without `step_size` that
    takes the third derivative along the solution, by forward mode (about ten evaluations of
    the vector field); with `step_size` it takes about two. The controller state holds the
    arrays in `terms`, and under `vmap` one copy for each member of the batch: pass large
    arrays as `args`, which it does not hold.

    **Arguments:**

    - `step_size`: the desired step size, a scalar function of `(t, y, args)`. If `dt0` is
        given, it is scaled to be `dt0` at the start. By default it is `fraction` times the
        time in which the vector field changes by its own size, which counts as at most the
        length of the solve: of the first one, if `controller_state` is passed on.
    - `fraction`: a positive number, used only without `step_size`.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import ALF4, StepDensityController
    >>> term = diffrax.ODETerm(lambda t, y, args: -y)
    >>> steps = StepDensityController(fraction=0.1)
    >>> kwargs = dict(stepsize_controller=steps)
    >>> sol = diffrax.diffeqsolve(term, ALF4(), 0, 1, None, jnp.ones(()), **kwargs)
    >>> print(f"{sol.ys[0]:.3f}", sol.stats["num_rejected_steps"])
    0.368 0

    References: Hairer & Söderlind (2005), *Explicit, time reversible, adaptive step size
    control*, doi:10.1137/040606995; Hairer, Lubich & Wanner (2006), *Geometric Numerical
    Integration*, section VIII.3.2, doi:10.1007/3-540-30666-8. They add `ε G` to `ε ρ`, with
    `s = ε σ`, which is equivalent.
    """

    step_size: Callable[[RealScalarLike, Y, Args], RealScalarLike] | None = None
    fraction: RealScalarLike = 0.1
    _direction: IntScalarLike = eqx.field(default=1, repr=False)

    def __check_init__(self):
        if not (self.step_size is None or callable(self.step_size)):
            raise ValueError(
                f"`StepDensityController(step_size={self.step_size})` must be a function "
                "of `(t, y, args)`, or `None` to derive the step size from the solution."
            )
        if not isinstance(self.fraction, Tracer) and not self.fraction > 0:
            raise ValueError(
                f"`StepDensityController(fraction={self.fraction})` must be positive."
            )

    def wrap(self, direction: IntScalarLike) -> "StepDensityController":
        # `replace` keeps the class of a subclass.
        return dataclasses.replace(self, _direction=direction)

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        dt0: RealScalarLike | None,
        args: Args,
        func: Callable[[PyTree[AbstractTerm], RealScalarLike, Y, Args], VF],
        error_order: RealScalarLike | None,
    ) -> tuple[RealScalarLike, StepDensityState]:
        del error_order
        t0, t1, dt0, y0 = lax.stop_gradient((t0, t1, dt0, y0))
        t0 = jnp.asarray(t0)
        field = self._field(terms, args, func, y0)
        self._check_derivative(field, t0, y0, args)
        make_step_size = self._make_step_size(terms, t0, t1, y0, args, func)
        wished = make_step_size(field, args)(t0, y0)
        wished = jnp.asarray(lax.stop_gradient(wished), t0.dtype)
        first = wished if dt0 is None else jnp.asarray(dt0, t0.dtype)
        # A solve of no length has no direction, which Diffrax multiplies `dt0` by.
        first = jnp.where(t0 == t1, jnp.abs(first), first)
        first = eqx.error_if(first, ~((first > 0) & jnp.isfinite(first)), _no_first_step)
        # With `dt0`, only the ratios of step sizes matter.
        unit = first / wished

        def wish(t, y, args):
            field = self._field(terms, args, func, y0)
            step_size = make_step_size(field, args)
            log_step_size = lambda t, y: jnp.log(jnp.asarray(step_size(t, y), t.dtype))
            along = jnp.ones_like(t), field(t, y)
            value, slope = jax.jvp(log_step_size, (t, y), along)
            return jnp.exp(-value) / unit, -slope

        # However far off the end is, the unit of time is a small part of the first step.
        reach = first / (_least_units * eps(first))
        largest = jnp.maximum(abs(t0), jnp.minimum(abs(t1), reach))
        time_unit = unit_of(jnp.maximum(largest, first))
        closed = Closed.close(wish, t0, y0, args)
        low = LowPart.start(1 / first, 1 / first)
        state = StepDensityState(1 / first, low, time_unit, closed).start(t0, y0, args)
        return to_unit(t0 + state.step(), time_unit), state

    def adapt_step_size(
        self,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        y1_candidate: Y,
        args: Args,
        y_error: Y | None,
        error_order: RealScalarLike,
        controller_state: StepDensityState,
    ) -> tuple[
        bool,
        RealScalarLike,
        RealScalarLike,
        bool,
        StepDensityState,
        RESULTS,
    ]:
        del t0, y0, y_error, error_order
        state, can_go_on = controller_state.cross(t1, y1_candidate, args)
        result = RESULTS.where(can_go_on, RESULTS.successful, RESULTS.dt_min_reached)
        return True, t1, t1 + state.step(), False, state, result

    def inverse(
        self,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        controller_state: StepDensityState,
    ) -> tuple[RealScalarLike, StepDensityState]:
        state = controller_state.cross_back(t1, y1, args)
        return t1 - state.step(), state

    def _field(self, terms: PyTree[AbstractTerm], args: Args, func, y0: Y) -> Field:
        """The vector field, in the direction that the solve runs in."""

        def field(t, y):
            f = func(terms, t, y, args)
            return jtu.tree_map(lambda f, y: (self._direction * f).astype(y.dtype), f, y)

        structs = jax.eval_shape(lambda t: func(terms, t, y0, args), 0.0)
        shapes = [(x.shape for x in jtu.tree_leaves(x)) for x in (structs, y0)]
        if jtu.tree_structure(structs) != jtu.tree_structure(y0) or (
            list(shapes[0]) != list(shapes[1])
        ):
            raise ValueError(
                f"{_call} is for ordinary differential equations, and got terms whose "
                "vector field does not have the structure and shapes of the state. Use "
                "`diffrax.PIDController` or constant steps."
            )
        return field

    def _check_derivative(self, field: Field, t: RealScalarLike, y: Y, args: Args) -> None:
        """Raise an error if what is differentiated has no derivative by forward mode."""
        name, fn = "vector field", field
        if (step_size := self.step_size) is not None:
            name, fn = "`step_size`", lambda t, y: step_size(t, y, args)

        def along_solution(t, y):
            return jax.jvp(fn, (t, y), (jnp.ones_like(t), field(t, y)))[1]

        if derives_custom_vjp(along_solution, t, y):
            raise ValueError(no_derivative(f"{_call} chooses steps", name))

    def _make_step_size(
        self, terms: PyTree[AbstractTerm], t0, t1, y0: Y, args: Args, func
    ) -> Callable[[Field, Args], Callable]:
        """The desired step size as a function of time and state, given a vector field and
        arguments."""
        if self.step_size is None:
            field = self._field(terms, args, func, y0)
            squared = squared_time_scale(field, t0, y0, abs(t1 - t0))

            def step_size(field, args):
                del args
                return lambda t, y: self.fraction * jnp.sqrt(squared(field, t, y))

            return step_size
        fn = self.step_size
        struct = jax.eval_shape(lambda: fn(t0, y0, args))
        if getattr(struct, "shape", None) != ():
            raise ValueError(
                "`StepDensityController(step_size=...)` has to return a scalar, the "
                f"desired step size at `(t, y, args)`, but returned {struct}."
            )
        return lambda field, args: lambda t, y: fn(self._direction * t, y, args)
