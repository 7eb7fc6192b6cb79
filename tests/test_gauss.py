"""Gauss methods: order, invariants, stability, gradients and cost."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr
from diffrax_reversible._coefficients.gauss import gauss
from diffrax_reversible._solver.affine import is_affine

from .counter import Counter
from .problems import cases, relative_error


SOLVERS = dr.ImplicitMidpoint(), dr.Gauss4(), dr.Gauss6()
every_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=lambda solver: type(solver).__name__
)
one_solver = pytest.mark.parametrize(
    "solver",
    cases((dr.Gauss4(),), more=(dr.ImplicitMidpoint(), dr.Gauss6())),
    ids=lambda solver: type(solver).__name__,
)
Y0 = jnp.array([0.7, -0.4])


def field(t, y, args):
    """Neither autonomous nor Hamiltonian."""
    a, b = y
    return jnp.stack([b + args * a * b * jnp.cos(t), jnp.sin(a) - 0.5 * b])


def spring(t, y, frequency):
    """A pendulum on a stiff spring."""
    q, p = y
    r = jnp.linalg.norm(q)
    return p, -(frequency**2) * (1 - 1 / r) * q - jnp.array([0.0, 1.0], q.dtype)


HANGING = jnp.array([1.0, 0.0]), jnp.zeros(2)


@pytest.mark.parametrize("stages", (1, 2, 3))
def test_simplifying_assumptions(stages):
    """`B(2s)`, `C(s)` and `D(s)` hold, with symmetry and conserved quadratic invariants."""
    c, a, b, basis = gauss(stages)
    for q in range(1, 2 * stages + 1):
        assert abs(b @ c ** (q - 1) - 1 / q) < 1e-15
    for q in range(1, stages + 1):
        assert np.max(np.abs(a @ c ** (q - 1) - c**q / q)) < 1e-15
        d = (b * c ** (q - 1)) @ a - b * (1 - c**q) / q
        assert np.max(np.abs(d)) < 1e-15
    assert np.max(np.abs(a + a[::-1, ::-1] - b)) < 1e-15
    products = b[:, None] * a
    assert np.max(np.abs(products + products.T - np.outer(b, b))) < 1e-16
    assert np.sum(b) == 1
    powers = np.vander(c, stages, increasing=True)
    assert np.max(np.abs(basis @ powers.T - np.eye(stages))) < 1e-14


@one_solver
def test_order(solver):
    """With `s` stages, the order is `2 s` at the end and `s + 1` between the steps."""
    args, ts = jnp.array(0.3), jnp.linspace(0.0, 3.0, 101)
    term = dfx.ODETerm(field)
    exact = dfx.diffeqsolve(
        term,
        dfx.Dopri8(),
        *(0.0, 3.0, None, Y0, args),
        saveat=dfx.SaveAt(ts=ts),
        stepsize_controller=dfx.StepTo(jnp.linspace(0.0, 3.0, 801)),
    ).ys

    @jax.jit
    def solve(dt0):
        saveat = dfx.SaveAt(ts=ts)
        return dfx.diffeqsolve(term, solver, 0.0, 3.0, dt0, Y0, args, saveat=saveat).ys

    def errors(n):
        off = np.max(np.abs(solve(jnp.array(3.0 / n)) - exact), axis=1)
        return np.array([off[-1], np.max(off)])

    end, between = np.log2(errors(8) / errors(16))
    order = solver.order(term)
    assert order == 2 * solver.tableau.stages
    assert end > order - 0.3
    # With one stage, linear interpolation is as accurate as the ends.
    assert between > solver.tableau.stages + 1 - 0.3


@one_solver
def test_quadratic_invariants(solver):
    """A top keeps its energy and angular momentum over 100,000 steps."""
    inertia = jnp.array([1.0, 2.0, 3.5])

    def top(t, y, args):
        return jnp.cross(y, y / inertia)

    y0 = jnp.array([0.6, 0.7, 0.4])
    invariants = lambda y: np.array([y @ y, y @ (y / inertia)])
    end = dfx.diffeqsolve(
        dfx.ODETerm(top), solver, 0.0, 10_000.0, 0.1, y0, max_steps=None
    ).ys[0]
    assert np.max(np.abs(end - y0)) > 1e-2
    assert np.max(np.abs(invariants(end) / invariants(y0) - 1)) < 1e-12


@pytest.mark.parametrize("dtype", (jnp.float64, jnp.float32))
@one_solver
def test_stability(solver, dtype):
    """Oscillations of any frequency, which depends on the amplitude, keep their amplitude,
    and undoing them returns to the start."""

    def rotation(t, y, w):
        return w * (0.99 + 0.01 * jnp.sum(y**2)) * jnp.stack([y[1], -y[0]])

    @eqx.filter_jit
    def there_and_back(w):
        terms, one = dfx.ODETerm(rotation), jnp.ones((), dtype)
        y0 = jnp.array([1.0, 0.0], dtype)
        state = solver.init(terms, 0 * one, one, y0, w)

        def step(carry, _):
            y, state = carry
            y, y_error, _, state, result = solver.step(
                terms, 0 * one, one, y, w, state, False
            )
            return (y, state), (jnp.max(jnp.abs(y_error)), result == dfx.RESULTS.successful)

        def undo(carry, _):
            y, state = carry
            return solver.backward_step(terms, 0 * one, one, y, w, state), None

        carry, (errors, found) = jax.lax.scan(step, (y0, state), None, length=50)
        (back, _), _ = jax.lax.scan(undo, carry, None, length=50)
        return carry[0], back - y0, errors, found

    eps = float(jnp.finfo(dtype).eps)
    for w in 10.0 ** np.arange(-3, 7):
        y, off, errors, found = there_and_back(jnp.array(w, dtype))
        assert np.all(found)
        assert abs(np.linalg.norm(y) - 1) < 400 * eps
        assert np.max(np.abs(off)) < 1000 * eps
        # The error estimate is bounded, by the amplitude, however stiff the equation is.
        assert np.max(errors) < 1


def loss(parameters, solver, adjoint, max_steps=64):
    y0, args, t1, ts = parameters
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, _: field(t, y, args)),
        solver,
        0.0,
        t1,
        0.1,
        y0,
        saveat=dfx.SaveAt(ts=ts, t1=True),
        adjoint=adjoint,
        # The last step is never rejected. Diffrax halves the rest of the solve after that,
        # and its gradient with respect to `t1` moves that time, too.
        stepsize_controller=dfx.PIDController(rtol=2e-6, atol=2e-6),
        max_steps=max_steps,
    )
    return jnp.sum(sol.ys**2), sol.stats


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    cases((dr.ImplicitMidpoint(),), slow=(dr.Gauss4(), dr.Gauss6())),
    ids=str,
)
@pytest.mark.parametrize("with_times", cases((False,), slow=(True,)))
def test_gradient(solver, with_times):
    """Gradients equal the default adjoint's in a batch whose members take different steps,
    also for a value that the vector field closes over."""
    rest = jnp.array(2.0), jnp.array([0.4, 1.3])
    parameters = (Y0, jnp.array(0.3), *(rest if with_times else ()))

    @eqx.filter_jit
    def gradient(adjoint):
        def of(size, parameters):
            y0, *others = (*parameters, *rest[len(parameters) - 2 :])
            return loss((size * y0, *others), solver, adjoint)

        grad = jax.grad(of, argnums=1, has_aux=True)
        return jax.vmap(grad, in_axes=(0, None))(jnp.array([1.0, 0.1]), parameters)

    ours, stats = gradient(dr.ReversibleAdjoint())
    default, _ = gradient(dfx.RecursiveCheckpointAdjoint(checkpoints=64))
    assert relative_error(ours, default) < 1e-10
    assert np.all(stats["num_root_find_steps"] >= 2 * stats["num_accepted_steps"])


@pytest.mark.slow
def test_gradient_of_a_stiff_spring():
    """Gradients equal the default adjoint's in steps that do not resolve oscillations. The
    tolerance is for positions, of which these are a tiny part."""

    def stretched(frequency, adjoint=None):
        norm = lambda error: optx.rms_norm(error[0])
        sol = dfx.diffeqsolve(
            dfx.ODETerm(spring),
            dr.Gauss4(),
            *(0.0, 3.0, 0.1, HANGING, frequency),
            adjoint=dr.ReversibleAdjoint() if adjoint is None else adjoint,
            stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-4, norm=norm),
        )
        return sol.ys[0][0, 0], sol.stats

    frequency = jnp.array(1e3)
    gradient = eqx.filter_jit(jax.grad(stretched, has_aux=True))
    grad, stats = gradient(frequency)
    # A step is several periods long.
    assert stats["num_steps"] < 200
    default, _ = gradient(frequency, dfx.RecursiveCheckpointAdjoint())
    assert abs(grad - default) < 1e-6 * abs(default)


@pytest.mark.slow
def test_stiffness_in_single_precision():
    """Stiffness multiplies rounding errors of the stage equations, which are no reason to
    reject a step or to refuse a gradient."""

    @ft.partial(jax.jit, static_argnums=1)
    def stretched(frequency, adjoint):
        def final(frequency):
            dtype = frequency.dtype
            sol = dfx.diffeqsolve(
                dfx.ODETerm(spring),
                dr.Gauss6(),
                *(jnp.asarray(t, dtype) for t in (0.0, 2.0, 0.1)),
                tuple(x.astype(dtype) for x in HANGING),
                frequency,
                adjoint=adjoint,
                stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-3),
            )
            return sol.ys[0][0, 0], sol.stats["num_steps"]

        return jax.grad(final, has_aux=True)(frequency)

    single, double = jnp.asarray(100, jnp.float32), jnp.asarray(100, jnp.float64)
    ours, steps = stretched(single, dr.ReversibleAdjoint())
    default, _ = stretched(single, dfx.RecursiveCheckpointAdjoint())
    _, steps_in_double = stretched(double, dr.ReversibleAdjoint())
    assert abs(steps - steps_in_double) <= 2
    assert relative_error(ours, default) < 1e-2


@one_solver
def test_entry_that_does_not_follow_from_larger_ones(solver):
    """A small entry is solved as accurately beside a large one of its array as alone, in
    single precision."""
    single = jnp.float32

    @jax.jit
    @jax.value_and_grad
    def logistic(rate, large):
        def field(t, y, args):
            return jnp.stack([-0.1 * y[0] * jnp.cos(t), rate * y[1] * (1 - y[1])])

        y0 = jnp.stack([large, jnp.asarray(1e-3, single)])
        times = (jnp.asarray(t, single) for t in (0, 0.25, 0.0625))
        adjoint = dr.ReversibleAdjoint()
        sol = dfx.diffeqsolve(dfx.ODETerm(field), solver, *times, y0, adjoint=adjoint)
        return sol.ys[0, 1]

    rate = jnp.asarray(30, single)
    beside, alone = (logistic(rate, jnp.asarray(x, single)) for x in (1e6, 1))
    assert relative_error(beside, alone) < 1e-5


@pytest.mark.slow
def test_dissipation():
    """Dissipation cannot be undone over many steps, so known states are close together."""

    @eqx.filter_jit
    def gradient(rate, adjoint):
        def final(y0, rate):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: -rate * (y - jnp.cos(t))),
                dr.Gauss4(),
                *(0.0, 3.0, 0.05, y0),
                adjoint=adjoint,
                max_steps=64,
            )
            return jnp.sum(sol.ys**2)

        return jax.grad(final, argnums=(0, 1))(Y0, rate)

    for rate in jnp.array([1.0, 30.0, 1e3, 1e5]):
        ours = gradient(rate, dr.ReversibleAdjoint())
        default = gradient(rate, dfx.RecursiveCheckpointAdjoint())
        assert relative_error(ours, default) < 1e-6


@pytest.mark.more
def test_member_of_a_batch_without_steps():
    """The cotangent of its interpolation is NaN, and must not reach a linear solve."""

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(None, 0))
    @jax.grad
    def slope(y0, t1):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -jax.nn.relu(y)),
            dr.Gauss4(),
            *(0.0, t1, 0.1, y0),
            saveat=dfx.SaveAt(dense=True),
            adjoint=dr.ReversibleAdjoint(),
            max_steps=16,
        )
        return sol.evaluate(t1 / 2)

    got = slope(1.0, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(got, [1.0, np.exp(-0.5)], rtol=1e-4)


@one_solver
@pytest.mark.parametrize("unit", (1e-6, 1e6))
def test_units_of_a_state_that_starts_at_zero(solver, unit):
    """A pendulum that is pushed from rest swings alike in all units, in single precision:
    when the first step is solved, the size of an array of zeros is not known."""
    single = jnp.float32

    @jax.jit
    @jax.value_and_grad
    def swing(push, unit):
        def field(t, y, args):
            return y["p"], -4 * unit * jnp.sin(y["q"] / unit)

        named = lambda t, y, args: dict(zip("qp", field(t, y, args), strict=True))
        y0 = dict(q=jnp.zeros(1, single), p=push * unit * jnp.ones(1, single))
        times = (jnp.asarray(t, single) for t in (0, 2, 0.1))
        adjoint = dr.ReversibleAdjoint()
        sol = dfx.diffeqsolve(dfx.ODETerm(named), solver, *times, y0, adjoint=adjoint)
        return sol.ys["q"][0, 0] / unit

    push, one = jnp.asarray(2, single), jnp.asarray(1, single)
    ours, expected = swing(push, jnp.asarray(unit, single)), swing(push, one)
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.optimised
def test_memory():
    """Memory is less than the default adjoint's, and does not grow with the steps."""

    def bytes_of(adjoint, max_steps):
        def final(y0):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, args: jnp.roll(jnp.sin(y), 1)),
                dr.Gauss4(linear_solver=lx.GMRES(rtol=1e-12, atol=1e-12)),
                *(0.0, 1.0, 0.1, y0),
                adjoint=adjoint,
                max_steps=max_steps,
            )
            return jnp.sum(sol.ys)

        compiled = jax.jit(jax.grad(final)).lower(jnp.ones(4096)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = bytes_of(dr.ReversibleAdjoint(), 4096)
    assert bytes_of(dr.ReversibleAdjoint(), 10**6) < 1.05 * ours
    assert ours < 0.5 * bytes_of(dfx.RecursiveCheckpointAdjoint(), 4096)


class OwnLU(lx.AbstractLinearSolver):
    """LU decomposition, for subclasses to change."""

    lu: lx.LU = lx.LU()

    def init(self, operator, options):
        return self.lu.init(operator, options)

    def transpose(self, state, options):
        return self.lu.transpose(state, options)

    def conj(self, state, options):
        return self.lu.conj(state, options)

    def assume_full_rank(self):
        return True

    # For earlier versions of lineax.

    def allow_dependent_columns(self, operator):
        return False

    def allow_dependent_rows(self, operator):
        return False


class Solves(OwnLU):
    """LU decomposition that counts its solves."""

    counter: Counter = eqx.field(static=True, kw_only=True)

    def compute(self, state, vector, options):
        one = jax.pure_callback(
            self.counter._increment,
            jax.ShapeDtypeStruct((), float),
            (0.0, jax.lax.stop_gradient(jax.tree.leaves(vector)[0])),
            vmap_method="sequential",
        )
        vector = jax.tree.map(lambda x: one * x, vector)
        return self.lu.compute(state, vector, options)


@pytest.mark.long
@pytest.mark.parametrize("linear", cases((True,), slow=(False,)))
def test_linear_solves(linear):
    """A step takes one linear solve, one more for its pull-back, and one to undo it. Two
    measure the error at the start. Linear equations take one iteration per step."""
    counter = Counter()
    newton = optx.Newton(rtol=1e-6, atol=1e-6)
    solver = dr.Gauss4(linear_solver=Solves(counter=counter), root_finder=newton)
    steps = 10

    def final(y0):
        force = lambda q: -q if linear else -q * q
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.stack([y[1], force(y[0])])),
            solver,
            *(0.0, 1.0, 0.1, y0),
            adjoint=dr.ReversibleAdjoint(checkpoints=0),
        )
        return jnp.sum(sol.ys), sol.stats

    forward, (_, stats) = counter.during(jax.jit(final), Y0)
    # Besides those of the root finder, which has its own linear solver.
    assert forward == steps
    both, _ = counter.during(jax.jit(jax.grad(final, has_aux=True)), Y0)
    assert both - forward == 2 * steps + 2
    if linear:
        assert stats["num_root_find_steps"] == steps


