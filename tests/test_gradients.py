"""Gradients equal those of the default adjoint, a closed form and differences."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import (
    as_terms,
    assert_same_gradient,
    BITWISE,
    Case,
    cases,
    COMPENSATED,
    CONTROLLERS,
    FAMILIES,
    harmonic,
    InverseOnly,
    Network,
    network_args,
    PAIR,
    PAIR_Y0,
    PID,
    relative_error,
    SOLVERS,
    sum_of_squares,
    Y0,
)


TS = jnp.linspace(0.0, 3.0, 13)


def solve(adjoint, field, y0, args=None, *, solver=SOLVERS[1], t0=0.0, t1=3.0, **kwargs):
    kwargs = dict(dt0=0.1, saveat=dfx.SaveAt(t1=True), max_steps=200) | kwargs
    dt0 = kwargs.pop("dt0")
    if dt0 is not None:
        dt0 = jnp.array(dt0)
    return dfx.diffeqsolve(
        as_terms(field), solver, t0, t1, dt0, y0, args, adjoint=adjoint, **kwargs
    )


def rejecting(field, y0, *solvers):
    return [Case(solver, field, y0, *CONTROLLERS[1]) for solver in solvers]


SLOW_FAMILIES = ("splitting", "LeapfrogMidpoint")

# Every solver with a controller that rejects steps, and some with every controller.
CASES = cases(
    (*rejecting(Network(), Y0, dr.ALF4()),),
    long=(
        *rejecting(PAIR, PAIR_Y0, dr.BlanesMoan6(compensated=True)),
        FAMILIES["ReversibleHeun"],
    ),
    slow=(
        FAMILIES["coupling"],
        FAMILIES["SemiImplicitEuler"],
        *rejecting(Network(), Y0, dr.ALF8(), COMPENSATED),
        *rejecting(PAIR, PAIR_Y0, dr.KahanLi8()),
        *(Case(dr.ALF4(), Network(), Y0, *CONTROLLERS[i]) for i in (0, 2, 3)),
        Case(BITWISE, Network(), Y0, *CONTROLLERS[2]),
        *(FAMILIES[name] for name in SLOW_FAMILIES),
        Case(dfx.LeapfrogMidpoint(), Network(), Y0, *CONTROLLERS[3]),
        *rejecting(Network(), Y0, dr.ALF2(), dr.ALF6(), BITWISE),
        *rejecting(Network(), Y0, dr.McCallumFoster(dfx.Heun())),
        *rejecting(Network(), Y0, dr.McCallumFoster(dfx.Dopri8(), 0.9)),
        *rejecting(PAIR, PAIR_Y0, dr.StormerVerlet(), dr.BlanesMoan6()),
        *rejecting(PAIR, PAIR_Y0, dr.BlanesMoan4(bitwise=True)),
        Case(BITWISE, Network(), Y0, *CONTROLLERS[0]),
        Case(dr.BlanesMoan6(nystrom=True), (harmonic, PAIR[1]), PAIR_Y0, *CONTROLLERS[3]),
    ),
)


@pytest.mark.parametrize("case", CASES)
def test_against_default(case):
    """Gradients with respect to the initial state, `args` and the network are right, for
    outputs between the steps and at both ends."""
    solver, field, y0, controller, dt0 = case

    def loss(adjoint, y0, field, args):
        sol = solve(
            adjoint,
            field,
            y0,
            args,
            solver=solver,
            dt0=dt0,
            saveat=dfx.SaveAt(t0=True, t1=True, ts=TS),
            stepsize_controller=controller,
        )
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, y0, field, network_args())


def test_rejected_steps_are_among_them():
    controller, dt0 = CONTROLLERS[1]
    sol = solve(
        dr.ReversibleAdjoint(),
        Network(),
        Y0,
        network_args(),
        dt0=dt0,
        stepsize_controller=controller,
    )
    assert sol.stats["num_rejected_steps"] > 0


@pytest.mark.parametrize(
    "solver", cases(SOLVERS[1:2], more=SOLVERS[2:3], slow=(SOLVERS[0], *SOLVERS[3:]))
)
def test_against_closed_form(solver):
    """`y' = a y`, whose solution is `y0 exp(a t)`."""
    y0, a, t1 = jnp.array(1.5), jnp.array(-0.4), 2.0

    @jax.jit
    def gradient(y0, a):
        def final(y0, a):
            sol = solve(
                dr.ReversibleAdjoint(),
                lambda t, y, a: a * y,
                y0,
                a,
                solver=solver,
                t1=t1,
                dt0=1 / 256,
                max_steps=512,
            )
            return sol.ys[0]

        return jax.grad(final, argnums=(0, 1))(y0, a)

    tol = 1e-5 if solver.order(None) == 2 else 1e-10
    grad_y0, grad_a = gradient(y0, a)
    assert abs(grad_y0 - np.exp(a * t1)) < tol
    assert abs(grad_a - y0 * t1 * np.exp(a * t1)) < tol


@pytest.mark.slow
def test_against_differences():
    @jax.jit
    def loss(y0):
        sol = solve(
            dr.ReversibleAdjoint(),
            Network(),
            y0,
            network_args(),
            saveat=dfx.SaveAt(ts=TS),
        )
        return sum_of_squares(sol.ys)

    direction = jnp.array([0.3, -0.2, 0.5])
    h = 1e-5
    difference = (loss(Y0 + h * direction) - loss(Y0 - h * direction)) / (2 * h)
    assert abs(jax.grad(loss)(Y0) @ direction / difference - 1) < 1e-8


@pytest.mark.long
def test_backwards_in_time():
    def loss(adjoint, y0, field, args):
        sol = solve(
            adjoint,
            field,
            y0,
            args,
            t0=3.0,
            t1=0.0,
            dt0=-0.1,
            saveat=dfx.SaveAt(t0=True, t1=True, ts=TS[::-1]),
            stepsize_controller=PID,
        )
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, Y0, Network(), network_args())


@pytest.mark.long
@pytest.mark.parametrize(
    "of", cases(("every leaf",), slow=("the leaf in double precision",))
)
def test_pytree_state(of):
    """The state may mix dtypes, and have 0-d and empty arrays and `None`."""
    y0 = {
        "a": jnp.array([1.0, 2.0]),
        "b": (jnp.array(0.3, jnp.float32), None),
        "empty": jnp.zeros((0, 2)),
    }

    def field(t, y, w):
        a, b = y["a"], y["b"][0]
        total = w * jnp.sum(a)
        return {
            "a": jnp.sin(a * b.astype(a.dtype)) + 0.1 * total,
            "b": (jnp.cos(total * t).astype(b.dtype), None),
            "empty": y["empty"],
        }

    def loss(adjoint, y0, w):
        sol = solve(adjoint, field, y0, w, saveat=dfx.SaveAt(ts=TS))
        a, (b, _) = sol.ys["a"], sol.ys["b"]
        return jnp.sum(a**2) + jnp.sum(b.astype(a.dtype) ** 3)

    if of == "every leaf":
        grad_y0, _ = assert_same_gradient(loss, y0, jnp.array(0.3), tol=1e-6)
        assert grad_y0["b"][0].dtype == jnp.float32
    else:
        # Equal to rounding in float64.
        assert_same_gradient(
            lambda adjoint, a, w: loss(adjoint, y0 | {"a": a}, w), y0["a"], jnp.array(0.3)
        )


@pytest.mark.slow
def test_closures():
    """Vector fields and `SaveAt(fn=...)` may close over differentiated values."""

    def loss(adjoint, w, b):
        sol = solve(
            adjoint,
            lambda t, y, args: jnp.tanh(w * y) - b * t,
            Y0,
            saveat=dfx.SaveAt(ts=TS, fn=lambda t, y, args: w * y * t),
            stepsize_controller=PID,
        )
        return sum_of_squares(sol.ys)

    gradients = assert_same_gradient(loss, jnp.array(1.3), jnp.array([0.1, 0.2, 0.3]))
    assert all(np.all(leaf != 0) for leaf in gradients)


@pytest.mark.long
def test_some_leaves_only():
    """`args` may have leaves that are not differentiated, such as integers."""

    def loss(adjoint, scale):
        args = network_args() | {"scale": scale}
        return sum_of_squares(solve(adjoint, Network(), Y0, args).ys)

    assert_same_gradient(loss, jnp.array(1.3))


@pytest.mark.more
def test_weak_types():
    """The gradient of a Python float does not promote a parameter that it updates."""

    def loss(args, adjoint):
        rate, shift = args
        field = lambda t, y, _: shift[0] - rate * y
        return jnp.sum(solve(adjoint, field, Y0).ys)

    for adjoint in (dfx.RecursiveCheckpointAdjoint(), dr.ReversibleAdjoint()):
        grads = jax.grad(loss)((0.5, jnp.ones(1)), adjoint)
        assert [g.weak_type for g in grads] == [True, False]
        assert (jnp.float32(1) - grads[0]).dtype == jnp.float32


@pytest.mark.slow
def test_continued_solve():
    """The gradient passes from one solve to the next through `solver_state` too."""

    def loss(adjoint, y0):
        args = network_args()
        first = solve(
            adjoint,
            Network(),
            y0,
            args,
            t1=1.5,
            saveat=dfx.SaveAt(t1=True, solver_state=True, controller_state=True),
            stepsize_controller=PID,
        )
        second = solve(
            adjoint,
            Network(),
            first.ys[-1],
            args,
            t0=1.5,
            solver_state=first.solver_state,
            controller_state=first.controller_state,
            stepsize_controller=PID,
        )
        return sum_of_squares(second.ys) + jnp.sum(second.ts)

    assert_same_gradient(loss, Y0)


@pytest.mark.long
def test_two_halves():
    """Two half solves with the same steps have the gradient of the whole."""

    def final(y0, field, args, t0, t1, **kwargs):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        adjoint = dr.ReversibleAdjoint()
        sol = solve(
            adjoint, field, y0, args, t0=t0, t1=t1, dt0=0.125, saveat=saveat, **kwargs
        )
        return sol.ys[-1], sol.solver_state

    def gradient(ends):
        @eqx.filter_jit
        @eqx.filter_grad
        def of(inputs):
            y, field, args = inputs
            state = None
            for t0, t1 in zip(ends[:-1], ends[1:], strict=True):
                y, state = final(y, field, args, t0, t1, solver_state=state)
            return sum_of_squares(y)

        return of((Y0, Network(), network_args()))

    assert relative_error(gradient((0.0, 1.5, 3.0)), gradient((0.0, 3.0))) < 1e-12


@pytest.mark.long
def test_no_steps():
    def loss(adjoint, y0):
        t = jnp.array(1.0)
        saveat = dfx.SaveAt(t0=True, t1=True, ts=jnp.array([1.0, 1.0]))
        sol = solve(adjoint, Network(), y0, network_args(), t0=t, t1=t, saveat=saveat)
        return jnp.sum(jnp.arange(4.0)[:, None] * sol.ys**2)

    grad = assert_same_gradient(loss, Y0)
    assert np.allclose(grad[0], 12 * Y0)


@pytest.mark.long
def test_max_steps_reached():
    """Without `throw`, the gradient is that of the outputs that were written."""

    def loss(adjoint, y0):
        sol = solve(
            adjoint,
            Network(),
            y0,
            network_args(),
            max_steps=10,
            throw=False,
            saveat=dfx.SaveAt(ts=TS, t1=True, fn=lambda t, y, args: t * y),
        )
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, Y0)
    # The solve reached four times after the start.
    sol = solve(
        dr.ReversibleAdjoint(),
        Network(),
        Y0,
        network_args(),
        max_steps=10,
        throw=False,
        saveat=dfx.SaveAt(ts=TS),
    )
    assert np.sum(np.isfinite(sol.ys[:, 0])) == 4 + 1


@pytest.mark.slow
def test_own_coefficients():
    outer = 1 / (2 - 2 ** (1 / 3))
    gamma = (outer, 1 - 2 * outer, outer)
    solver = dr.ALF(dr.ALFTableau([g / 2 for g in gamma for _ in range(2)], order=4))

    def loss(adjoint, y0, field):
        sol = solve(adjoint, field, y0, network_args(), solver=solver)
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, Y0, Network())


@pytest.mark.slow
def test_solver_with_nothing_but_an_inverse():
    """The default pull-back allows integers in the solver state."""

    def loss(adjoint, y0, field, args):
        sol = solve(
            adjoint,
            field,
            y0,
            args,
            solver=InverseOnly(),
            saveat=dfx.SaveAt(ts=TS, fn=lambda t, y, args: jnp.sin(y)),
        )
        return sum_of_squares(sol.ys)

    assert_same_gradient(loss, Y0, Network(), network_args())


@pytest.mark.slow
def test_float32():
    """In float32 throughout, gradients are nearly as good as the default adjoint's."""
    y0, field = Y0.astype(jnp.float32), Network(jnp.float32)
    args = network_args(jnp.float32)

    def gradient(adjoint, y0, field, args):
        @eqx.filter_jit
        @eqx.filter_grad
        def grad(inputs):
            y0, field, args = inputs
            time = y0.dtype.type
            sol = solve(
                adjoint,
                field,
                y0,
                args,
                t0=time(0),
                t1=time(3),
                dt0=time(0.1),
                saveat=dfx.SaveAt(ts=TS.astype(y0.dtype)),
            )
            return sum_of_squares(sol.ys)

        return grad((y0, field, args))

    ours = gradient(dr.ReversibleAdjoint(), y0, field, args)
    assert ours[0].dtype == jnp.float32
    theirs = gradient(dfx.RecursiveCheckpointAdjoint(), y0, field, args)

    def to_float64(tree):
        return jax.tree.map(
            lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree
        )

    exact = gradient(dr.ReversibleAdjoint(), *map(to_float64, (y0, field, args)))
    assert relative_error(theirs, exact) < 1e-6
    assert relative_error(ours, exact) < 3e-6
