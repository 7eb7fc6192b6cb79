"""Solvers keep their order at discontinuities of the vector field, and store nothing."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .chains import TwoStreams
from .problems import (
    as_terms,
    assert_same_gradient,
    BITWISE,
    cases,
    PID,
    relative_error,
    sum_of_squares,
)


Y0, W = jnp.array([1.0, -0.4]), jnp.array(0.7)
# The first jump is at zero, where floats are closest together.
JUMPS = jnp.array([0.0, 0.8, 1.9])
TS = jnp.linspace(-1.0, 3.0, 7)
SOLVERS = (dr.ALF2(), dr.ALF4(), dr.ALF6(), BITWISE)
# Without an error estimate no controller makes jumps, so only one at the start is
# possible.
AT_START = dict(stepsize_controller=dfx.ConstantStepSize(), made_jump=True)


def pieces(t, y, w):
    return w * jnp.sin(y), -y * jnp.cos(t), w * jnp.cos(y + t), jnp.cos(w * y) - t


def field(t, y, w):
    """A different field between any two jumps."""
    return jnp.stack(pieces(t, y, w))[jnp.searchsorted(JUMPS, t, side="right")]


# `q' = f(t, p)` and `p' = g(t, q)`, where only the force jumps, or both do.
PAIR = (lambda t, p, w: w * p, field)
BOTH = (lambda t, p, w: field(t, p, w) + p, field)


def solve(adjoint, solver, y0=Y0, w=W, field=field, t0=-1.0, t1=3.0, **kwargs):
    defaults = dict(
        dt0=jnp.array(0.3),
        saveat=dfx.SaveAt(ts=TS, steps=2),
        stepsize_controller=dfx.ClipStepSizeController(PID, jump_ts=JUMPS),
        max_steps=500,
    )
    kwargs = defaults | kwargs
    dt0 = kwargs.pop("dt0")
    return dfx.diffeqsolve(
        as_terms(field), solver, t0, t1, dt0, y0, w, adjoint=adjoint, **kwargs
    )


def gradients(loss, *args, checkpoints=0):
    return assert_same_gradient(loss, *args, adjoints=[dr.ReversibleAdjoint(checkpoints)])


@pytest.mark.long
@pytest.mark.parametrize(
    "solver", cases(SOLVERS[1:2], slow=(SOLVERS[0], *SOLVERS[2:])), ids=repr
)
def test_gradients(solver):
    """Without checkpoints, gradients equal those of the default adjoint."""

    def loss(adjoint, y0, w):
        return sum_of_squares(solve(adjoint, solver, y0, w).ys)

    gradients(loss, Y0, W)


@pytest.mark.parametrize(
    "solver, checkpoints, field, kwargs",
    cases(
        ((dr.BlanesMoan4(), 4, PAIR, {}),),
        long=((TwoStreams(), 4, PAIR, AT_START),),
        slow=(
            (dfx.SemiImplicitEuler(), 0, BOTH, AT_START),
            (dfx.SemiImplicitEuler(), 4, BOTH, AT_START),
            # The two copies drift apart, with or without jumps.
            (dr.McCallumFoster(dfx.Tsit5()), 4, field, {}),
            (dr.BlanesMoan4(), 0, PAIR, {}),
            (dr.BlanesMoan4(bitwise=True), 0, BOTH, {}),
            (dr.BlanesMoan4(bitwise=True), 4, BOTH, {}),
            (dfx.LeapfrogMidpoint(), 0, field, AT_START),
            (dfx.LeapfrogMidpoint(), 4, field, AT_START),
        ),
    ),
)
def test_families(solver, checkpoints, field, kwargs):
    """With and without known states on the way."""
    y0 = (Y0, Y0 / 2) if isinstance(field, tuple) else Y0

    def loss(adjoint, y0, w):
        return sum_of_squares(solve(adjoint, solver, y0, w, field=field, **kwargs).ys)

    gradients(loss, y0, W, checkpoints=checkpoints)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver, longest", cases(((dr.ALF4(), 0.1),), slow=((dr.ALF6(), 0.2),))
)
def test_order(solver, longest):
    """The order is kept with steps of equal length, except those that end at a jump. It is
    not due to restarts, which a jump that is not crossed would cause."""

    @jax.jit
    def final(h):
        fixed = dfx.PIDController(rtol=1e9, atol=1e9, dtmax=h)
        controller = dfx.ClipStepSizeController(fixed, jump_ts=JUMPS)
        saveat = dfx.SaveAt(t1=True)
        adjoint = dr.ReversibleAdjoint()
        sol = solve(adjoint, solver, dt0=h, stepsize_controller=controller, saveat=saveat)
        return sol.ys[-1], sol.stats["num_restarts"]

    exact, ends = Y0, [-1.0, *JUMPS.tolist(), 3.0]
    for index, (t0, t1) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        exact = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w, i=index: pieces(t, y, w)[i]),
            dfx.Dopri8(),
            t0,
            t1,
            None,
            exact,
            W,
            stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-13),
        ).ys[-1]
    steps = longest / np.array([1, 2, 4])
    finals, restarts = zip(*(final(jnp.array(h)) for h in steps), strict=True)
    assert not np.any(restarts), restarts
    errors = [np.max(np.abs(y - exact)) for y in finals]
    slope = np.log(errors[0] / errors[-1]) / np.log(steps[0] / steps[-1])
    assert slope > solver.order(None) - 0.4, errors


@pytest.mark.slow
def test_many_jumps():
    """A field that is switched on and off a hundred times causes no restarts."""
    jumps = jnp.linspace(-0.99, 2.99, 100)
    switched = lambda t, y, w: jnp.where(
        jnp.searchsorted(jumps, t) % 2 == 0, w * jnp.sin(y), -y
    )
    controller = dfx.ClipStepSizeController(PID, jump_ts=jumps)

    def loss(adjoint, y0, w):
        sol = solve(
            adjoint, dr.ALF4(), y0, w, field=switched, stepsize_controller=controller
        )
        return sum_of_squares(sol.ys)

    gradients(loss, Y0, W)
    sol = solve(
        dr.ReversibleAdjoint(),
        dr.ALF4(),
        field=switched,
        stepsize_controller=controller,
    )
    assert sol.stats["num_restarts"] == 0


@pytest.mark.slow
def test_batch():
    """Every element of a batch has its own jumps and restarts."""
    jumps = jnp.array([[0.3, 0.9], [-0.5, 1.3], [2.2, 2.5]])

    def loss(adjoint, y0, w):
        def element(jumps):
            controller = dfx.ClipStepSizeController(PID, jump_ts=jumps)
            own = lambda t, y, w: jnp.where(
                (t > jumps[0]) & (t < jumps[1]), w * y**2, jnp.sin(t) - y
            )
            sol = solve(
                adjoint, dr.ALF4(), y0, w, field=own, stepsize_controller=controller
            )
            return sum_of_squares(sol.ys)

        return jnp.sum(jax.vmap(element)(jumps))

    gradients(loss, Y0, W, checkpoints=8)


# Members that share many parameters wait at their start.
@pytest.mark.parametrize("size", cases((1,), more=(1100,)))
def test_field_that_begins_at_the_start(size):
    """While a member crosses a jump, others undo their first step. The field is not
    evaluated before their start, where it may not exist."""
    pid = dfx.PIDController(1e-3, 1e-3, dtmax=0.1)
    jumps = dfx.ClipStepSizeController(pid, jump_ts=jnp.array([-0.5]))
    ends = jnp.linspace(-0.95, 0.05, 11)

    def own(t, y, w):
        return -jnp.mean(w) * y * jnp.sqrt(t + 1) + jnp.where(t < -0.5, 0.0, 1.0)

    def loss(adjoint, y0, w):
        more = dict(saveat=dfx.SaveAt(t1=True), stepsize_controller=jumps, dt0=0.1)
        of_end = lambda t1: solve(adjoint, dr.ALF4(), y0, w, own, t1=t1, **more).ys
        return sum_of_squares(jax.vmap(of_end)(ends))

    assert np.isfinite(gradients(loss, Y0, jnp.full(size, W))[1]).all()


@pytest.mark.parametrize("fresh", cases((), slow=(True, False)))
def test_from_a_jump(fresh):
    """A solve that begins at a jump crosses it, unless `v` is evaluated beyond it."""

    def loss(adjoint, y0, w):
        whole = dict(saveat=dfx.SaveAt(t1=True, solver_state=True, made_jump=True))
        first = solve(adjoint, dr.ALF4(), y0, w, t1=0.8, **whole)
        second = solve(
            adjoint,
            dr.ALF4(),
            first.ys[-1],
            w,
            t0=0.8,
            solver_state=None if fresh else first.solver_state,
            made_jump=jnp.array(True) if fresh else first.made_jump,
            saveat=dfx.SaveAt(t1=True),
        )
        return sum_of_squares(second.ys)

    grads = gradients(loss, Y0, W, checkpoints=8)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def whole(y0, w):
        saveat = dfx.SaveAt(t1=True)
        return sum_of_squares(
            solve(dr.ReversibleAdjoint(), dr.ALF4(), y0, w, saveat=saveat).ys
        )

    # The single solve takes other steps.
    assert relative_error(grads, whole(Y0, W)) < 1e-3


@pytest.mark.parametrize("solver", (dr.ALF4(), dr.ALF6(), dr.ALF8()))
@pytest.mark.parametrize("announced", (False, True))
def test_unannounced_jump(solver, announced):
    """The error estimate shows a jump in a step, also after one that was announced."""

    def one_step(jump):
        term = dfx.ODETerm(lambda t, y, args: jnp.where(t > jump, 1.0, 0.0) + 0 * y)
        y0 = jnp.array(0.0)
        state = solver.init(term, 0.0, 1.0, y0, None)
        if announced:
            # Another step before, as nothing is crossed at the start.
            early = term, -0.5, 0.0, y0, None, state
            _, _, _, state, _ = solver.step(*early, made_jump=False)
        step = term, 0.0, 1.0, y0, None, state
        y1, estimate, *_ = solver.step(*step, made_jump=announced)
        return jnp.abs(y1 - (1 - jump)), jnp.abs(estimate)

    # After an announced jump, `v` may have any deviation up to the first evaluation.
    jumps = jnp.linspace(0.5 if announced else 0.001, 0.999, 999)
    error, estimate = jax.jit(jax.vmap(one_step))(jumps)
    assert np.max(error) > 0.1
    assert np.all(estimate > 0.05 * error)


@pytest.mark.parametrize("solver", cases((dr.ALF4(),), long=(dr.ALF6(), dr.ALF8())))
def test_unannounced_kink(solver):
    """A ball falls on a stiff floor. When it does is not known beforehand."""

    def fall(height, solver, dt0=None, **kwargs):
        floor = lambda q: 500 * jnp.maximum(-q, 0)
        term = dfx.ODETerm(lambda t, y, args: jnp.stack([y[1], floor(y[0]) - 9.8]))
        start = jnp.stack([height, jnp.zeros_like(height)])
        return dfx.diffeqsolve(term, solver, 0.0, 0.8, dt0, start, **kwargs).ys[0]

    heights = jnp.linspace(0.8, 1.2, 100)
    many_steps = dict(dt0=2e-4, max_steps=4001)
    want = jax.jit(jax.vmap(lambda h: fall(h, dfx.Dopri8(), **many_steps)))(heights)
    controller = dfx.PIDController(1e-8, 1e-8)
    adaptive = lambda h: fall(h, solver, stepsize_controller=controller)
    got = jax.jit(jax.vmap(adaptive))(heights)
    assert np.max(np.abs(got - want)) < 1e-4


def test_jump_that_time_hardly_resolves():
    """In single precision a step of a few floats may have an error above the tolerance,
    and no smaller step is more accurate."""
    single = jnp.float32
    tol = jnp.array([1e-4, 1e-5, 1e-5, 1e-3], single)
    jump = jnp.array([33.3, 8.0, 1.1, 1000.3], single)
    size = jnp.array([100, 100, 100, 10], single)

    @jax.vmap
    def solve(tol, jump, size):
        half = jnp.asarray(0.5, single)
        field = lambda t, y, args: jnp.where(t < jump, 0, size) - half * y
        return dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            *(jnp.zeros((), single), 3 * jump, None, jnp.zeros((), single)),
            stepsize_controller=dfx.PIDController(rtol=tol, atol=tol / 10),
            adjoint=dfx.ForwardMode(),
            throw=False,
        )

    sol = jax.jit(solve)(tol, jump, size)
    assert jnp.all(sol.result == dfx.RESULTS.successful), sol.stats
    exact = 2 * size * (1 - jnp.exp(-jump))
    assert jnp.all(jnp.abs(sol.ys[:, 0] - exact) < 3 * tol * exact), sol.ys[:, 0] - exact


def test_field_that_ends():
    """It is not finite at the end of the last step, where the solution is."""
    field = lambda t, y, args: jnp.where(t < 1, -jnp.sqrt(1 - t), jnp.nan) + 0 * y
    sol = dfx.diffeqsolve(
        dfx.ODETerm(field),
        dr.ALF4(),
        *(0.0, 1.0, None, jnp.array(1.0)),
        stepsize_controller=dfx.PIDController(1e-4, 1e-7),
        max_steps=100,
    )
    np.testing.assert_allclose(sol.ys[-1], 1 / 3, rtol=1e-3)