@pytest.mark.slow
def test_matrix_free():
    """With GMRES, the gradient is right on a wave that crosses many cells per step."""
    n = 256
    x = jnp.linspace(0, 2 * jnp.pi, n, endpoint=False)
    y0 = jnp.sin(3 * x) + 0.3 * jnp.cos(x), jnp.zeros(n)

    def wave(t, y, speed):
        u, v = y
        return v, speed * (n / 6) ** 2 * (jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1))

    def gradient(linear_solver, adjoint):
        solver = dr.ImplicitMidpoint(linear_solver=linear_solver)

        def final(speed):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(wave), solver, 0.0, 2.0, 0.1, y0, speed, adjoint=adjoint
            )
            return jnp.sum(sol.ys[0] ** 2)

        return jax.jit(jax.grad(final))(jnp.array(1.0))

    gmres = lx.GMRES(rtol=1e-12, atol=1e-12)
    ours = gradient(gmres, dr.ReversibleAdjoint())
    default = gradient(lx.LU(), dfx.RecursiveCheckpointAdjoint())
    assert abs(ours - default) < 1e-8 * abs(default)


def test_step_that_is_not_found():
    """An adaptive controller rejects an unsolved step; otherwise it is an error."""

    def blow_up(t, y, args):
        return y**2

    def solve(dt0, t1=0.9, **kwargs):
        term, y0 = dfx.ODETerm(blow_up), jnp.array([1.0])
        return dfx.diffeqsolve(term, dr.Gauss4(), 0.0, t1, dt0, y0, **kwargs)

    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)
    sol = solve(0.85, stepsize_controller=controller)
    assert sol.stats["num_rejected_steps"] > 0
    assert abs(sol.ys[0, 0] - 10) < 1e-3
    assert solve(5.0, 5.0, throw=False).result != dfx.RESULTS.successful


