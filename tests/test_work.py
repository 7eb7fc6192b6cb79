"""Evaluations of the vector field, counted at run time."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .counter import Counter
from .problems import cases, kepler, PID, relative_error


# `extra`: the evaluations to interpolate in one step.
@pytest.mark.long
@pytest.mark.parametrize(
    "solver, stages, extra",
    cases(
        ((dr.ALF4(), 5, 2),),
        slow=((dr.ALF6(), 20, 3), (dr.ALF2(), 1, 0), (dr.ALF8(), 34, 2)),
    ),
)
@pytest.mark.parametrize("controller", cases((PID,), more=(dfx.ConstantStepSize(),)))
@pytest.mark.parametrize(
    "ts", cases((jnp.linspace(0, 2.9, 7),), slow=(None,)), ids=("ts", "t1")
)
def test_evaluations(solver, stages, extra, controller, ts):
    field = Counter()

    def final(y0, scale):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            0.0,
            3.0,
            jnp.array(1.0),
            y0,
            scale,
            saveat=dfx.SaveAt(t1=True, ts=ts),
            adjoint=dr.ReversibleAdjoint(),
            stepsize_controller=controller,
        )
        return jnp.sum(sol.ys), sol.stats["num_steps"]

    y0, scale = jnp.array([1.0, 2.0]), jnp.array(0.3)
    forward, (_, steps) = field.during(jax.jit(final), y0, scale)
    # Every step has an output time before its end.
    extra = 0 if ts is None else extra
    assert forward == (stages + extra) * steps + 1
    gradient = jax.jit(jax.value_and_grad(final, argnums=(0, 1), has_aux=True))
    both, _ = field.during(gradient, y0, scale)
    # For the mid-point, `ALF6` takes another backward step and evaluates both ends again.
    # One evaluation at the start shows the fast modes of the gradient.
    assert forward < both <= (3 if extra == 3 else 2) * forward + 1


@pytest.mark.parametrize("batched", (False, True))
def test_evaluations_of_steps_that_are_not_interpolated_in(batched):
    """Only steps with an output time, in any element of a batch, take the three evaluations
    for dense output."""
    field = Counter()

    def solve(y0, ts):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF6(),
            *(0.0, 3.0, 0.25),
            y0,
            jnp.array(0.3),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=dr.ReversibleAdjoint(),
        )
        return sol.ys

    y0, ts = jnp.array([1.0, 2.0]), jnp.array([0.3, 0.4, 1.1, 2.2])
    members, interpolated = 1, 3
    if batched:
        solve, members, interpolated = jax.vmap(solve), 2, 6
        y0, ts = jnp.stack([y0, y0]), jnp.stack([ts, ts + 0.25])
    forward, _ = field.during(jax.jit(solve), y0, ts)
    assert forward == members * (20 * 12 + 1 + 3 * interpolated)


def test_evaluations_of_functions_of_outputs():
    """A step in which a function interpolates is undone and made once more, with the two
    evaluations for dense output; others are not."""
    field = Counter()

    def evaluations(**fn):
        def final(y0, scale):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dr.ALF4(),
                *(0.0, 1.0, 0.125, y0, scale),
                saveat=dfx.SaveAt(ts=jnp.array([0.3]), **fn),
                adjoint=dr.ReversibleAdjoint(),
            )
            return jnp.sum(sol.ys)

        gradient = jax.jit(jax.grad(final, argnums=(0, 1)))
        return field.during(gradient, jnp.array([1.0, 2.0]), jnp.array(0.3))[0]

    more = evaluations(fn=lambda t, y, scale: jnp.sin(scale * y)) - evaluations()
    assert more == 5 + 5 + 2


@pytest.mark.parametrize("solver, stages", ((dr.ALF6(), 20), (dr.KahanLi8(), 17)))
def test_outputs_at_the_ends_of_steps(solver, stages):
    """They take no evaluations, and are the states there."""
    field, y0 = Counter(), jnp.array([1.0, 2.0])
    terms = dfx.ODETerm(field)
    if isinstance(solver, dr.KahanLi8):
        terms, y0 = (dfx.ODETerm(lambda t, p, args: p), terms), (y0, y0)

    def solve(saveat):
        sol = dfx.diffeqsolve(
            *(terms, solver, 0.0, 2.0, 0.25, y0, jnp.array(0.3)),
            saveat=saveat,
            adjoint=dr.ReversibleAdjoint(),
            max_steps=8,
        )
        return sol.ys

    # Eight steps, as Diffrax divides by their number, which rounds for others.
    ends = 0.25 * jnp.arange(1.0, 9.0)
    forward, ys = field.during(jax.jit(lambda: solve(dfx.SaveAt(ts=ends))))
    assert forward == stages * 8 + 1
    by_step = jax.jit(lambda: solve(dfx.SaveAt(steps=True)))()
    jax.tree.map(np.testing.assert_array_equal, ys, by_step)


def test_solver_for_small_errors():
    """For errors of 1e-9 of Kepler's orbit, `KahanLi8` takes fewer evaluations than
    `BlanesMoan6`; for errors of 1e-4, more."""
    e = 0.6
    y0 = jnp.array([1 - e, 0.0]), jnp.array([0.0, ((1 + e) / (1 - e)) ** 0.5])
    terms = (
        dfx.ODETerm(lambda t, p, _: p),
        dfx.ODETerm(lambda t, q, _: kepler(t, (q, q), _)[1]),
    )

    def evaluations(solver, stages):
        @jax.jit
        def end_and_steps(tol):
            sol = dfx.diffeqsolve(
                terms,
                solver,
                *(0.0, 2 * jnp.pi, None, y0),
                stepsize_controller=dfx.PIDController(tol, tol),
            )
            return jax.tree.map(lambda y: y[-1], sol.ys), sol.stats["num_steps"]

        ends, steps = jax.vmap(end_and_steps)(jnp.logspace(-3, -11, 9))
        ends = zip(*ends, strict=True)
        errors = np.log([relative_error(end, y0) for end in ends])
        steps = np.log(np.asarray(steps))
        return stages * np.exp(np.interp(np.log([1e-9, 1e-4]), errors[::-1], steps[::-1]))

    sixth, eighth = evaluations(dr.BlanesMoan6(), 10), evaluations(dr.KahanLi8(), 17)
    assert eighth[0] < 0.95 * sixth[0]
    assert eighth[1] > 1.2 * sixth[1]


def test_evaluation_at_the_end():
    """If the vector field may have kinks, adaptive steps are evaluated at their end, too.
    Fixed steps and the backward pass are not."""
    counter = Counter()
    field = lambda t, y, scale: counter(t, y, scale) + jnp.maximum(y, 0)

    def final(y0, controller):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            *(0.0, 3.0, jnp.array(1.0), y0, jnp.array(0.3)),
            adjoint=dr.ReversibleAdjoint(),
            stepsize_controller=controller,
        )
        return sol.ys[0], (sol.stats["num_steps"], sol.stats["num_accepted_steps"])

    for controller, count in (PID, 6), (dfx.ConstantStepSize(), 5):
        value = jax.jit(lambda y0, c=controller: final(y0, c))
        forward, (_, (steps, accepted)) = counter.during(value, jnp.array(1.0))
        assert forward == count * steps + 1
        gradient = jax.grad(lambda y0, c=controller: final(y0, c), has_aux=True)
        both, _ = counter.during(jax.jit(gradient), jnp.array(1.0))
        # The first step, before which everything rests, is made again from its start. One
        # evaluation there shows the fast modes of the gradient.
        assert both <= forward + 5 * accepted + 1 + 2 * 5 + 1
