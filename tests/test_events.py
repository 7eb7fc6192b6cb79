"""Events: final times and states, outputs saved before them, and gradients equal those of
the default adjoint."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr

from .problems import (
    as_terms,
    cases,
    FAMILIES,
    families,
    InverseOnly,
    relative_error,
    sum_of_squares,
)


PID = dfx.PIDController(rtol=1e-6, atol=1e-6)
ROOT = optx.Newton(rtol=1e-10, atol=1e-10)
BISECTION = optx.Bisection(rtol=1e-9, atol=1e-9)
TS = jnp.array([0.1, 0.6, 0.7, 1.2, 2.4])
Y0, W = jnp.array([1.0, 0.3]), jnp.array(1.1)


def pendulum(t, y, w):
    q, p = y
    return jnp.stack([p, -(w**2) * jnp.sin(q) - 0.1 * p * jnp.cos(t)])


# The same without friction, as `q' = f(t, p)` and `p' = g(t, q)`.
PENDULUM = (
    lambda t, p, w: p,
    lambda t, q, w: -(w**2) * jnp.sin(q) - 0.1 * jnp.cos(t),
)


def real(threshold=0.2):
    def condition(t, y, args, **kwargs):
        return y[0] * args - threshold + 0.01 * t

    return condition


def boolean(t, y, args, **kwargs):
    return y[0] < 0.2


def never(t, y, args, **kwargs):
    return y[0] + 100.0


EVENTS = {
    "boolean": dfx.Event(boolean),
    "boolean, root finder": dfx.Event(boolean, ROOT),
    "real": dfx.Event(real()),
    "real, root finder": dfx.Event(real(), ROOT),
    "real, bisection": dfx.Event(real(), BISECTION),
    "upwards": dfx.Event(real(), ROOT, direction=True),
    "downwards": dfx.Event(real(), ROOT, direction=False),
    "several": dfx.Event(
        {"never": never, "first": real(0.3), "others": [real(-0.1), boolean]},
        ROOT,
        direction={"never": None, "first": False, "others": [None, None]},
    ),
    "never": dfx.Event(never, ROOT),
}
LAST = dfx.SaveAt(t1=True)
EVERYTHING = dfx.SaveAt(
    subs=[
        dfx.SubSaveAt(t0=True, t1=True, ts=TS, steps=2),
        dfx.SubSaveAt(t1=True, ts=TS, fn=lambda t, y, args: {"t": t * y**2 * args}),
        dfx.SubSaveAt(steps=1),
    ],
    dense=True,
    solver_state=True,
)


def solve(y0, w, adjoint, event, saveat=LAST, solver=None, t0=0.0, t1=6.0, **kwargs):
    return dfx.diffeqsolve(
        as_terms(kwargs.pop("field", pendulum)),
        dr.ALF4() if solver is None else solver,
        t0,
        t1,
        jnp.sign(jnp.asarray(t1 - t0)) * 0.05,
        y0,
        w,
        event=event,
        saveat=saveat,
        stepsize_controller=kwargs.pop("stepsize_controller", PID),
        max_steps=kwargs.pop("max_steps", 300),
        adjoint=adjoint,
        **kwargs,
    )


def loss(y0, w, adjoint, event, saveat=LAST, **kwargs):
    sol = solve(y0, w, adjoint, event, saveat, **kwargs)
    total = sum_of_squares(sol.ys) + sum_of_squares(jax.tree.map(jnp.sin, sol.ts))
    if saveat.dense:
        total += jnp.sum(sol.evaluate(0.3) ** 2) + jnp.sum(sol.derivative(0.7) ** 2)
        total += sum_of_squares(sol.solver_state)
    # Not all of `sol`: its dense output has no meaning outside of the steps taken.
    return total, (sol.ts, sol.ys, sol.event_mask, sol.stats["num_steps"])


def both(of, *args):
    """The function `of(adjoint)` has the same value and gradient under both adjoints."""

    def run(adjoint):
        argnums = tuple(range(len(args)))
        function = jax.value_and_grad(of(adjoint), argnums, has_aux=True)
        return jax.jit(function)(*args)

    (value, out), grad = run(dr.ReversibleAdjoint())
    (expected_value, expected_out), expected_grad = run(dfx.RecursiveCheckpointAdjoint())
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected_out), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(value, expected_value, rtol=1e-11)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(expected_grad))
    assert relative_error(grad, expected_grad) < 1e-10
    return out, grad


QUICK = ("real, root finder",)


@pytest.mark.long
@pytest.mark.parametrize("name", cases(QUICK, slow=[n for n in EVENTS if n not in QUICK]))
def test_against_default(name):
    event = EVENTS[name]
    (ts, _, mask, _), _ = both(lambda a: lambda y, w: loss(y, w, a, event), Y0, W)
    occurred = any(bool(m) for m in jax.tree.leaves(mask))
    assert occurred == (name != "never") == bool(ts[0] < 6.0)


@pytest.mark.parametrize("name", cases((), slow=("real, root finder", "boolean")))
def test_everything_saved(name):
    """Outputs that were saved after the event are removed."""
    both(lambda a: lambda y, w: loss(y, w, a, EVENTS[name], EVERYTHING), Y0, W)


@pytest.mark.parametrize("solver", cases((), slow=(InverseOnly(), dr.ALF6(bitwise=True))))
def test_solvers(solver):
    fixed = dict(solver=solver, stepsize_controller=dfx.ConstantStepSize())
    event = EVENTS["several"]
    both(lambda a: lambda y, w: loss(y, w, a, event, **fixed), Y0, W)


@families
def test_families(family):
    """Gradients are right for outputs at given times and at the located event."""
    solver, field, _, controller, _ = FAMILIES[family]
    kwargs = dict(solver=solver, stepsize_controller=controller)
    kwargs |= dict(saveat=dfx.SaveAt(ts=TS, t1=True))
    kwargs |= dict(field=PENDULUM) if isinstance(field, tuple) else {}
    y0 = tuple(Y0) if isinstance(field, tuple) else Y0
    event = EVENTS["real, root finder"]
    both(lambda a: lambda y, w: loss(y, w, a, event, **kwargs), y0, W)


@pytest.mark.slow
def test_backwards_in_time():
    event = EVENTS["real, root finder"]
    (ts, *_), _ = both(lambda a: lambda y, w: loss(y, w, a, event, t0=6.0, t1=0.0), Y0, W)
    assert 0 < ts[0] < 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ("real, root finder", "boolean, root finder"))
def test_batch(name):
    """Some elements of a batch reach the event, one of them at once, and others do not."""
    batch = jnp.array([[1.0, 0.3], [0.5, -2.0], [1.0, 9.0], [-3.0, 9.0]])

    def of(adjoint):
        def total(batch, w):
            def element(y0):
                return loss(y0, w, adjoint, EVENTS[name])

            values, out = jax.vmap(element)(batch)
            return jnp.sum(values), out

        return total

    if name.startswith("real"):
        batch = batch[:3]
    (ts, _, mask, steps), (batched, _) = both(of, batch, W)
    assert bool(jnp.any(mask)) and not bool(jnp.all(mask))
    for y0, g in zip(batch, batched, strict=True):
        alone = jax.grad(loss, has_aux=True)(y0, W, dr.ReversibleAdjoint(), EVENTS[name])[0]
        # Elements without an event are interpolated in a batch, but not alone.
        np.testing.assert_allclose(g, alone, rtol=1e-8)


@pytest.mark.slow
def test_conditions_that_close_over_values():
    """Only the condition depends on `threshold`. The loss depends on the time as well."""

    def of(adjoint):
        def function(y0, threshold):
            def condition(t, y, args, *, terms, solver, t1, **kwargs):
                speed = solver.func(terms, t, y, args)[0]
                return y[0] - threshold + 0.1 * speed - 0 * t1

            return loss(y0, W, adjoint, dfx.Event(condition, ROOT))

        return function

    both(of, Y0, jnp.array(0.2))


@pytest.mark.more
def test_closed_form():
    """A ball dropped from `x0` hits the floor after `sqrt(2 x0 / g)`, at `sqrt(2 x0 g)`."""

    def impact(x0, g):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, g: jnp.stack([y[1], -g])),
            dr.ALF4(),
            0.0,
            jnp.inf,
            0.1,
            jnp.stack([x0, jnp.zeros_like(x0)]),
            g,
            event=dfx.Event(lambda t, y, args, **kwargs: y[0], ROOT),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.stack([sol.ts[0], -sol.ys[0, 1]])

    x0, g = jnp.array(10.0), jnp.array(8.0)
    by_x0, by_g = jax.jit(jax.jacrev(impact, (0, 1)))(x0, g)
    time, speed = np.sqrt(2 * x0 / g), np.sqrt(2 * x0 * g)
    np.testing.assert_allclose(impact(x0, g), [time, speed], rtol=1e-10)
    np.testing.assert_allclose(by_x0, [time / (2 * x0), speed / (2 * x0)], rtol=1e-9)
    np.testing.assert_allclose(by_g, [-time / (2 * g), speed / (2 * g)], rtol=1e-9)


@pytest.mark.more
def test_times():
    """The gradient with respect to `t0` includes the location of the event. `t0` shifts the
    solution of an autonomous equation, and the event with it."""

    def final(t0, w):
        event = dfx.Event(lambda t, y, args, **kwargs: y[0] - 0.2, ROOT)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: jnp.stack([y[1], -w * y[0]])),
            dr.ALF6(),
            t0,
            t0 + 6.0,
            0.1,
            Y0,
            w,
            event=event,
            stepsize_controller=dfx.PIDController(rtol=1e-10, atol=1e-10),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.append(sol.ys[0], sol.ts[0])

    by_t0 = jax.jit(jax.jacrev(final))(jnp.array(0.5), W)
    np.testing.assert_allclose(by_t0, [0.0, 0.0, 1.0], atol=1e-6)


@pytest.mark.more
def test_steady_state():
    """Diffrax's own event."""

    def final(a, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, a: a - y),
            dr.ALF4(),
            0.0,
            jnp.inf,
            None,
            jnp.array([1.0]),
            a,
            stepsize_controller=PID,
            adjoint=adjoint,
            event=dfx.Event(dfx.steady_state_event(rtol=1e-3, atol=1e-3)),
        )
        return sol.ys[0, 0]

    grad = jax.jit(jax.grad(final), static_argnums=1)
    ours, default = (
        grad(jnp.array(3.0), a)
        for a in (dr.ReversibleAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    assert abs(ours - default) < 1e-10


@pytest.mark.slow
def test_rejected_last_step():
    """In a batch, Diffrax interpolates even where a solve has run out of steps at one that
    was rejected. That step cannot be undone, so the gradient is NaN, not zero."""

    def final(y0, roughness):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, k: 1 + k * jnp.sin(50 * y)),
            dr.ALF4(),
            0.0,
            5.0,
            1.0,
            y0,
            roughness,
            event=dfx.Event(lambda t, y, args, **kwargs: y - 0.5, ROOT),
            stepsize_controller=PID,
            adjoint=dr.ReversibleAdjoint(),
            max_steps=1,
            throw=False,
        )
        return sol.ts[0] + sol.ys[0], sol.stats["num_rejected_steps"]

    gradient = jax.vmap(jax.grad(final, has_aux=True))
    grads, rejected = jax.jit(gradient)(jnp.array([0.1, 0.1]), jnp.array([0.0, 10.0]))
    assert rejected.tolist() == [0, 1]
    assert abs(grads[0] + 1) < 1e-12
    assert jnp.isnan(grads[1])