class GivesUp(OwnLU):
    """Gives up on vectors that are as large as only cotangents are."""

    def compute(self, state, vector, options):
        solution, _, stats = self.lu.compute(state, vector, options)
        size = jnp.max(jnp.abs(jax.tree.leaves(vector)[0]))
        given_up = lx.RESULTS.max_steps_reached
        result = lx.RESULTS.where(size > 1e9, given_up, lx.RESULTS.successful)
        return jax.tree.map(lambda x: 0.9 * x, solution), result, stats


@pytest.mark.slow
def test_linear_solve_that_is_given_up():
    """If only the pull-back is given up, it is an error, and its result is not used."""

    def final(y0, size):
        solver = dr.Gauss4(linear_solver=GivesUp(), root_finder=optx.Newton(1e-12, 1e-12))
        adjoint = dr.ReversibleAdjoint(drift_tol=float("inf"))
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(field), solver, 0.0, 1.0, 0.1, y0, jnp.array(0.3)),
            adjoint=adjoint,
        )
        return size * jnp.sum(sol.ys)

    gradient = eqx.filter_jit(jax.grad(final))
    assert np.all(np.isfinite(gradient(Y0, jnp.array(1.0))))
    with pytest.raises(RuntimeError, match="implicit step were not solved"):
        gradient(Y0, jnp.array(1e12))


