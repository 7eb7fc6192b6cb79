"""The adjoint that walks a solve back."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from diffrax import AbstractAdjoint

from .._solver.adapter import as_reversible
from .partition import make_visible, partition
from .reversible_loop import reversible_loop, Settings
from .validate import check_supported


def _as_python(x: Any) -> Any:
    """A NumPy scalar as what it is in Python."""
    return x.item() if isinstance(x, np.generic) else x


class ReversibleAdjoint(AbstractAdjoint):
    """Backpropagates by walking the solve backwards, without storing its trajectory.

    For use with an `AbstractReversibleSolver`, or a solver that
    `as_reversible` has a reversible form of, such as
    `diffrax.ReversibleHeun`. The gradient is that of the numerical solution itself, as
    under `diffrax.RecursiveCheckpointAdjoint` with the same solver, up to the rounding
    of the reconstructed states.

    Example:

    >>> import diffrax, jax
    >>> from diffrax_reversible import ALF4, ReversibleAdjoint
    >>> decay = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    >>> def loss(rate):
    ...     step = 0.0, 1.0, 0.05
    ...     adjoint = ReversibleAdjoint()
    ...     sol = diffrax.diffeqsolve(decay, ALF4(), *step, 1.0, rate, adjoint=adjoint)
    ...     return sol.ys[0]
    >>> print(f"{jax.grad(loss)(1.0):.4f}")
    -0.3679

    **Times**

    Step locations other than `t0` and `t1` are held fixed. Under
    `diffrax.PIDController` and `StepDensityController` they do
    not depend on the state anyway, as far as gradients go, nor on `t1`; with respect to
    `SaveAt(ts=...)` the gradient equals that of the default adjoint. How steps depend on
    `t0`, and under `diffrax.ConstantStepSize` on `t1`, is ignored, so that gradients
    with respect to these are accurate to the error of the solve, not to rounding. A
    controller of your own declares that its steps carry no derivative by
    `jax.lax.stop_gradient`, as Diffrax's controllers do. Otherwise gradients of what is
    saved at the ends of steps are refused.

    An event that ends the solve is located as under any adjoint. Diffrax itself
    differentiates its time and state, through the last step.

    **Known states and replays**

    The backward pass undoes the steps from one *known state* to the one before, and
    continues from there, so that rounding errors grow over one such segment only. The known
    states are the start and at most `checkpoints` others: the states before restarts (see
    `ALF4`), which cannot be undone, and in the remaining room one
    every 64 steps or more, evenly spread. A jump can be undone: the solvers of this package
    exchange the vector field that they carry along, by two evaluations and no stored state.

    `checkpoints` is a budget of memory, not a limit to the number of restarts. Where the
    backward pass comes to a restart whose state is not held, it replays the solve from the
    known state before, and holds states on the way in the room there is by then, as in
    recursive checkpointing. Steps that are no longer on record are replayed too, with the
    controller. A replay is compiled apart from the solve, and rounds differently. Where
    step sizes are at the limit of stability the controller may then accept other steps; the
    replay misses the next known state, and the gradient is an error.

    **Comparison with the forward pass**

    At every known state, and at the start, each entry of the reconstruction is compared
    with the forward pass, whether the solver watches that entry or not. If any misses by
    more than a 64th of `drift_tol`, then the backward pass returns to the known state that
    it came from, replays the solve from the one that it missed, holds states on the way,
    and undoes the steps once more. (The threshold is an 8th if the whole solve was undone
    at once, `drift_tol` itself with a Brownian path, and what a replay differs from the
    solve by, if that is more.) The number of steps between known states adapts as step
    sizes do: it is divided by four after a miss, down to a single step, and doubled where
    misses are small.

    If a single step misses by more than `drift_tol`, as where the flow contracts by orders
    of magnitude within it, or where terms of the vector field cancel to the last digit,
    then `ALF4` and its like, and `McCallumFoster`, do not undo it. They differentiate it
    from its start, as the default adjoint does, but store none of its stages: for `n`
    evaluations that takes `n² / 2` others. An entry of a vector field is a sum, and rounds
    as its terms do: a miss of four machine epsilons of the largest entry of its array
    repeats no segment, and one of 16 in a single step is no miss.

    So a flow that contracts too fast for the precision costs evaluations, and is no error.
    The gradient is an error, or NaN with `diffeqsolve(..., throw=False)`, if a replay
    differs from the solve by more than it may, and with `checkpoints=0` or solvers other
    than those, if a step, or the solve, misses by more than `drift_tol`.

    **Solutions and gradients that are lost**

    Solvers that do not restart lose the solution itself where the flow contracts: the
    second approximation that they carry along departs from the first, and nothing in the
    solution shows it. These are `ALF2`,
    `diffrax.ReversibleHeun` and `diffrax.LeapfrogMidpoint`: on
    `y' = -λ (y - cos t)` over a time `T` expect it past `λ T = 15`. The gradient is an
    error, or that of what was computed.

    Fast modes that have died out do not affect the solution, and explicit adaptive solvers
    take steps that these modes are not stable for. A gradient excites them, and grows by
    each such step under every adjoint: on a heat equation of 50 points that of
    `diffrax.Tsit5` is off by a factor of more than ten, at all tolerances from 1e-3 to
    1e-10. Here, with the solvers that restart, it is an error that says how to bound the
    steps: no entry must have grown in steps in which the vector field contracts what grew.

    **Kinks**

    Entries of the state that rest where the solve began, to the last bit, are known to be
    there until something sets them off: so a gradient is on the side of a kink that the
    solve was on, though it began at one, as at zero with `relu`. For vector fields that
    compare or take maxima, this takes an integer and a number for each entry of the state
    and the solver state, and in steps in which anything is set off, one evaluation more for
    each evaluation. With a solver of implicit equations, a stage in such a step may be at
    the kink but for rounding, and the gradient on either side, under every adjoint.

    **Memory**

    A few states, whatever the number of stages; some two to four more for each of
    `checkpoints`, and with those a second sum of the cotangent of everything differentiated
    except the state; one evaluation of the vector field with its pull-back; and a record of
    the last steps, of 9 bytes each in float64 (17 if there may be jumps). The record has
    room for 256 steps at least, for more if `diffrax.RecursiveCheckpointAdjoint` takes
    as much memory for `max_steps` or if there are many `checkpoints`, and for 16,384 at
    most. So memory is bounded for any number of steps, and `max_steps=None` has gradients.
    From `max_steps=256` on, 128 states of 64 numbers, or one of 4,096, take no more than
    with the default adjoint; smaller states and fewer steps may take more. With an
    `AbstractReversibleStepSizeController` no times are recorded, but
    only which steps followed a restart.

    **Work**

    For the solvers of this package one evaluation of the vector field and one pull-back
    through it for each evaluation of the forward pass. If a `SaveAt(fn=...)` interpolates,
    or if times are differentiated, half as much again; for `ALF6` also in steps in which
    anything is interpolated. Each known state costs one evaluation or one step, but none
    with `ALF4` and its like. A replay takes the evaluations of a solve: on
    `y' = -40 (y - cos t)` over a time of 10, `ALF4` restarts 76 times in 400 steps, and 8
    checkpoints cost 1.6 times the evaluations of room for all, 4 checkpoints twice, and 1
    checkpoint 6 times.

    **Transformations**

    - Second derivatives are by forward mode over reverse mode, as in `jax.hessian`.
    - A batch that is sharded over devices stays sharded, forwards and backwards. Besides
        the gradients of what all devices share, only scalars and samples of some two
        thousand entries are exchanged. To raise its own errors Diffrax gathers the solution
        on one device: pass `diffeqsolve(..., throw=False)` where that matters.
    - In `jax.shard_map` pass `check_vma=False`, which Diffrax's loop needs.
    - A `progress_meter` shows the backward pass as well, from 0 % to 100 % once more.
    """

    checkpoints: int | None = eqx.field(default=None, converter=_as_python)
    drift_tol: float | None = eqx.field(default=None, converter=_as_python)
    report: Callable[[dict[str, int]], None] | None = None
    watch: Callable[[dict[str, Any]], None] | None = None

    def __check_init__(self):
        count, tol = self.checkpoints, self.drift_tol
        is_integer = isinstance(count, int) and not isinstance(count, bool)
        if not (count is None or (is_integer and count >= 0)):
            raise ValueError(
                f"`ReversibleAdjoint(checkpoints={count})` must be a non-negative integer, "
                f"known when the solve is compiled, and not a `{type(count).__name__}`."
            )
        if not (tol is None or (isinstance(tol, int | float) and tol >= 0)):
            raise ValueError(
                f"`ReversibleAdjoint(drift_tol={tol})` must be a non-negative number, "
                "known when the solve is compiled, or `None` for the square root of the "
                "machine epsilon."
            )
        for name in ("report", "watch"):
            value = getattr(self, name)
            if not (value is None or callable(value)):
                raise ValueError(
                    f"`ReversibleAdjoint({name}={value})` must be a function, as `print` "
                    "is, or `None`."
                )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ):
        check_supported(terms)
        # Those of others are replaced by their reversible form.
        solver = as_reversible(solver)
        given = dict(
            solver=solver,
            t0=t0,
            t1=t1,
            dt0=dt0,
            saveat=saveat,
            stepsize_controller=stepsize_controller,
            max_steps=max_steps,
        )
        context, visible = make_visible(terms, args, event, init_state, given)
        inputs, problem = partition(
            context,
            init_state,
            given | visible | dict(progress_meter=progress_meter),
            passed_solver_state=passed_solver_state,
            passed_controller_state=passed_controller_state,
        )
        settings = Settings(
            self.checkpoints, self.drift_tol, self.report, self.watch, throw
        )
        return reversible_loop(inputs, problem, settings)


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: how many states and solver states are held at the most, besides the
    start. More of them take more memory, and save evaluations if there are as many
    restarts: `sol.stats["num_restarts"]` reports their number. Defaults to 8, but to none
    for symplectic solvers, whose rounding errors do not grow.
- `drift_tol`: the largest error of the reconstructed state that is accepted, where the
    solve began and at every known state. Each entry is measured as a fraction of its size
    there, of its size at the known state before, or of what a step adds to it, whichever is
    largest, and of no less than `eps^(3/4)` of the largest entry of its array.
    Defaults to 1e-6, or to the square root of the machine epsilon of the coarsest array of
    the state, if that is more: 3.5e-4 in float32. By default steps that are made again may
    differ from those of the solve by `eps^0.37`, 2.8e-3 in float32. Where the problem is
    sensitive to its state, gradients may be off by up to about 400 times the tolerance:
    the most that `examples/benchmarks/outcomes.py` has found on conservative, contracting,
    chaotic and unstable problems.
- `report`: a function, such as `print`, that every gradient calls with a dictionary of the
    number of steps that it has undone (`undone_steps`: more than the solve has, if some
    were undone once more) and replayed (`replayed_steps`). Under `vmap` it is called for
    each member of the batch. More `checkpoints` mean fewer replayed steps.
- `watch`: a function that the backward pass calls at every known state, with a dictionary:
    how many steps come before (`step`), the time (`t`, or `-t` if `t1 < t0`), whether the
    solver was restarted there (`restarted`), by how much the backward pass missed the
    state, as a fraction of `drift_tol` (`miss`), and whether it undoes the last segment
    again for that reason (`repeated`). `explain` shows them.

**Raises:**

- `ValueError` for solvers that are not reversible.
- `NotImplementedError` for gradients with respect to `t0` or `t1` of what is saved at the
    end of a step, by `SaveAt(steps=...)` or where an event stops that is Boolean or not
    located, if that end moves with them: with `t0` unless steps are given by `StepTo`, with
    `t1` unless by that or a `PIDController`. For all gradients of what is saved at the
    ends of steps, with a controller of your own whose steps follow the state. For
    functions that close over traced values where these cannot be seen.
- `RuntimeError` for gradients with respect to `dt0`, the controller or its state, for
    forward mode, for second derivatives along times, and for reverse mode over a gradient.
- `RuntimeError` from the gradient, if the backward pass misses a known state, if a step
    does not begin where the last one ended although the controller reports no jump, or if
    the gradient grows where the solution contracts (not with a `drift_tol` that lets
    everything through).
"""
