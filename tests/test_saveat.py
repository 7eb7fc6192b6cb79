"""Every form of saving has the values and the gradients of the default adjoint."""

import functools as ft
import itertools as it

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr

from .problems import (
    as_terms,
    assert_same_gradient,
    Case,
    cases,
    FAMILIES,
    Network,
    network_args,
    PID,
    sum_of_squares,
    Y0,
)


TS = jnp.linspace(0.0, 3.0, 9)
ALF4 = Case(dr.ALF4(), Network(), Y0, PID, 0.2)
ALF6 = Case(dr.ALF6(), Network(), Y0, PID, 0.2)
SOME = cases(
    (ALF4,),
    more=(FAMILIES["ReversibleHeun"],),
    slow=[case for name, case in FAMILIES.items() if name != "ReversibleHeun"],
)


def scaled(t, y, args):
    y = jax.tree.map(lambda y: t * y**2 * args["scale"], y)
    return {"y": y, "count": jnp.array(3)}


def assert_same(saveat, case, read):
    """`read(sol)` is the loss of a solution, whose outputs are the same too."""

    def loss(adjoint, y0, field, args):
        sol = dfx.diffeqsolve(
            as_terms(field),
            case.solver,
            0.0,
            3.0,
            jnp.array(min(case.dt0, 0.2)),
            y0,
            args,
            saveat=saveat,
            adjoint=adjoint,
            stepsize_controller=case.controller,
            max_steps=40,
        )
        return read(sol), (sol.ts, sol.ys)

    # They are compiled separately, and their last bits may differ.
    rounding = 100 * np.finfo(np.float64).eps
    inputs = case.y0, case.field, network_args()
    assert_same_gradient(loss, *inputs, rtol=rounding, has_aux=True)


def weighted(sol):
    """A loss in which no output can stand in for another."""
    subs = sol.ys if isinstance(sol.ys, list) else [sol.ys]
    return sum((1 + i) * sum_of_squares(ys) for i, ys in enumerate(subs))


@pytest.mark.slow
def test_t0_t1_ts():
    """All combinations of them match the default adjoint."""
    combinations = list(it.product((False, True), (False, True), (None, TS)))[1:]
    subs = [dfx.SubSaveAt(t0=t0, t1=t1, ts=ts) for t0, t1, ts in combinations]
    assert_same(dfx.SaveAt(subs=subs), ALF4, weighted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "saveat",
    cases((dfx.SaveAt(ts=TS),), slow=(dfx.SaveAt(t0=True, t1=True),)),
    ids=("ts", "ends"),
)
def test_alone(saveat):
    """One form of saving alone, with or without interpolation."""
    assert_same(saveat, ALF4, weighted)


@pytest.mark.slow
def test_steps():
    subs = [
        dfx.SubSaveAt(steps=steps, t0=True, t1=t1, ts=TS)
        for steps, t1 in ((1, True), (2, False), (3, True))
    ]
    assert_same(dfx.SaveAt(subs=subs), ALF4, weighted)


@pytest.mark.parametrize("size", (1, 3000))
def test_many_in_a_step(size):
    """Gradients are right with many outputs in one step and none in others, of states that
    are pulled back several at a time, or one by one."""
    ts = jnp.concatenate([jnp.linspace(0, 0.3, 19), jnp.array([2.1, 2.9, 2.95])])
    weights = jnp.sin(3 * jnp.arange(22.0) + 1)
    y0 = jnp.linspace(0.5, 1, size)

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(rate):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y),
            dr.ALF4(),
            *(0.0, 3.0, 0.25, y0, rate),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=dr.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys * weights[:, None])

    value, grad = value_and_grad(0.7)
    exact = lambda rate: jnp.sum(weights * jnp.exp(-rate * ts)) * jnp.sum(y0)
    expected_value, expected = jax.value_and_grad(exact)(0.7)
    # The error of the solver, and of its interpolation.
    np.testing.assert_allclose(value, expected_value, rtol=3e-5)
    np.testing.assert_allclose(grad, expected, rtol=3e-5)


@pytest.mark.parametrize("case", cases((), slow=(ALF6, ALF4)))
def test_fn(case):
    """Gradients are right with a saved function that returns integers too, even at `ts`."""
    saveat = dfx.SaveAt(t0=True, t1=True, ts=TS, steps=2, fn=scaled)
    assert_same(saveat, case, weighted)


STEPS, SOME_TS = dict(steps=3), jnp.array([0.1, 0.5, 0.9])


@pytest.mark.parametrize(
    "saveat, ends, size",
    cases(
        ((STEPS, [2.0], 1), (STEPS, [1.5, 2.0], 1100)),
        # Some members have outputs where others have none; one that ends where it begins
        # saves everything at once.
        long=((SOME_TS, [0.0, 1.5, 1.7], 1),),
        more=((SOME_TS, [1.0, 1.3, 1.7], 1100), (STEPS, [1.5, 2.0], 1)),
    ),
)
def test_fn_that_is_not_finite_elsewhere(saveat, ends, size):
    """Functions of outputs may be infinite or NaN at states that are not saved, at the ends
    of steps and of members."""
    fn = lambda t, y, w: jnp.mean(w) * jnp.log(y)

    def loss(w, y0, t1, adjoint):
        at = saveat if saveat is STEPS else dict(ts=t1 * saveat)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: -jnp.mean(w) * jnp.ones_like(y)),
            dr.ALF4(),
            *(0.0, t1, 0.25, y0, w),
            saveat=dfx.SaveAt(fn=fn, **at),
            adjoint=adjoint,
            max_steps=16,
        )
        # Rows that are not written are infinite.
        return jnp.sum(sol.ys[:2])

    def grad(adjoint):
        one = lambda w, y0, t1: loss(w, y0, t1, adjoint)
        if len(ends) == 1:
            grad = jax.grad(lambda w, y0: one(w, y0, ends[0]), (0, 1))
        else:
            many = jax.vmap(one, (None, None, 0))
            grad = jax.grad(lambda w, y0: jnp.sum(many(w, y0, jnp.array(ends))), (0, 1))
        # The last step ends where the logarithm does not exist.
        return jax.jit(grad)(jnp.ones(size), jnp.array(1.62))

    default = dfx.RecursiveCheckpointAdjoint(checkpoints=16)
    for g, want in zip(grad(dr.ReversibleAdjoint()), grad(default), strict=True):
        assert np.isfinite(want).all()
        np.testing.assert_allclose(g, want, rtol=1e-9)