def spiral(t, y, rate):
    return jnp.array([[-rate, 1.0], [-1.0, -rate]]) @ y


@pytest.mark.parametrize("field", (field, spiral))
@every_solver
def test_error_estimate(solver, field):
    """The error estimate is of order `s + 2`. `test_stability` shows that it is bounded."""
    terms, args, t = dfx.ODETerm(field), jnp.array(0.3), jnp.array(0.2)
    state = solver.init(terms, t, t, Y0, args)

    @jax.jit
    def error(h):
        _, y_error, *_ = solver.step(terms, t, t + h, Y0, args, state, False)
        return jnp.max(jnp.abs(y_error))

    slope = np.log2(error(jnp.array(0.1)) / error(jnp.array(0.05)))
    assert solver.error_order(terms) == solver.tableau.stages + 2
    assert abs(slope - solver.error_order(terms)) < 0.3


@every_solver
def test_error_of_a_linear_equation(solver):
    """The collocation polynomial has the same defect at both ends of a step there, and only
    its effect on the solution tells the error. The estimate is hardly smaller, and not much
    larger in large steps."""
    terms, args, t = dfx.ODETerm(spiral), jnp.array(0.3), jnp.array(0.0)
    state = solver.init(terms, t, t, Y0, args)
    for h in (0.2, 0.5, 1.0, 2.0):
        y, y_error, *_ = solver.step(terms, t, t + h, Y0, args, state, False)
        exact = jax.scipy.linalg.expm(h * spiral(t, jnp.eye(2), args)) @ Y0
        error, estimate = jnp.linalg.norm(y - exact), jnp.linalg.norm(y_error)
        most = 2 * max(1.0, 2 / h) ** (solver.tableau.stages - 1)
        assert 0.4 * error < estimate < most * error


