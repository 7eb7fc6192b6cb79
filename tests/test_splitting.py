"""Splitting methods: order conditions, convergence, evaluations, exact inverses, energy."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._coefficients.rooted_trees import density, rooted_trees
from diffrax_reversible._coefficients.splitting import (
    blanes_moan4,
    blanes_moan4_nystrom,
    blanes_moan6,
    blanes_moan6_nystrom,
    kahan_li8,
    stormer_verlet,
)
from diffrax_reversible._coefficients.splitting_tableau import SplittingTableau

from .counter import Counter
from .problems import as_terms, cases, NYSTROM, SPLITTINGS


# Tableaus and their numbers of stages.
TABLEAUS = {
    "StormerVerlet": (stormer_verlet, 1),
    "BlanesMoan4": (blanes_moan4, 6),
    "BlanesMoan4, nystrom": (blanes_moan4_nystrom, 6),
    "BlanesMoan6": (blanes_moan6, 10),
    "BlanesMoan6, nystrom": (blanes_moan6_nystrom, 11),
    "KahanLi8": (kahan_li8, 17),
}


def partitioned(tableau):
    """The method as a partitioned Runge–Kutta method, by a step on unit vectors: `q` where
    the force is evaluated and `p` at the end, then `p` where the drift is evaluated and `q`
    at the end."""
    m = tableau.stages
    forces, drifts = np.eye(m + 1), np.eye(m)
    q, p = np.zeros(m), tableau.kicks[0] * forces[0]
    qs, ps = [q], []
    for i in range(m):
        ps.append(p)
        q = q + tableau.drifts[i] * drifts[i]
        qs.append(q)
        p = p + tableau.kicks[i + 1] * forces[i + 1]
    return (np.stack(qs), p), (np.stack(ps), q)


def weight(tree, matrix, other):
    out = np.ones(len(matrix))
    for child in tree:
        out = out * (matrix @ weight(child, other, matrix))
    return out


def bushy_drift(tree, is_drift):
    """Whether a vertex that stands for the drift has several branches."""
    if is_drift and len(tree) > 1:
        return True
    return any(bushy_drift(child, not is_drift) for child in tree)


def residuals(tableau, order):
    (qs, p), (ps, q) = partitioned(tableau)
    for tree in rooted_trees(order):
        if not (tableau.nystrom and bushy_drift(tree, False)):
            yield abs(p @ weight(tree, qs, ps) - 1 / density(tree))
        if not (tableau.nystrom and bushy_drift(tree, True)):
            yield abs(q @ weight(tree, ps, qs) - 1 / density(tree))


@pytest.mark.parametrize("tableau, stages", TABLEAUS.values(), ids=TABLEAUS)
def test_order_conditions(tableau, stages):
    assert tableau.stages == stages
    assert (
        max(r for n in range(1, tableau.order + 1) for r in residuals(tableau, n)) < 1e-12
    )
    # The method is not of the next order by chance.
    assert max(residuals(tableau, tableau.order + 1)) > 1e-6


@pytest.mark.parametrize("name", TABLEAUS)
def test_error_estimate(name):
    """The error estimates have the order claimed, and no higher one."""
    tableau, _ = TABLEAUS[name]
    (qs, _), (ps, _) = partitioned(tableau)
    # The drift is evaluated at the start too, before any kick.
    ps = np.concatenate([np.zeros((1, ps.shape[1])), ps])
    qs = np.concatenate([np.zeros((len(qs), 1)), qs], axis=1)
    for weights, matrices, is_drift in (
        (tableau.kick_error_weights, (qs, ps), False),
        (tableau.drift_error_weights, (ps, qs), True),
    ):
        sizes = []
        for order in range(1, tableau.embedded_order + 2):
            trees = [
                tree
                for tree in rooted_trees(order)
                if not (tableau.nystrom and bushy_drift(tree, is_drift))
            ]
            sizes.append(max(abs(weights @ weight(tree, *matrices)) for tree in trees))
        assert max(sizes[:-1]) < 1e-11
        assert sizes[-1] > 1e-6


@pytest.mark.parametrize(
    "kicks, drifts, kwargs, message",
    (
        ((0.5, 0.5), (0.5, 0.5), dict(order=2), "one kick more"),
        ((0.5, 0.6), (1.0,), dict(order=2), "kicks=.* sums to 1"),
        ((0.4, 0.6), (1.0,), dict(order=2), "kicks=.* palindrome"),
        ((0.5, 0.0, 0.5), (0.4, 0.6), dict(order=2), "drifts=.* palindrome"),
        ((0.5, 0.5), (1.0,), dict(order=4), "order condition of order 3, by"),
        (
            blanes_moan6_nystrom.kicks,
            blanes_moan6_nystrom.drifts,
            dict(order=6),
            "order condition of order 5, by",
        ),
        ((0.5, 0.5), (1.0,), dict(order=2, embedded_order=2), "no error estimate"),
        (
            (0.5, 0.5),
            (1.0,),
            dict(order=2, error_weights=((-1.0, 1.0), (-1.0, 1.1))),
            "violates a condition of order 1, by 1.0e-01",
        ),
    ),
    ids=(
        *("numbers of kicks and drifts", "sum of kicks"),
        *("kicks not symmetric", "drifts not symmetric"),
        *("order", "order, nystrom", "embedded order", "error weights"),
    ),
)
def test_refused_coefficients(kicks, drifts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SplittingTableau(kicks, drifts, **dict(embedded_order=1) | kwargs)


# These fields depend on time, and none is a gradient.
def nonlinear(t, p, args):
    a, b = p
    return jnp.stack([b + 0.3 * a * b * jnp.cos(t), jnp.sin(a) - 0.2 * b * jnp.sin(2 * t)])


def affine(t, p, args):
    a, b = p
    return jnp.stack([a + 0.3 * b + 0.2 * t, b - 0.4 * a])


def force(t, q, args):
    a, b = q
    return jnp.stack([-jnp.sin(a) + 0.4 * a * b * jnp.cos(t), -b + 0.3 * jnp.sin(a) * t])


Q0, P0 = jnp.array([0.7, -0.4]), jnp.array([0.3, 0.5])
STEPS = {2: 128, 4: 24, 6: 12, 8: 9}
TS = jnp.linspace(0.0, 3.0, 97)[1:-1]


@eqx.filter_jit
def solve(solver, drift, dt0, saveat, t0=0.0, t1=3.0):
    terms = as_terms((drift, force))
    return dfx.diffeqsolve(
        terms, solver, t0, t1, dt0, (Q0, P0), saveat=saveat, max_steps=4096
    )


@functools.cache
def precise(drift, backwards):
    """The ends of a solve, times between the steps, and there the solution and its slope;
    the last solution is that of the end."""
    t0, t1 = (3.0, 0.0) if backwards else (0.0, 3.0)
    ts = TS[::-1] if backwards else TS

    def joined(t, y, args):
        return jnp.concatenate([drift(t, y[2:], args), force(t, y[:2], args)])

    exact = dfx.diffeqsolve(
        dfx.ODETerm(joined),
        dfx.Dopri8(),
        t0,
        t1,
        None,
        jnp.concatenate([Q0, P0]),
        saveat=dfx.SaveAt(ts=ts, t1=True),
        stepsize_controller=dfx.StepTo(jnp.linspace(t0, t1, 97 * 8 - 7)),
        max_steps=4096,
    ).ys
    slope = jax.vmap(joined, in_axes=(0, 0, None))(ts, exact[:-1], None)
    return (t0, t1), ts, exact, slope


@pytest.mark.parametrize(
    # `more` multiplies the number of steps, where the error is larger.
    "solver, drift, backwards, more",
    cases(
        ((SPLITTINGS[1], nonlinear, False, 2), (NYSTROM[1], affine, True, 1)),
        more=(
            *((SPLITTINGS[i], nonlinear, False, 2) for i in (0, 2, 3)),
            (NYSTROM[0], affine, True, 1),
        ),
        slow=[(solver, affine, True, 1) for solver in SPLITTINGS],
    ),
    ids=lambda x: x.__name__ if callable(x) and hasattr(x, "__name__") else repr(x),
)
def test_order(solver, drift, backwards, more):
    """The order is reached at the end of a solve and between steps; the derivative of the
    interpolation has one order less."""
    (t0, t1), ts, exact, slope = precise(drift, backwards)

    def errors(n):
        saveat = dfx.SaveAt(t1=True, dense=True)
        sol = solve(solver, drift, jnp.array((t1 - t0) / n), saveat, t0, t1)
        end = jnp.concatenate(sol.ys, axis=-1)[-1]
        between = jnp.concatenate(jax.vmap(sol.evaluate)(ts), axis=-1)
        derivative = jnp.concatenate(jax.vmap(sol.derivative)(ts), axis=-1)
        pairs = (end, exact[-1]), (between, exact[:-1]), (derivative, slope)
        return np.array([np.max(np.abs(x - y)) for x, y in pairs])

    order = solver.order(None)
    steps = more * STEPS[order]
    coarse, fine = errors(steps), errors(2 * steps)
    assert np.min(fine) > 1e-13, "below the rounding floor; slopes mean nothing"
    slopes = np.log2(coarse / fine)
    assert np.all(slopes > [order - 0.4, order - 0.4, order - 1.4]), slopes
    assert slopes[0] < order + 0.8, slopes


@pytest.mark.parametrize(
    "solver, stages",
    cases(((SPLITTINGS[1], 6),), more=((SPLITTINGS[0], 1), (SPLITTINGS[3], 17))),
)
@pytest.mark.parametrize("adaptive", cases((True,), slow=(False,)))
def test_evaluations(solver, stages, adaptive):
    """The force is evaluated once per stage and once at the start. So is the drift, without
    the start; an error estimate takes one evaluation more per step."""
    drift, force = Counter(), Counter()

    def final(y0, scale):
        sol = dfx.diffeqsolve(
            as_terms((drift, force)),
            solver,
            0.0,
            3.0,
            jnp.array(0.5),
            y0,
            scale,
            adjoint=dr.ReversibleAdjoint(),
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3)
            if adaptive
            else dfx.ConstantStepSize(),
        )
        return sum(jnp.sum(y) for y in sol.ys), sol.stats["num_steps"]

    y0, scale = (Q0, P0), jnp.array(0.3)
    forces, (_, steps) = force.during(jax.jit(final), y0, scale)
    drifts, _ = drift.during(jax.jit(final), y0, scale)
    assert forces == stages * steps + 1
    assert drifts == (stages + adaptive) * steps
    gradient = jax.jit(jax.value_and_grad(final, argnums=(0, 1), has_aux=True))
    both, _ = force.during(gradient, y0, scale)
    # The backward pass takes as many, and one at the start of each step.
    assert forces < both <= forces + (stages + 1) * steps + 1


@pytest.mark.optimised
@pytest.mark.parametrize(
    "solver", cases(SPLITTINGS[1:2], slow=(SPLITTINGS[0], *SPLITTINGS[2:])), ids=repr
)
def test_bitwise(solver):
    """Every state is reconstructed to the last bit, with adaptive steps."""
    solver = type(solver)(bitwise=True)

    @jax.jit
    def gradient(y0, w):
        def final(y0, w):
            sol = dfx.diffeqsolve(
                as_terms((lambda t, p, w: jnp.sin(p) * w, lambda t, q, w: -(q**3) * w)),
                solver,
                0.0,
                30.0,
                jnp.array(0.05),
                y0,
                w,
                adjoint=dr.ReversibleAdjoint(drift_tol=0.0),
                stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
            )
            return jnp.sum(sol.ys[0] ** 2)

        return jax.grad(final, argnums=(0, 1))(y0, w)

    # With `drift_tol=0.0` any deviation is an error.
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient((Q0, P0), 0.9)))


def henon_heiles(q):
    x, y = q
    return (x**2 + y**2) / 2 + x**2 * y - y**3 / 3


@pytest.mark.parametrize(
    "solver, dt, size",
    (
        (SPLITTINGS[0], 0.05, 1e-3),
        (NYSTROM[0], 0.5, 1e-5),
        (NYSTROM[1], 0.8, 1e-6),
        (SPLITTINGS[3], 1.0, 1e-4),
    ),
)
def test_energy(solver, dt, size):
    """The error of the energy does not grow over a hundred thousand steps."""
    steps = 100_000

    @jax.jit
    def energies():
        y0 = (jnp.array([0.0, 0.1]), jnp.array([0.35, 0.2]))
        sol = dfx.diffeqsolve(
            as_terms((lambda t, p, _: p, lambda t, q, _: -jax.grad(henon_heiles)(q))),
            solver,
            0.0,
            steps * dt,
            dt,
            y0,
            saveat=dfx.SaveAt(t0=True, steps=100),
            max_steps=steps + 1,
        )
        qs, ps = sol.ys
        return jnp.sum(ps**2, axis=1) / 2 + jax.vmap(henon_heiles)(qs)

    written = np.asarray(energies())
    energy = written[np.isfinite(written)]
    assert len(energy) > steps / 100
    error = np.abs(energy / energy[0] - 1)
    tenth = len(error) // 10
    assert size / 10 < np.max(error[:tenth]) < size
    assert np.max(error[-tenth:]) < 1.5 * np.max(error[:tenth])


def refused(y0, terms, solver=None):
    solver = dr.BlanesMoan4() if solver is None else solver
    with pytest.raises(ValueError) as e:
        dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, y0)
    return str(e.value)


@pytest.mark.parametrize("solver", NYSTROM, ids=repr)
def test_only_affine_drifts(solver):
    """`nystrom=True` refuses drifts that cannot be seen to be affine."""
    force = lambda t, q, _: -q
    for exponent in (2.0, 3):
        drift = lambda t, p, _, n=exponent: jax.grad(lambda p: jnp.sum(p**n) / n)(p)
        message = refused((Q0, P0), as_terms((drift, force)), solver)
        assert (
            f"`diffeqsolve(..., solver={type(solver).__name__}(nystrom=True))`" in message
        )
        assert "affine" in message and f"use `{type(solver).__name__}()`" in message


def test_drift_by_a_callback():
    """It cannot be seen to be affine."""
    drift = lambda t, p, _: jax.pure_callback(np.negative, p, p)
    message = refused((Q0, P0), as_terms((drift, lambda t, q, _: -q)), NYSTROM[0])
    assert "affine" in message


@pytest.mark.parametrize("solver", NYSTROM, ids=repr)
def test_errors_are_smaller(solver):
    """For affine drifts, the special coefficients at least halve the error of those for any
    drift, with as many evaluations of the force."""
    n = 60 if solver.order(None) == 4 else 20
    ends = [
        solve(solver, affine, jnp.array(3.0 / steps), dfx.SaveAt(t1=True)).ys
        for solver, steps in (
            (solver, n),
            (type(solver)(), n * solver.tableau.stages // type(solver)().tableau.stages),
            (dr.KahanLi8(), 10 * n),
        )
    ]
    special, general, exact = (np.concatenate(end, axis=-1)[-1] for end in ends)
    assert 2 * np.max(np.abs(special - exact)) < np.max(np.abs(general - exact))


@pytest.mark.parametrize(
    "solver",
    cases(SPLITTINGS[1:2], more=(SPLITTINGS[0], *SPLITTINGS[2:], NYSTROM[0])),
    ids=repr,
)
def test_how_the_drift_is_written(solver):
    """The way a drift is written does not change the method."""
    force = lambda t, q, _: -q
    squares = [lambda p: p * p, lambda p: p**2, lambda p: p**2.0]
    drifts = [lambda t, p, _: p]
    # Before JAX 0.7, the derivative of `p**2` cannot be seen to be affine.
    for square in squares[:1] if solver in NYSTROM else squares:
        drifts.append(lambda t, p, _, f=square: jax.grad(lambda p: jnp.sum(f(p)) / 2)(p))
    first, *others = (
        dfx.diffeqsolve(as_terms((drift, force)), solver, 0.0, 1.0, 0.1, (Q0, P0)).ys[0]
        for drift in drifts
    )
    for end in others:
        np.testing.assert_allclose(end, first, rtol=1e-14)


def test_refusals():
    pair = as_terms((lambda t, p, _: p, lambda t, q, _: -q))
    message = refused((jnp.zeros(3), P0), pair)
    assert "`term_q`" in message and "shapes of `q`" in message
    path = dfx.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(), key=jax.random.key(0))
    noise = dfx.ControlTerm(lambda t, q, args: q, path)
    assert "`ControlTerm`" in refused((Q0, P0), (pair[0], noise))


# Steps of `KahanLi8` are stable up to 3.1. At 3.98 its estimate vanishes in one direction.
@pytest.mark.parametrize(
    "solver, limit",
    ((SPLITTINGS[0], 15), (NYSTROM[0], 15), (NYSTROM[1], 15), (SPLITTINGS[3], 3.9)),
)
def test_error_estimate_of_an_oscillator(solver, limit):
    """On `q' = p`, `p' = -q`, the estimate is at least a quarter of the error of a step
    wherever that exceeds 1e-3 and a hundredth of the error in the worst direction."""
    terms = (dfx.ODETerm(lambda t, p, args: p), dfx.ODETerm(lambda t, q, args: -q))

    @jax.jit
    @jax.vmap
    def step(h):
        def column(y0):
            y0 = tuple(y0)
            state = solver.init(terms, 0.0, h, y0, None)
            y1, error, *_ = solver.step(terms, 0.0, h, y0, None, state, made_jump=False)
            return jnp.stack(y1), jnp.stack(error)

        return jax.vmap(column, out_axes=1)(jnp.eye(2))

    h = jnp.linspace(0.05, limit, 1500)
    solution, estimate = step(h)
    cos, sin = jnp.cos(h), jnp.sin(h)
    exact = jnp.stack([jnp.stack([cos, sin], 1), jnp.stack([-sin, cos], 1)], 1)
    angles = jnp.linspace(0, np.pi, 361)
    starts = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    error, size = (
        jnp.linalg.norm(matrix @ starts, axis=1) for matrix in (solution - exact, estimate)
    )
    large = (error > 1e-3) & (error > 1e-2 * jnp.max(error, axis=1, keepdims=True))
    assert jnp.sum(large) > 1000
    assert jnp.min(jnp.where(large, size / error, jnp.inf)) > 1 / 4


@pytest.mark.parametrize("solver", cases((dr.BlanesMoan6(),), more=(dr.KahanLi8(),)))
def test_force_without_forward_mode(solver):
    """Only interpolation needs it."""
    fn = jax.custom_vjp(jnp.tanh)
    fn.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda tanh, bar: (bar * (1 - tanh**2),))

    def loss(q0, fn, saveat=None):
        drift, kick = lambda t, p, args: p, lambda t, q, args: -fn(q)
        terms = dfx.ODETerm(drift), dfx.ODETerm(kick)
        adjoint = dr.ReversibleAdjoint()
        solve = terms, solver, 0.0, 1.0, 0.1, (q0, q0)
        sol = dfx.diffeqsolve(*solve, saveat=saveat or dfx.SaveAt(t1=True), adjoint=adjoint)
        return jnp.sum(sol.ys[0] ** 2)

    of = lambda fn: jax.jit(jax.value_and_grad(lambda q0: loss(q0, fn)))(jnp.array(0.7))
    np.testing.assert_allclose(of(fn), of(jnp.tanh), rtol=1e-12)
    between = lambda fn: jax.jit(lambda q0: loss(q0, fn, dfx.SaveAt(ts=[0.25, 0.75])))
    with pytest.raises(Exception, match="`jax.custom_jvp`"):
        jax.block_until_ready(between(fn)(jnp.array(0.7)))
    remedied = jax.custom_jvp(fn)
    remedied.defjvp(lambda xs, dots: (remedied(*xs), (1 - jnp.tanh(*xs) ** 2) * dots[0]))
    got, want = (between(fn)(jnp.array(0.7)) for fn in (remedied, jnp.tanh))
    np.testing.assert_allclose(got, want, rtol=1e-12)