def test_fn_that_is_not_finite_between_members():
    """While a member has no output, a function may be NaN between the states of others, at
    the negative of their times, and at their states with arguments of its own."""
    y0s, ends = [2.0, -3.0, 5.0, 4.0, 6.0], [1.0, 1.0, 1.7, 0.0, -0.4]
    own = jnp.array([2.5, 3.6, 6.5, 4.5, 6.2])
    steepness = jnp.array([1.5, 0.5, 2.5, 1.5, 0.5])

    def loss(params, adjoint):
        w, own = params

        def one(y0, t1, own, steepness):
            def fn(t, y, args):
                w, own = args
                room = own**2 - y**2
                return w * jnp.log(y**2 - 1) * jnp.sqrt(t + 0.5) * room**steepness

            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: 0.1 * jnp.mean(args[0]) * y),
                dr.ALF4(),
                *(0.0, t1, jnp.sign(t1) * 0.25, y0, (w, own)),
                saveat=dfx.SaveAt(ts=t1 * SOME_TS, fn=fn),
                adjoint=adjoint,
                max_steps=16,
            )
            return jnp.sum(sol.ys)

        return jnp.sum(jax.vmap(one)(jnp.array(y0s), jnp.array(ends), own, steepness))

    default = dfx.RecursiveCheckpointAdjoint(checkpoints=16)
    got, want = (
        jax.jit(jax.grad(ft.partial(loss, adjoint=adjoint)))((jnp.ones(1100), own))
        for adjoint in (dr.ReversibleAdjoint(), default)
    )
    for ours, theirs in zip(got, want, strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize(
    "saveat",
    cases((dict(t1=True),), more=(dict(ts=jnp.array([0.4, 1.0])), dict(steps=True))),
)
def test_fn_that_returns_a_constant(saveat):
    """JAX keeps a scalar constant as a number, not as an array."""

    def loss(w):
        fn = lambda t, y, args: dict(state=w * y, count=jnp.array(3.0))
        term = dfx.ODETerm(lambda t, y, args: -w * y)
        saveat_ = dfx.SaveAt(**saveat, fn=fn)
        step = 0.0, 1.0, 0.25, jnp.ones(2)
        adjoint = dr.ReversibleAdjoint()
        sol = dfx.diffeqsolve(
            term, dr.ALF4(), *step, saveat=saveat_, adjoint=adjoint, max_steps=4
        )
        return sum(jnp.sum(leaf[-1]) for leaf in jax.tree.leaves(sol.ys))

    np.testing.assert_allclose(jax.grad(loss)(1.0), 0, atol=1e-3)
    np.testing.assert_allclose(jax.grad(loss)(0.5), np.exp(-0.5), rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("case", SOME)
def test_subs(case):
    saveat = dfx.SaveAt(
        subs={
            "ts": dfx.SubSaveAt(ts=TS[1:4]),
            "fn": [dfx.SubSaveAt(ts=TS[3:], fn=scaled), dfx.SubSaveAt(steps=2)],
            "ends": dfx.SubSaveAt(t0=True, t1=True, fn=scaled),
            "unused": dfx.SubSaveAt(t0=True, ts=TS, steps=3),
        }
    )
    assert_same(
        saveat,
        case,
        lambda sol: sum_of_squares({k: v for k, v in sol.ys.items() if k != "unused"}),
    )


@pytest.mark.long
@pytest.mark.parametrize("case", cases((ALF4,), slow=(ALF6, *FAMILIES.values())))
def test_dense(case):
    def read(sol):
        ts = jnp.array([0.0, 0.4, 1.7, 3.0])
        values, slopes = jax.vmap(sol.evaluate)(ts), jax.vmap(sol.derivative)(ts)
        slopes = jax.tree.map(lambda s: s[1:], slopes)
        return sum(map(sum_of_squares, (values, slopes, sol.ys, sol.solver_state)))

    assert_same(dfx.SaveAt(dense=True, ts=TS, solver_state=True), case, read)


@pytest.mark.long
def test_solver_state():
    def read(sol):
        return sum_of_squares(sol.ys) + jnp.sum(sol.solver_state.v**3)

    saveat = dfx.SaveAt(ts=TS, solver_state=True, controller_state=True, made_jump=True)
    assert_same(saveat, ALF4, read)


@pytest.mark.slow
def test_dense_only():
    read = lambda sol: jnp.sum(sol.evaluate(1.3) ** 2)
    assert_same(dfx.SaveAt(dense=True), ALF4, read)