@pytest.mark.more
@every_solver
def test_tolerances_of_a_linear_equation(solver):
    """Smaller tolerances give smaller errors."""
    terms, args = dfx.ODETerm(spiral), jnp.array(0.1)
    exact = jax.scipy.linalg.expm(5 * spiral(0.0, jnp.eye(2), args)) @ Y0
    errors = []
    for tol in (1e-4, 1e-6, 1e-8):
        pid = dfx.PIDController(rtol=tol, atol=tol)
        sol = dfx.diffeqsolve(
            *(terms, solver, 0.0, 5.0, None, Y0, args), stepsize_controller=pid
        )
        errors.append(jnp.linalg.norm(sol.ys[0] - exact))
    power = 2 * solver.tableau.stages / (solver.tableau.stages + 2)
    assert errors[1] < 2 * 0.01**power * errors[0]
    assert errors[2] < 2 * 0.01**power * errors[1]


def test_root_finder_of_ones_own():
    """Chords may replace Newton's method, if one Newton step then reaches rounding."""
    chord = optx.Chord(rtol=0.0, atol=1e-9)
    terms, args = dfx.ODETerm(field), jnp.array(0.3)
    ends = [
        dfx.diffeqsolve(terms, solver, 0.0, 3.0, 0.1, Y0, args).ys
        for solver in (dr.Gauss4(root_finder=chord), dr.Gauss4())
    ]
    assert relative_error(*ends) < 1e-14


