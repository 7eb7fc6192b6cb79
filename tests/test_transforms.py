"""`jit`, `vmap`, both orders of `vmap` and `grad`, Hessians, and Diffrax's adjoints."""

import functools

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
    CONTROLLERS,
    FAMILIES,
    families,
    InverseOnly,
    network_args,
    PID,
    relative_error,
    SOLVERS,
    sum_of_squares,
)


BATCH = jnp.array([[1.0, 2.0, 0.5], [0.1, -0.3, 0.2], [-2.0, 3.0, 1.5]])
TS = jnp.linspace(0.0, 3.0, 7)


def solve(y0, w, adjoint=None, solver=SOLVERS[1], controller=PID, **kwargs):
    kwargs = dict(saveat=dfx.SaveAt(ts=TS), max_steps=200) | kwargs
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, w: jnp.sin(w * y) - y * jnp.sum(y**2) / 20),
        solver,
        0.0,
        3.0,
        jnp.array(0.3),
        y0,
        w,
        adjoint=dr.ReversibleAdjoint() if adjoint is None else adjoint,
        stepsize_controller=controller,
        **kwargs,
    )


def loss(y0, w, adjoint=None):
    return jnp.sum(solve(y0, w, adjoint).ys ** 2)


W = jnp.array(1.2)


@functools.cache
def one_by_one(adjoint):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    grads = [gradient(y0, W, adjoint) for y0 in BATCH]
    return jax.tree.map(lambda *g: jnp.stack(g), *grads)


def test_elements_take_their_own_numbers_of_steps():
    steps = jax.vmap(lambda y0: solve(y0, W).stats["num_steps"])(BATCH)
    assert len(set(np.asarray(steps).tolist())) > 1


@functools.cache
def batched():
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None)))
    return gradient(BATCH, W)


@pytest.mark.parametrize(
    "adjoint, tol",
    cases(
        (),
        long=((dfx.RecursiveCheckpointAdjoint(), 1e-10),),
        slow=((dr.ReversibleAdjoint(), 1e-11),),
    ),
)
def test_vmap_of_grad(adjoint, tol):
    assert relative_error(batched(), one_by_one(adjoint)) < tol


@pytest.mark.slow
@pytest.mark.parametrize("jit", (True, False))
def test_grad_of_vmap(jit):
    def total(batch, w):
        return jnp.sum(jax.vmap(loss, in_axes=(0, None))(batch, w))

    gradient = jax.grad(total, argnums=(0, 1))
    gradient = jax.jit(gradient) if jit else gradient
    grad_y0, grad_w = one_by_one(dfx.RecursiveCheckpointAdjoint())
    assert relative_error(gradient(BATCH, W), (grad_y0, jnp.sum(grad_w))) < 1e-10


@pytest.mark.slow
def test_vmap_over_times():
    """Save times may differ between the elements of a batch."""

    def final(y0, ts):
        return jnp.sum(solve(y0, W, saveat=dfx.SaveAt(ts=ts)).ys ** 2)

    ts = jnp.stack([TS, TS**2 / 3, TS / 2])
    batched = jax.vmap(jax.grad(final))(BATCH, ts)
    alone = jnp.stack([jax.grad(final)(y0, t) for y0, t in zip(BATCH, ts, strict=True)])
    assert relative_error(batched, alone) < 1e-11


@pytest.mark.parametrize(
    "solver, controller",
    cases(
        (),
        slow=[
            (SOLVERS[1], CONTROLLERS[0][0]),
            *((solver, PID) for solver in SOLVERS),
        ],
    ),
)
def test_other_adjoints(solver, controller):
    """Under Diffrax's other adjoints the solvers have the same gradients."""

    def final(y0, w, adjoint):
        kwargs = dict(saveat=dfx.SaveAt(t1=True), max_steps=512)
        sol = solve(y0, w, adjoint, solver, controller, **kwargs)
        return jnp.sum(sol.ys**2)

    y0 = BATCH[0]
    reverse = jax.jit(jax.grad(final, argnums=(0, 1)), static_argnums=2)
    expected = reverse(y0, W, dr.ReversibleAdjoint())
    for adjoint in (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint()):
        assert relative_error(reverse(y0, W, adjoint), expected) < 1e-10
    forward = jax.jit(jax.jacfwd(final, argnums=(0, 1)), static_argnums=2)
    assert relative_error(forward(y0, W, dfx.ForwardMode()), expected) < 1e-10


