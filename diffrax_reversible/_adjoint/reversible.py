"""The adjoint that undoes the steps of a solve."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from diffrax import AbstractAdjoint

from .._solver.adapter import as_reversible
from .._solver.overrides import check_step_is_undone
from .partition import make_visible, partition
from .reversible_loop import reversible_loop, Settings
from .validate import check_supported


def _as_python(x: Any) -> Any:
    """A NumPy scalar as a Python scalar."""
    return x.item() if isinstance(x, np.generic) else x


class ReversibleAdjoint(AbstractAdjoint):
    """Backpropagates by undoing the steps of a solve, without storing its trajectory.

    For use with an `AbstractReversibleSolver`, or a solver whose reversible form
    `as_reversible` returns, such as `diffrax.ReversibleHeun`. The gradient is that of the
    numerical solution itself, as under `diffrax.RecursiveCheckpointAdjoint` with the same
    solver, up to the rounding of the reconstructed states, and more accurate in fast modes
    that have died out.

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

    The ends of steps other than `t0` and `t1` are held fixed, unless times that the
    controller steps to are differentiated: `StepTo(ts=...)`, and `step_ts` and `jump_ts` of
    a `ClipStepSizeController`. Steps then move with these, in proportion between them. So
    every time at which the vector field jumps has to be among them, and times at which it
    jumps independently must differ; otherwise gradients are wrong. Under
    `diffrax.PIDController` and `StepDensityController` they have no derivative with respect
    to the state or `t1` anyway; the gradient with respect to `SaveAt(ts=...)` equals that
    of the default adjoint. The dependence of steps on `t0` and `dt0`, and under
    `diffrax.ConstantStepSize` on `t1`, is ignored. So gradients with respect to these are
    accurate to the error of the solve, not to rounding. (With `diffrax.LeapfrogMidpoint`,
    to first order: its last step has to be as long as others.) `dt0` may depend on what is
    differentiated, as `(t1 - t0) / 100`, and adds nothing to the gradient. A controller of
    your own declares by `jax.lax.stop_gradient` that its steps carry no derivative, as
    Diffrax's controllers do. Otherwise gradients of outputs at the ends of steps are
    refused.

    An event that ends the solve is located as under any adjoint. Diffrax itself
    differentiates its time and state, through the last step.

    **Known states and replays**

    The backward pass undoes the steps from one *known state* to the one before, and
    continues from there, so that rounding errors grow over one such segment only. The known
    states are the start and at most `checkpoints` more: the states before restarts (see
    `ALF4`), which cannot be undone, and in the remaining room others that
    are evenly spread. These are at least 16 steps apart, or eight in single precision. With
    over 1,024 differentiated parameters they may follow every step. A jump can be undone:
    the solvers of this package exchange the value of the vector field that they carry, by
    at most two evaluations and no stored state.

    `checkpoints` is a memory budget, not a limit on the number of restarts. At a restart
    whose state is not held, the backward pass replays the solve from the known state
    before, and holds states on the way in the free room, as in recursive checkpointing.
    Steps that are no longer on record are replayed too, with the controller. A replay is
    compiled separately from the solve, and rounds differently. At the limit of stability
    the controller may then accept different steps; the replay misses the next known state,
    and the gradient is an error.

    **Comparison with the forward pass**

    At every known state, and at the start, each entry of the reconstruction is compared
    with the forward pass, whether the solver watches that entry or not. If any misses by
    more than a 64th of `drift_tol`, the backward pass returns to the known state that it
    came from, replays the solve from the one that it missed, holds states on the way, and
    undoes the steps again. (The threshold is an 8th if the whole solve was undone at once,
    `drift_tol` itself with a Brownian path, and no less than the difference between a
    replay and the solve.) The number of steps between known states adapts as step
    sizes do: it is divided by four after a miss, down to a single step, and doubled where
    misses are small.

    A single step may miss by more than `drift_tol` where the flow contracts by orders of
    magnitude within it, or where terms of the vector field cancel to the last digit. `ALF4`
    and its like, `McCallumFoster`, splittings, couplings and `diffrax.LeapfrogMidpoint`
    then do not undo it, but differentiate it from its start, as the default adjoint does.
    For the `n` evaluations of a step this takes `n` more or, if a state for each of its
    sub-steps would take more than 256 kB, `n (n - 1) / 2`. An entry of a vector field is a
    sum, and rounds as its terms do. So no segment is repeated for misses below four machine
    epsilons of the largest entry of the array, and no step for misses below 16.

    So a flow that contracts too fast for the precision costs evaluations, and is no error.
    The gradient is an error, or NaN with `diffeqsolve(..., throw=False)`, if a replay
    differs too much from the solve (see `drift_tol`). With `checkpoints=0` or solvers other
    than those, it is also one if a step, or the solve, misses by more than `drift_tol`.

    **Solutions and gradients that are lost**

    Solvers that do not restart lose the solution itself where the flow contracts: the
    second approximation that they carry departs from the first, and nothing in the solution
    shows it. These are `ALF2`, `diffrax.ReversibleHeun` and `diffrax.LeapfrogMidpoint`: on
    `y' = -λ (y - cos t)` over a time `T` expect it past `λ T = 15`. The gradient is an
    error, or that of the computed solution.

    **Fast modes that have died out**

    Such modes do not affect the solution, but a gradient excites them again. The second
    approximation of the solvers that restart then amplifies it, under every adjoint: in the
    solve both approximations agree there, so that it has no reason to restart. If the
    gradient seems to grow in steps in which the vector field contracts the growing mode, or
    such a mode does not decay where the cotangent of the second approximation prevails, the
    backward pass is done once more, with restarts in place of the solve wherever the second
    approximation would otherwise add more than a thousandth to an entry of the cotangent.
    (With `ALF4` and its like each takes an evaluation and a pull-back, with
    `McCallumFoster` none.) This is the gradient of a solve that restarts at these steps: on
    a slow manifold (`tests/test_growth.py::test_slow_manifold`) that of `ALF4` is right to
    six digits, and with a `SaveAt(ts=...)` to at least two, where that of the default
    adjoint with the same solver is off by several percent or more. If the initial state is
    differentiated, its cotangent is pulled back through the vector field at the start of
    the solve, twice. It counts as grown if that shows more than 3 % of modes for which a
    step exceeds the limit of stability: in the first steps of a solve, a single such step
    may spoil it, and on a heat equation gradients of `ALF4` and `McCallumFoster` in float32
    were off by up to a factor of 1e3 without it
    (`tests/test_growth.py::test_growth_in_the_first_steps`). Other growth that is not
    detected is not corrected, as in two or three steps, or of entries below a tenth
    of the largest of their array, if that does not contract: put such a large entry, as an
    integral may be, into an array of its own. Entries that have grown are corrected if, at
    the start of the solve, they exceed a hundredth of the largest, or if they amount to 0.3
    times the others in an integral over time, as parameters receive.

    Explicit adaptive solvers also take steps beyond the stability limit of such modes. A
    gradient grows in each such step, whatever the solver and the adjoint: on a heat
    equation of 50 points that of `diffrax.Tsit5` is off by a factor of more than ten, at
    all tolerances from 1e-3 to 1e-10. Growing modes have shown the rate at which they
    should decay, and thus the limit. If the gradient seems to grow in the second backward
    pass, too, or if that has such a step, in which growth may be too slow to be found, the
    gradient is accepted if, in each array, both passes agree to a tenth of its norm, as a
    spoilt gradient would differ between them. If they do not, or if there are both growth
    and such a step, so that both may have grown by as much, more passes divide these steps.
    They pull back through parts of at most 0.6, 0.3 and, if need be, 0.15 times the limit,
    each of which begins with a restart. The states between the parts are interpolated, as
    for the rest of the solution the step is a small one. This is the gradient of a solve
    with smaller steps, which differs from this one by about as little as the solution does:
    on the heat equation that of `ALF4` is right to 4 % at a tolerance of 1e-3, and to 1e-5
    at 1e-6. Two of these passes in a row have to agree as well, or the gradient is an error
    that says how to bound the steps. If more than 1,024 parameters are differentiated,
    single arrays of them may then differ by 30 %, where all together differ by no more than
    5 %: near the minimum of a loss, some of many arrays are as uncertain as the solution.

    If the first pass that divides steps comes to the cotangent of the initial state of the
    pass before, that had not grown after all, and is done again instead of more of them:
    interpolated states may be off by more than those within a step. The two have to be as
    near as a hundredth, or a tenth if the first two passes agreed. If the initial state is
    differentiated and some step is too large, these passes are always made, as what grows
    in the first steps grows in the first two passes alike. A step in `n` parts takes
    `n + 1` times the evaluations and pull-backs, and with `McCallumFoster` two more
    evaluations for each part. The passes have at most four, eight and sixteen parts for
    each step of the solve, or 256, 512 and 1,024; one that lacks some proves nothing. What
    dense output, or an event with a root finder, reads of such a step is pulled back
    through the whole step. Steps are not divided if times are differentiated: growth in
    such steps is then an error, unless it is too slow to be found.

    Two kinds of gradients need not agree between two passes. That of an initial state may
    have vanished, where the flow has contracted a lot: each array may differ by `eps^0.6`
    (7e-5 in float32) times the largest entry that its cotangent has had at any time. And
    where the sum over a batch is differentiated, as by `jax.grad` of a loss with `jax.vmap`
    in it, only the gradient of the whole batch counts: members that differ may contribute
    3 % to that of parameters that they share, and 0.1 % to the norm of an array of which
    each member has its own part. (If the number of devices divides that of the members, to
    that on each device. Of more than 1,024 shared parameters, the two sums have to agree to
    a tenth.) `jax.vmap` of `jax.grad` judges each member by itself.

    `McCallumFoster` restarts in most steps where the flow contracts, so that both passes
    may be the same. With it, there is a pass in between, by derivatives of the embedded
    method, and the last two passes are compared.

    If the initial state is not differentiated, such growth may not matter. A system that
    rests until its first input arrives adds nothing to the gradient of its parameters, as a
    drug before the first dose. For up to 1,024 parameters, the last backward pass measures
    how much was added to each entry of their gradient after the growth began, and accepts
    up to a thousandth.

    **Kinks**

    The solve records how long each entry of the state keeps its initial value, to the last
    bit. The gradient is thus on the same side of a kink as the solve, even if the solve
    begins at one, as at zero with `relu`. For vector fields that compare or take maxima,
    this takes an integer and a number for each entry of the state and the solver state.
    Each step in which an entry begins to move takes two more evaluations per evaluation, or
    for a state of many kilobytes half as many as the step has. With an implicit solver, a
    stage in such a step may be at the kink up to rounding, and the gradient on either side,
    under every adjoint.

    **Memory**

    A gradient holds a few states, whatever the number of stages; some two to four more for
    each of `checkpoints`, and with those a second sum of the cotangent of everything
    differentiated except the state; one evaluation of the vector field with its pull-back,
    or all those of a step if a `SaveAt(fn=...)` interpolates or times are differentiated;
    and a record of the last steps, of 9 bytes each in float64 (17 if there may be jumps).
    The record has room for at least 256 steps, for more if
    `diffrax.RecursiveCheckpointAdjoint` takes as much memory for `max_steps` or if there
    are many `checkpoints`, and for at most 16,384. So memory is bounded for any number of
    steps, and `max_steps=None` has gradients. From `max_steps=256` on, 128 states of 64
    numbers, or one of 4,096, take no more than with the default adjoint; smaller states and
    fewer steps may take more. With an `AbstractReversibleStepSizeController` the record has
    no times, but only which steps followed a restart. Leaves of `terms` and `args` that
    nothing reads take no memory.

    The members of a batch, as of `jax.vmap` over initial values, often share parameters, as
    the weights of a network. For `jax.grad` of a mean loss with more than 1,024 shared
    parameters, every evaluation sums their cotangents over the batch, and no member holds
    its own. Then all members go on from their known states at once, and if one misses its
    own, all undo their last steps again. If only shared parameters are differentiated, they
    do so if the mean of their misses is too large, or if one exceeds `drift_tol`.

    **Work**

    With the solvers of this package, the backward pass takes one evaluation of the vector
    field and one pull-back through it for each evaluation of the forward pass. If times, or
    the control of a term of your own, are differentiated, half as much again; for `ALF6`
    also in steps with interpolated outputs. Twice as much in steps in which a
    `SaveAt(fn=...)` interpolates, or anything does while times are differentiated. The
    gradient of an initial state takes an evaluation and two pull-backs more, at the start.
    Each known state costs one evaluation or one step, but none with `ALF4` and its like. A
    replay takes the evaluations of a solve: on `y' = -40 (y - cos t)` over a time of 10,
    `ALF4` restarts 76 times in 400 steps. There 8 checkpoints take 1.6 times the
    evaluations of checkpoints for all restarts, 4 twice, and 1 checkpoint 6 times. A
    backward pass that is done once more, see above, takes at least twice as many
    evaluations, or three times with `McCallumFoster`, and more if steps are divided. Then
    the members of a batch wait for one another: that equation with 41 rates up to 40, at a
    tolerance of 1e-3, takes five times the evaluations of the rate that takes the most.

    **Transformations**

    - Second derivatives are by forward mode over reverse mode, as in `jax.hessian`.
    - A batch that is sharded over devices stays sharded, forwards and backwards. Besides
        the gradients of shared inputs, once at the end, only scalars are exchanged. (Each
        device then has sums of its own, if their number divides the batch.) To raise its
        own errors Diffrax gathers the solution on one device: pass
        `diffeqsolve(..., throw=False)` where that matters.
    - In `jax.shard_map` pass `check_vma=False`, which Diffrax's loop needs. Gauss methods
        and Diffrax's implicit solvers fail there in their linear solves: shard their inputs
        instead.
    - A `progress_meter` also shows the backward pass, again from 0 % to 100 %, but not how
        often that is done.
    - `sol.stats` has one entry more than under other adjoints, `num_restarts`. Code that
        combines the statistics of several solves, leaf by leaf, needs it in all of them.
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
        is_number = isinstance(tol, int | float) and not isinstance(tol, bool)
        if not (tol is None or (is_number and tol >= 0)):
            raise ValueError(
                f"`ReversibleAdjoint(drift_tol={tol})` must be a non-negative number, "
                "known when the solve is compiled, or `None` for the default: 1e-6, or "
                "the square root of the machine epsilon, if that is larger."
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
        check_step_is_undone(solver)
        # Solvers of other packages are replaced by their reversible form.
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

- `checkpoints`: the largest number of states and solver states to hold, besides the start.
    More of them take more memory, and save evaluations if there are as many restarts:
    `sol.stats["num_restarts"]` reports their number. Defaults to 8. If state and solver
    state take at most a kilobyte it is up to 64, as many as take half the memory of the
    checkpoints of `diffrax.RecursiveCheckpointAdjoint` for as many `max_steps`: with `ALF4`
    30 for 4,096. With symplectic solvers rounding errors grow less: the default is none in
    double precision, and otherwise as many of 8 as fit into a megabyte, and more of small
    states. Pass 8 for very unstable orbits in double precision, such as a comet's that all
    but hits the sun, which are an error else.
- `drift_tol`: the largest accepted error of the reconstructed state, at the start of the
    solve and at every known state. Each entry is measured as a fraction of its size there,
    of its size at the known state that the backward pass came from, or of its update by a
    step, whichever is largest, and of no less than `eps^(3/4)` of the largest entry of its
    array. Defaults to 1e-6, or to the square root of the machine epsilon of the coarsest
    array of the state, if that is more: 3.5e-4 in float32. By default replayed steps may
    differ from those of the solve by `eps^0.37`, 2.7e-3 in float32. Where the problem is
    sensitive to its state, gradients may be off by up to about 400 times the tolerance: the
    most that `examples/benchmarks/outcomes.py` has found on conservative, contracting,
    chaotic and unstable problems.
- `report`: a function, such as `print`, that every gradient calls with a dictionary of the
    numbers of steps undone (`undone_steps`: more than the solve has, if some were undone
    again) and replayed (`replayed_steps`: fewer with more `checkpoints`), and of steps
    before which the backward pass restarted (`restarted_steps`). Under `vmap` it is called
    for each member of the batch.
- `watch`: a function that the backward pass calls at every known state, with a dictionary:
    the number of steps before it (`step`), the time (`t`, or `-t` if `t1 < t0`), whether
    the solver was restarted there (`restarted`), the error of the reconstruction, as a
    fraction of `drift_tol` (`miss`), and whether the last segment is undone again because
    of it (`repeated`). `explain` shows them. A backward pass that is done once more calls
    it again.

**Raises:**

- `ValueError` for solvers that are not reversible, for subclasses of reversible ones that
    override `step` or `advance`, for an `UnsafeBrownianPath`, and for arguments of a wrong
    type or below zero.
- `NotImplementedError` for gradients with respect to `dt0` alone. For those with respect
    to `t0`, `t1`, `dt0` or times that the controller steps to, of outputs at the end of a
    step, by `SaveAt(steps=...)` or at an event that is Boolean or not located. They are
    given with `StepTo`, and with respect to `t1` also with a `PIDController` or an
    `AbstractReversibleStepSizeController`. For all gradients of such outputs, with a
    controller of your own whose steps depend on the state. For closed-over traced values
    that are not visible, or that hide in a vector field which is called in changing ways.
    For jumps, with a solver whose solver state cannot cross them.
- `RuntimeError` for gradients with respect to the solver, the controller (besides
    times that it steps to) or its state, or the root finder of an event, for forward mode,
    for second derivatives along times, and for reverse mode over a gradient.
- `RuntimeError` from the gradient, if the backward pass misses a known state, if a step
    does not begin where the last one ended although the controller reports no jump, or if
    the gradient grows where the solution contracts and another backward pass does not
    confirm it (unless `drift_tol` accepts everything).
"""