A = jnp.array([[0.0, 1.0], [-1.0, 0.3]])


@pytest.mark.parametrize(
    "fn, affine",
    (
        (lambda y: A @ y, True),
        (jax.jit(lambda y: 2 * jnp.roll(y, 1) - A @ y + 1), True),
        (lambda y: jnp.where(Y0[0] < 1, A, -A) @ y + jnp.floor(Y0), True),
        (lambda y: y.at[0].add(1.0) + y[jnp.array([1, 1])], True),
        (lambda y: y * y, False),
        (jnp.abs, False),
        (jax.nn.relu, False),
        # Their derivative is zero, or is not that of the function.
        (jnp.floor, False),
        (lambda y: y.astype(int).astype(float), False),
        (jax.jit(lambda y: jnp.round(A @ y)), False),
        (lambda y: jnp.where(y > 0, 1.0, -1.0), False),
        (jax.lax.stop_gradient, False),
        (lambda y: jax.pure_callback(np.negative, y, y), False),
        (
            lambda y: jax.lax.scan(lambda c, _: (c + y, jnp.sign(c)), Y0, None, 2)[1][1],
            False,
        ),
    ),
    ids=(
        *("product", "jitted", "choice by a constant", "indexed", "square", "abs", "relu"),
        *("floor", "integers", "jitted rounding", "sign", "stop_gradient"),
        *("callback", "scan"),
    ),
)
def test_what_is_seen_to_be_affine(fn, affine):
    assert is_affine(fn, Y0) == affine


@every_solver
def test_derivatives_at_ends_of_steps(solver):
    """Derivatives with respect to time, there and within steps."""
    ts = jnp.array([0.5, 0.77, 1.0, 2.0])
    tolerance = {2: 0.1, 4: 3e-3, 6: 1e-4}[solver.order(None)]

    def solve(**kwargs):
        term = dfx.ODETerm(lambda t, y, args: -y)
        return dfx.diffeqsolve(term, solver, 0.0, 2.0, 0.125, jnp.array(1.0), **kwargs)

    def outputs(ts):
        saveat = dfx.SaveAt(ts=ts)
        return jnp.sum(solve(saveat=saveat, adjoint=dr.ReversibleAdjoint()).ys)

    slopes = jax.vmap(solve(saveat=dfx.SaveAt(dense=True)).derivative)(ts)
    for got in (jax.grad(outputs)(ts), slopes):
        np.testing.assert_allclose(got, -np.exp(-ts), rtol=tolerance)
    if isinstance(solver, dr.Gauss6):
        evaluate = solve(saveat=dfx.SaveAt(dense=True)).evaluate
        second = jax.vmap(jax.grad(jax.grad(evaluate)))(ts)
        np.testing.assert_allclose(second, np.exp(-ts), rtol=0.01)

    event = dfx.Event(lambda t, y, args, **kwargs: y - 0.3, optx.Newton(1e-6, 1e-6))
    end = solve(event=event).ts[0]
    np.testing.assert_allclose(end, np.log(1 / 0.3), rtol=0.01)