def test_least_squares():
    """A fit by Optimistix, whose Jacobian is by reverse mode if it is asked to."""
    residuals = lambda w, data: solve(BATCH[0], w).ys - data
    data, guess = solve(BATCH[0], W).ys, W + 0.1
    levenberg = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    backwards = dict(jac="bwd")
    fit = optx.least_squares(residuals, levenberg, guess, data, options=backwards)
    np.testing.assert_allclose(fit.value, W, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS[1:], ids=repr)
def test_backsolve(solver):
    """`BacksolveAdjoint`, which solves the continuous adjoint equation backwards, agrees
    approximately."""

    def gradient(adjoint):
        def final(y0, w):
            controller = dfx.ConstantStepSize()
            saveat = dfx.SaveAt(t1=True)
            sol = solve(y0, w, adjoint, solver, controller, saveat=saveat)
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.grad(final, argnums=(0, 1)))(BATCH[0] / 4, W)

    exact = gradient(dr.ReversibleAdjoint())
    assert relative_error(gradient(dfx.BacksolveAdjoint()), exact) < 1e-3


def test_implicit():
    """`ImplicitAdjoint` is right at a steady state."""

    def final(a):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, a: a - y),
            dr.ALF4(),
            0.0,
            jnp.inf,
            None,
            jnp.array(1.0),
            a,
            stepsize_controller=PID,
            adjoint=dfx.ImplicitAdjoint(),
            event=dfx.Event(dfx.steady_state_event()),
        )
        return sol.ys[0]

    # Diffrax's own adjoint promotes dtypes here.
    with jax.numpy_dtype_promotion("standard"):
        value, grad = jax.value_and_grad(final)(jnp.array(3.0))
    assert abs(value - 3) < 1e-2
    assert abs(grad - 1) < 1e-10


@pytest.mark.parametrize(
    "batched", cases((), long=(False,), slow=(True,)), ids=("one", "batch")
)
def test_progress_meter(batched, capsys):
    """The backward pass shows its progress, as the solve does."""

    def with_meter(y0):
        meter = dfx.TextProgressMeter(minimum_increase=0.3)
        return jnp.sum(solve(y0, W, progress_meter=meter).ys ** 2)

    y0 = BATCH if batched else BATCH[0]
    gradient = jax.grad(lambda y0: loss(y0, W))
    shown = jax.grad(with_meter)
    if batched:
        gradient, shown = jax.vmap(gradient), jax.vmap(shown)
    assert relative_error(shown(y0), gradient(y0)) < 1e-14
    jax.effects_barrier()
    percents = [float(line.rstrip("%")) for line in capsys.readouterr().out.split()]
    starts = [i for i, percent in enumerate(percents) if percent == 0]
    assert len(starts) == 2
    for part in percents[: starts[1]], percents[starts[1] :]:
        assert part == sorted(part) and part[-1] == 100 and len(part) > 3


