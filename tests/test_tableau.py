"""Order conditions of ALF tableaus, by rooted trees, and refused coefficients."""

import itertools as it
import math

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._coefficients.alf import alf2, alf4, alf6, alf8
from diffrax_reversible._coefficients.rooted_trees import (
    density,
    order_of,
    rooted_trees,
    trees_up_to,
)


TABLEAUS = {2: alf2, 4: alf4, 6: alf6, 8: alf8}


def runge_kutta(sub_steps):
    """The method as a Runge–Kutta tableau, by a step on unit vectors."""
    s = len(sub_steps)
    unit = np.eye(s + 1)
    z, v, rows = np.zeros(s + 1), unit[0], [np.zeros(s + 1)]
    for i, c in enumerate(sub_steps):
        k = z + c / 2 * v
        rows.append(k)
        v = 2 * unit[i + 1] - v
        z = k + c / 2 * v
    return np.stack(rows), z, v


def weight(tree, matrix):
    out = np.ones(len(matrix))
    for child in tree:
        out = out * (matrix @ weight(child, matrix))
    return out


def residuals(tableau, order):
    matrix, z, v = runge_kutta(tableau.sub_steps)
    for tree in rooted_trees(order):
        phi = weight(tree, matrix)
        yield (
            abs(z @ phi - 1 / density(tree)),
            abs(v @ phi - math.prod(1 / density(child) for child in tree)),
        )


def test_trees():
    # Numbers of rooted trees, https://oeis.org/A000081.
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]
    assert density(((),)) == 2
    # Tall trees have density n!, bushy ones n.
    tall = ()
    for n in range(2, 6):
        tall = (tall,)
        assert order_of(tall) == n and density(tall) == math.factorial(n)
        assert density(((),) * (n - 1)) == n


@pytest.mark.parametrize("order, stages", ((2, 1), (4, 5), (6, 20), (8, 34)))
def test_order_conditions(order, stages):
    tableau = TABLEAUS[order]
    assert tableau.order == order
    assert tableau.stages == stages
    assert tableau.velocity_order == order
    satisfied = it.chain.from_iterable(residuals(tableau, n) for n in range(1, order + 1))
    assert max(it.chain.from_iterable(satisfied)) < 1e-13
    # The method is not of the next order by chance.
    assert max(z for z, _ in residuals(tableau, order + 1)) > 1e-6


@pytest.mark.parametrize("order", (4, 6, 8))
def test_error_estimate(order):
    tableau = TABLEAUS[order]
    matrix, _, _ = runge_kutta(tableau.sub_steps)
    e = tableau.error_weights
    q = tableau.embedded_order
    assert q == order - 1
    for tree in trees_up_to(q):
        assert abs(e @ weight(tree, matrix)) < 1e-11
    # The estimate ignores the parasitic deviation of `v` from the vector field.
    assert e[0] == 0
    assert abs(e @ matrix[:, 0]) < 1e-13
    # On average the leading term is `error_scale * h^(q+1) y^(q+1) / (q+1)!`.
    leading = np.array([e @ weight(tree, matrix) for tree in rooted_trees(q + 1)])
    taylor = np.array([1 / density(tree) for tree in rooted_trees(q + 1)])
    size = leading @ taylor / (taylor @ taylor)
    assert abs(size / tableau.error_scale - 1) < 1e-8


@pytest.mark.parametrize("order, between", ((4, 4), (6, 6), (8, 7)))
def test_continuous_extension(order, between):
    """The extension satisfies the order conditions at fractions of the step, with the
    evaluations after the step as further stages."""
    tableau = TABLEAUS[order]
    extension = tableau.continuous_extension
    assert extension.order == between
    assert extension.evaluates_midpoint == (order == 6)
    matrix, z, _ = runge_kutta(tableau.sub_steps)
    s = len(matrix)
    # The stages of the derivatives at the start, the end and the mid-point.
    rows = [np.zeros(s), z]
    if order == 6:
        rows.append(extension.weights[1])
    extended = np.zeros((s + len(rows), s + len(rows)))
    extended[:s, :s] = matrix
    for i, row in enumerate(rows):
        extended[s + i, :s] = row
    if order == 6:
        extended[s + 2, s : s + 2] = extension.slope_weights[1, :2]
    all_weights = np.concatenate([extension.weights, extension.slope_weights], axis=1)
    for theta, weights in zip(extension.fractions, all_weights, strict=True):
        for tree in trees_up_to(between - 1):
            exact = theta ** order_of(tree) / density(tree)
            assert abs(weights @ weight(tree, extended) - exact) < 1e-11
        # The deviation of `v` enters neither directly nor, to first order, by the stages.
        assert weights[0] == 0
        assert abs(weights[:s] @ matrix[:, 0]) < 1e-13


def left_half_plane(radius, step, angles):
    directions = np.exp(1j * np.linspace(np.pi / 2, np.pi, angles))
    return np.outer(np.arange(step, radius + step / 2, step), directions).ravel()


