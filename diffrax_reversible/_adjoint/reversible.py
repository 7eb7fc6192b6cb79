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
    """Backpropagates by walking the solve back, without storing its trajectory.

    For use with an [`diffrax_reversible.AbstractReversibleSolver`][], or a solver that
    [`diffrax_reversible.as_reversible`][] has a reversible form of, as of
    [`diffrax.ReversibleHeun`][]. The gradient is that of the numerical solution itself, as
    under [`diffrax.RecursiveCheckpointAdjoint`][] with the same solver, up to the rounding
    of the reconstructed states.

    Step locations other than `t0` and `t1` are held fixed. A controller of your own says
    that they carry no derivative by `jax.lax.stop_gradient`, as those of Diffrax do; else
    gradients of what is saved at the ends of steps are refused. Under
    [`diffrax.PIDController`][] and [`diffrax_reversible.StepDensityController`][] they do
    not depend on the state anyway, as far as gradients go, nor on `t1`. What they have to
    do with `t0`, and under [`diffrax.ConstantStepSize`][] with `t1`, is left out of
    gradients with respect to those, which are thus right to the accuracy of the solve.

    The walk goes from one *known state* to the one before, and on from there, so that
    rounding errors grow over no more than what is between. Held are the start, and as many
    states as there are `checkpoints`: those before restarts (see
    [`diffrax_reversible.ALF4`][]), which cannot be undone, and in the room that is left one
    every 64 steps or more, evenly spread. Where the walk comes to a restart that is not
    held, the solve is replayed from the known state before, and states are held on the way
    in the room there is by then, as in recursive checkpointing. Jumps can be undone.

    Where the walk comes to a known state, and where it ends, every entry is compared with
    what was there in the forward pass, whether the solver watches it or not. If any differs
    by more than a 64th of `drift_tol` (an 8th if the walk has undone the whole solve at
    once; by more than a replay differs from the solve, if that is more; with a Brownian
    path by more than `drift_tol`), then the walk goes back to the state that was known
    before, the solve is replayed from the one that was missed, with states held on the way,
    and the steps are undone once more. How many there may be from one known state to the
    next is found as step sizes are: a quarter where one is missed, twice as many where all
    is well. An entry of a vector field is a sum, and rounds as its terms do: a miss of four
    machine epsilons of the largest entry of its array is not undone once more, and one of
    16 in a single step is no error. So contraction costs evaluations, and is no error,
    unless there are no `checkpoints`. It is one if a single step, or all of them without
    `checkpoints`, misses by `drift_tol`.

    Solvers that do not restart lose the solution itself where the flow contracts, as the
    second approximation that they carry along grows apart from the first, and nothing in
    the solution tells. Those are [`diffrax_reversible.ALF2`][],
    [`diffrax.ReversibleHeun`][] and [`diffrax.LeapfrogMidpoint`][]: on
    `y' = -λ (y - cos t)` over a time `T` expect it past `λ T = 15`. The gradient is that of
    what was computed.

    Entries of the state that rest where the solve began, to the last bit, are known to be
    there until something sets them off: so a gradient is on the side of a kink that the
    solve was on, though it began at one, as at zero with `relu`. For vector fields that
    compare or take maxima, this takes an integer and a number for each entry of the state
    and the solver state, and one evaluation more for each of a step in those in which
    anything is set off.
    With a solver of implicit equations, a stage in such a step may be at the kink but for
    rounding, and the gradient on either side, under every adjoint.

    An event that ends the solve is located as ever, and its time and state are
    differentiated by Diffrax itself, through the last step.

    Memory: a few states, some two to four more for each of `checkpoints`, with those a
    second sum of the cotangent of what is differentiated but the state, and a record of
    the last steps, of 9 bytes each in float64 (17 if there may be jumps). It has room for
    256 steps at least, for more if [`diffrax.RecursiveCheckpointAdjoint`][] takes as much
    memory for `max_steps`, and for 16,384 at the most; what a longer solve has forgotten is
    replayed with the controller. So memory does not grow with the number of steps, and
    `max_steps=None` has gradients. With an
    [`diffrax_reversible.AbstractReversibleStepSizeController`][] there are no times to
    record, but which steps came after a restart.

    Work: for the solvers of this package one evaluation of the vector field and one
    pull-back through it for each evaluation of the forward pass. If a `SaveAt(fn=...)`
    interpolates, or if times are differentiated, then half as much again; for `ALF6` also
    in steps in which anything is interpolated. And for a look at the known states, one
    evaluation or one step for each, but none for `ALF4` and its like. A replay takes the
    evaluations of a solve: with 76 restarts of `ALF4` in 400 steps, 8 checkpoints cost 1.6
    times the evaluations of room for all, 4 checkpoints twice, and 1 checkpoint 6 times.

    Second derivatives by forward mode over reverse mode, as in `jax.hessian`.

    Fast modes that have died out do not affect the solution, and explicit adaptive solvers
    take steps that these modes are not stable for. A gradient excites them, and grows by
    each such step under every adjoint: on a heat equation of 50 points that of
    [`diffrax.Tsit5`][] is off by a factor of more than ten, at all tolerances from 1e-3 to
    1e-10. Here it is an error, with the solvers that restart: no entry must have grown
    in steps in which the vector field contracts what grew.

    A `progress_meter` shows the backward pass as well, from 0 % to 100 % once more.

    If the walk misses a state for good, then the gradient is an error, or with
    `diffeqsolve(..., throw=False)` it is NaN.
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
    start. More of them take more memory, and fewer evaluations if there are as many
    restarts, of which `sol.stats["num_restarts"]` tells the number. Defaults to 8, but to
    none for symplectic solvers, of which rounding errors do not grow.
- `drift_tol`: the largest error of the reconstructed state that is accepted, where the
    solve began and at every known state. Entry by entry, as a fraction of what it is there,
    of what it is at the known state before, or of what a step adds to it, whichever is the
    most; but no entry counts as less than `eps^(3/4)` of the largest of its array.
    Defaults to 1e-6, or to the square root of the machine epsilon of the coarsest array of
    the state, if that is more: 3.5e-4 in float32. By default steps that are made again may
    differ from those of the solve by `eps^0.37`, 2.8e-3 in float32. Gradients may be off by
    up to about 400 times as much, where the problem is as sensitive to its state: the most
    that `examples/benchmarks/outcomes.py` has found on conservative, contracting, chaotic
    and unstable problems.
- `report`: a function, as `print`, that every gradient calls with a dictionary of how
    many steps it has undone (`undone_steps`: more than the solve has, if some were undone
    once more), and how many it has replayed (`replayed_steps`). Of a batch under `vmap` it
    is called for each member. With more `checkpoints` fewer steps are replayed.
- `watch`: a function that the backward pass calls at every known state, with a dictionary:
    how many steps come before (`step`), the time (`t`, or `-t` if `t1 < t0`), whether the
    solver was restarted there (`restarted`), by how much the backward pass missed the
    state, as a fraction of `drift_tol` (`miss`), and whether it undoes the last segment
    again for that reason (`repeated`). [`diffrax_reversible.explain`][] shows them.

**Raises:**

- `ValueError` for solvers that are not reversible.
- `NotImplementedError` for gradients with respect to `t0` or `t1` of what is saved at the
    end of a step, by `SaveAt(steps=...)` or where an event stops that is Boolean or not
    located, if that end moves with them: with `t0` unless steps are given by `StepTo`, with
    `t1` unless by that or a `PIDController`. The same for all gradients, with a
    controller of your own of which the steps follow the state. For functions that close
    over traced values where they cannot be seen.
- `RuntimeError` for gradients with respect to `dt0`, the controller or its state, for
    forward mode, for second derivatives along times, and for reverse mode over a gradient.
- `RuntimeError` from the gradient, if the walk back misses a state that it can be compared
    with, if a step does not begin where the last one ended and the controller says nothing
    of a jump, or if the gradient grows where the solution contracts (not with a `drift_tol`
    that lets everything through).
"""