HESSIANS = {
    "save times": dict(saveat=dfx.SaveAt(ts=TS, t1=True, fn=lambda t, y, w: w * y**2 * t)),
    "compensated": dict(solver=dr.ALF6(compensated=True)),
    "inverse only": dict(solver=InverseOnly(), controller=dfx.ConstantStepSize()),
    "jump": dict(
        controller=dfx.ClipStepSizeController(PID, jump_ts=jnp.array([1.0, 2.0])),
        saveat=dfx.SaveAt(dense=True, t1=True, steps=2),
    ),
    "event": dict(
        event=dfx.Event(
            lambda t, y, args, **kwargs: y[0] - 0.4 * y[1] - 0.3 + 0.0 * t,
            optx.Newton(1e-10, 1e-10),
        ),
        saveat=dfx.SaveAt(t1=True),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    cases(("save times",), more=("event",), slow=("jump", "compensated", "inverse only")),
)
def test_forward_over_reverse(name):
    """Hessian-vector products equal those of `DirectAdjoint`, which stores everything."""

    def product(adjoint):
        def final(y0, w):
            sol = solve(y0, w, adjoint, **HESSIANS[name])
            return sum_of_squares((sol.ys, sol.ts))

        gradient = jax.grad(final, argnums=(0, 1))
        direction = jnp.array([0.3, -0.2, 0.5]), jnp.array(0.7)
        return jax.jit(lambda *x: jax.jvp(gradient, x, direction))(BATCH[0], W)

    ours, expected = product(dr.ReversibleAdjoint()), product(dfx.DirectAdjoint())
    assert relative_error(ours[1], expected[1]) < 1e-9
    assert relative_error(ours[0], expected[0]) < 1e-10


@pytest.mark.parametrize(
    "outer, inner", cases((), slow=((0, 1), (1, 2), (0, 0), (0, 2), (1, 0), (1, 1)))
)
def test_forward_over_reverse_of_something_else(outer, inner):
    """The gradient with respect to one input may be differentiated along another."""

    def product(adjoint):
        def final(*inputs):
            y0, w, ts = inputs
            return sum_of_squares(solve(y0, w, adjoint, saveat=dfx.SaveAt(ts=ts)).ys)

        inputs = [BATCH[0], W, TS / 2]

        def gradient(x):
            along = [*inputs[:outer], x, *inputs[outer + 1 :]]
            return jax.grad(final, inner)(*along)

        x = inputs[outer]
        return jax.jit(lambda x: jax.jvp(gradient, (x,), (jnp.cos(x),)))(x)

    ours, expected = product(dr.ReversibleAdjoint()), product(dfx.DirectAdjoint())
    assert relative_error(ours[1], expected[1]) < 1e-9
    assert relative_error(ours[0], expected[0]) < 1e-10


@families
def test_families(family):
    """`jvp` of `vmap` of `grad` equals that of `DirectAdjoint`."""
    solver, field, y0, controller, dt0 = FAMILIES[family]
    batch = jax.tree.map(lambda y: jnp.stack([y, y**2, -y / 2]), y0)

    def final(y0, adjoint):
        sol = dfx.diffeqsolve(
            as_terms(field),
            *(solver, 0.0, 1.0, dt0, y0, network_args()),
            saveat=dfx.SaveAt(ts=TS / 3),
            adjoint=adjoint,
            stepsize_controller=controller,
            max_steps=200,
        )
        return sum_of_squares(sol.ys)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient_and_product(batch, adjoint):
        gradient = jax.vmap(jax.grad(lambda y0: final(y0, adjoint)))
        return jax.jvp(gradient, (batch,), (jax.tree.map(jnp.cos, batch),))

    adjoints = dr.ReversibleAdjoint(), dfx.DirectAdjoint()
    ours, expected = (gradient_and_product(batch, adjoint) for adjoint in adjoints)
    for x, reference in zip(ours, expected, strict=True):
        assert relative_error(x, reference) < 1e-10


@pytest.mark.slow
def test_hessian():
    """The Hessian is symmetric, which forward over reverse mode does not ensure by itself,
    and equals differences of the gradient."""

    def final(y0):
        # Fixed steps, so that the differences have them too.
        return jnp.sum(solve(y0, W, controller=dfx.ConstantStepSize()).ys ** 2)

    hessian = jax.jit(jax.hessian(final))(BATCH[0])
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-9, atol=1e-12)
    gradient, h = jax.jit(jax.grad(final)), jnp.array([1e-5, 0.0, 0.0])
    difference = (gradient(BATCH[0] + h) - gradient(BATCH[0] - h)) / 2e-5
    np.testing.assert_allclose(hessian[0], difference, rtol=1e-6, atol=1e-8)


def in_scan(y0, w, adjoint):
    """A chain of solves in the checkpointed iterations of a scan."""
    # Without the limit, a step exceeds that of stability, and is divided.
    controller = dfx.PIDController(1e-4, 1e-4, dtmax=0.5)
    kwargs = dict(saveat=dfx.SaveAt(t1=True), controller=controller)

    @jax.checkpoint
    def body(y, _):
        y = solve(y, w, adjoint, **kwargs).ys[-1]
        return y, y

    _, ys = jax.lax.scan(body, y0, length=3)
    return jnp.sum(ys**2)


def nested(y0, w, adjoint):
    """A solve in the vector field of another."""

    def field(t, y, w):
        return jnp.sin(solve(y, w, adjoint, saveat=dfx.SaveAt(t1=True)).ys[-1])

    sol = dfx.diffeqsolve(
        dfx.ODETerm(field), dr.ALF4(), 0.0, 1.0, 0.2, y0, w, adjoint=adjoint
    )
    return jnp.sum(sol.ys**2)


@pytest.mark.long
@pytest.mark.parametrize("function", cases((in_scan,), slow=(nested,)))
def test_within_other_transforms(function):
    gradient = jax.jit(jax.grad(function, argnums=(0, 1)), static_argnums=2)
    ours = gradient(BATCH[0], W, dr.ReversibleAdjoint())
    expected = gradient(BATCH[0], W, dfx.RecursiveCheckpointAdjoint())
    assert relative_error(ours, expected) < 1e-10
