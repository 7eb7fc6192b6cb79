"""Orders by rooted-tree conditions, and what is refused as coefficients."""

import itertools as it
import math

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
    """The method as a Runge–Kutta tableau, by running it on the unit vectors."""
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
    # ... and the next order is not reached by chance.
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
    # The parasitic deviation of `v` from the vector field is not seen.
    assert e[0] == 0
    assert abs(e @ matrix[:, 0]) < 1e-13
    # The leading term is that of `error_scale * h^(q+1) y^(q+1) / (q+1)!` on average.
    leading = np.array([e @ weight(tree, matrix) for tree in rooted_trees(q + 1)])
    taylor = np.array([1 / density(tree) for tree in rooted_trees(q + 1)])
    size = leading @ taylor / (taylor @ taylor)
    assert abs(size / tableau.error_scale - 1) < 1e-8


@pytest.mark.parametrize("order", (6, 8))
def test_midpoint(order):
    tableau = TABLEAUS[order]
    matrix, _, _ = runge_kutta(tableau.sub_steps)
    value, slope = tableau.midpoint_weights, tableau.midpoint_slope_weights
    for tree in trees_up_to(order - 1):
        exact = 0.5 ** order_of(tree) / density(tree)
        assert abs(value @ weight(tree, matrix) - exact) < 1e-12
    # Otherwise it is evaluated.
    assert (slope is None) == (order == 6)
    for tree in trees_up_to(order - 2) if slope is not None else ():
        exact = order_of(tree) * 0.5 ** (order_of(tree) - 1) / density(tree)
        assert abs(slope @ weight(tree, matrix) - exact) < 1e-11


def test_own_coefficients():
    # Yoshida's triple jump, on pairs.
    outer = 1 / (2 - 2 ** (1 / 3))
    gamma = (outer, 1 - 2 * outer, outer)
    tableau = dr.ALFTableau([g / 2 for g in gamma for _ in range(2)], order=4)
    assert tableau.stages == 6
    assert hash(tableau) == hash(dr.ALFTableau(tableau.sub_steps, order=4))


@pytest.mark.parametrize("order", (4, 6, 8))
def test_single_steps_lose_their_order(order):
    """Coefficients for symmetric methods do not reach their order on single ALF steps."""
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
    ),
)
def test_refused_coefficients(sub_steps, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        dr.ALFTableau(sub_steps, **kwargs)
    assert "`ALFTableau(" in str(e.value)