def estimate(tableau, z):
    """The error estimate, the error, and the fine estimate of a step of `y' = λ y` from
    `y = 1` and `v = λ`, as functions of `z = h λ`."""
    y, v, u = np.ones_like(z), z, [z]
    for c in tableau.sub_steps:
        k = y + c / 2 * v
        u.append(z * k)
        v = 2 * u[-1] - v
        y = k + c / 2 * v
    u = np.stack(u)
    fine = np.abs(tableau.error_weights @ u)
    coarse = np.abs(tableau.coarse_error_weights @ u)
    coarse = coarse * np.minimum(coarse / (0.1 * (np.abs(z) + np.abs(v))), 1) ** 2
    if tableau.deviation_error_scale > 0:
        third = tableau.deviation_error_scale * np.abs(tableau.deviation_weights @ u)
        coarse = np.maximum(coarse, third - fine / 2)
    return np.maximum(fine, coarse), np.abs(y - np.exp(z)), fine


@pytest.mark.parametrize("order", (2, 4, 6, 8))
def test_error_estimate_is_not_blind(order):
    """On the left half-plane, the estimate is at least a quarter of the error of a step
    wherever that exceeds 1e-3. For short steps it is the fine estimate alone."""
    tableau = TABLEAUS[order]
    size, error, fine = estimate(tableau, left_half_plane(15, 0.0173, 173))
    large = error > 1e-3
    assert np.min(size[large] / error[large]) > 0.25
    small = left_half_plane(0.1, 0.01, 19)
    size, _, fine = estimate(tableau, small)
    assert np.all(size < 1.001 * fine)
    if order == 4:
        # The fine estimate alone would be blind.
        z = -np.linspace(3, 6, 100)
        _, error, fine = estimate(tableau, z)
        assert np.all(fine < error / 16)


@pytest.mark.parametrize("order", (2, 4, 6, 8))
def test_error_estimate_of_a_step(order):
    """The estimate and the error of the solver's step equal those of `estimate`."""
    solver = {2: dr.ALF2(), 4: dr.ALF4(), 6: dr.ALF6(), 8: dr.ALF8()}[order]
    term = dfx.ODETerm(lambda t, y, args: -y)

    @jax.jit
    @jax.vmap
    def step(h):
        y0 = jnp.array([1.0])
        state = solver.init(term, 0.0, h, y0, None)
        y1, error, *_ = solver.step(term, 0.0, h, y0, None, state, made_jump=False)
        return y1[0], jnp.abs(error[0])

    h = np.linspace(0.1, 12, 120)
    y1, size = step(h)
    expected, error, _ = estimate(TABLEAUS[order], -h)
    np.testing.assert_allclose(size, expected, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(np.abs(y1 - np.exp(-h)), error, rtol=1e-6, atol=1e-13)


def test_own_coefficients():
    # Yoshida's triple jump, on pairs of sub-steps.
    outer = 1 / (2 - 2 ** (1 / 3))
    gamma = (outer, 1 - 2 * outer, outer)
    tableau = dr.ALFTableau([g / 2 for g in gamma for _ in range(2)], order=4)
    assert tableau.stages == 6
    assert hash(tableau) == hash(dr.ALFTableau(tableau.sub_steps, order=4))


@pytest.mark.parametrize("order", (4, 6, 8))
def test_single_steps_lose_their_order(order):
    """Coefficients for symmetric methods lose their order on single ALF sub-steps."""
    gamma = np.array(alf8.sub_steps).reshape(-1, 2).sum(axis=1)
    dr.ALFTableau(gamma, order=2)
    with pytest.raises(ValueError, match="violates an order condition of order 4, by"):
        dr.ALFTableau(gamma, order=order)


@pytest.mark.parametrize(
    "sub_steps, kwargs, message",
    (
        ((), dict(order=2), "non-empty"),
        ((math.nan,), dict(order=2), "finite"),
        ((0.5, 0.6), dict(order=2), "sum to 1, got 1.1"),
        ((0.4, 0.6), dict(order=2), "palindrome"),
        ((0.5, 0.5), dict(order=4), "order condition of order 3, by .* Pass `order=2`"),
        ((1.0,), dict(order=3), "even"),
        ((1.0,), dict(order=2, embedded_order=2), "less than `order=2`"),
        ((0.5, 0.5), dict(order=2, embedded_order=0), "at least 1"),
        ((1.0,), dict(order=2.0), "order=2.0.* an integer"),
        ((1.0,), dict(order=2, error_scale=0.0), "error_scale=0.0.* positive"),
    ),
    ids=(
        *("none", "NaN", "sum", "not symmetric", "order", "odd order"),
        *("embedded order too high", "embedded order too low"),
        *("order that is not an integer", "no scale"),
    ),
)
def test_refused_coefficients(sub_steps, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        dr.ALFTableau(sub_steps, **kwargs)
    assert "`ALFTableau(" in str(e.value)
