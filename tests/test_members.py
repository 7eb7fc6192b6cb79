"""Functions and pull-backs that are told of batches, by themselves."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrax_reversible._adjoint.batch import call_in_batches
from diffrax_reversible._axes import lend, share, total, without
from diffrax_reversible._members import value_and_pullback


W, X = jnp.cos(jnp.arange(6.0)).reshape(2, 3), jnp.sin(jnp.arange(24.0)).reshape(2, 4, 3)
BAR = jnp.cos(jnp.arange(16.0)).reshape(2, 4, 2)


def product(names, w, x):
    return jnp.tanh((share(w, names) if names else w) @ x)


def pulled(names, w, x, bar):
    return value_and_pullback(ft.partial(product, names), (w, x), bar)


def expected(w, x, bar):
    value, pull = jax.vjp(ft.partial(product, ()), w, x)
    return value, pull(bar)


def assert_equal(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


def over(fn, *axes):
    """`fn`, which returns cotangents of a shared `w` and of `x`, for all members."""
    return jax.vmap(fn, (None, 0, 0), (0, (*axes, 0)), axis_name="members")


def test_sum_in_one_product():
    """A pull-back sums over members, and multiplies matrices without their axis."""
    ours = over(ft.partial(pulled, ("members",)), None)
    value, (w_bar, x_bar) = over(expected, 0)(W, X[0], BAR[0])
    assert_equal(ours(W, X[0], BAR[0]), (value, (w_bar.sum(0), x_bar)))
    copies = f"tensor<{len(X[0])}x{W.shape[0]}x{W.shape[1]}x"
    program = lambda fn: jax.jit(fn).lower(W, X[0], BAR[0]).as_text()
    assert copies in program(over(expected, 0))
    assert copies not in program(ours)


@pytest.mark.parametrize("names", ((), ("others",)), ids=("none", "another"))
def test_no_sum(names):
    """Without a shared axis, members have a cotangent of their own."""
    args = W, X[0], BAR[0]
    assert_equal(over(ft.partial(pulled, names), 0)(*args), over(expected, 0)(*args))


def test_batch_of_batches():
    """Only one of two axes is shared, in either order."""
    inner = ft.partial(pulled, ("members",))
    value, (w_bar, x_bar) = jax.vmap(over(expected, 0), (None, 0, 0))(W, X, BAR)
    ours = jax.vmap(over(inner, None), (None, 0, 0))(W, X, BAR)
    assert_equal(ours, (value, (w_bar.sum(1), x_bar)))
    inner = jax.vmap(inner, (None, 0, 0), (0, (0, 0)))
    assert_equal(over(inner, None)(W, X, BAR), (value, (w_bar.sum(0), x_bar)))


def test_unmapped_operands():
    """Members may share what is not summed, or differ in their cotangents only."""
    ours = ft.partial(pulled, ("members",))
    axes = dict(in_axes=(None, None, 0), axis_name="members")
    value, (w_bar, x_bar) = jax.vmap(expected, **axes)(W, X[0, 0], BAR[0])
    mapped = jax.vmap(ours, **axes, out_axes=(None, (None, 0)))(W, X[0, 0], BAR[0])
    assert_equal(mapped, (value[0], (w_bar.sum(0), x_bar)))


def test_forward_over_reverse():
    """Differentiated once more, in a batch."""

    def second(pulled, w, x, bar):
        return jax.jvp(lambda w, x: pulled(w, x, bar), (w, x), (w, x))[1]

    args = W, X[0], BAR[0]
    ours = ft.partial(second, ft.partial(pulled, ()))
    assert_equal(over(ours, 0)(*args), over(ft.partial(second, expected), 0)(*args))


def test_sums_are_checked():
    """What still has the axis is no sum over it."""
    both = lambda x: without(total(x, ("members",)), ("members",))
    assert jax.vmap(both, out_axes=None, axis_name="members")(X[0, 0]) == X[0, 0].sum()
    with pytest.raises(AssertionError):
        jax.vmap(lambda x: without(x, ("members",)), axis_name="members")(X[0, 0])


def test_closure():
    """A function may close over traced values. It is then told nothing."""
    told = []

    def scaled(scale, x):
        def call(x, sharing):
            told.append(len(sharing[0]))
            return scale * x

        return call_in_batches(call, x)

    ours = jax.jit(jax.vmap(jax.grad(scaled, argnums=(0, 1)), (None, 0)))
    assert_equal(ours(W[0, 0], X[0, 0]), (X[0, 0], jnp.full(3, W[0, 0])))
    assert set(told) == {0}


def test_effects_of_a_custom_derivative():
    """A function may print its cotangent, in order, also within a loop."""
    seen = []
    watched = jax.custom_vjp(lambda x: x)

    def back(_, bar):
        jax.debug.callback(seen.append, bar, ordered=True)
        return (bar,)

    watched.defvjp(lambda x: (x, None), back)
    double = lambda x: 2.0 * watched(jnp.asarray(x))

    def pull(_, bar):
        return value_and_pullback(double, (1.0,), bar)[1][0]

    jax.block_until_ready(jax.jit(lambda: jax.lax.fori_loop(0, 3, pull, 1.0))())
    jax.effects_barrier()
    assert [float(bar) for bar in seen] == [2.0, 4.0, 8.0]


def test_what_is_shared():
    """A function is told what all members of a batch share, and only if it is
    differentiated after it was batched."""
    told = []

    def forward(sharing, w, x):
        told.append((len(sharing[0]), sharing[1]))
        return w * x, (w, x)

    product = jax.custom_vjp(lambda sharing, w, x: w * x, nondiff_argnums=(0,))
    product.defvjp(forward, lambda _, wx, ct: (ct * wx[1], ct * wx[0]))

    def call(w, x):
        return call_in_batches(lambda w, x, sharing: product(sharing, w, x), w, x)

    w, x = jnp.array(2.0), jnp.arange(3.0)
    of_batch = lambda w, x: jnp.sum(jax.vmap(call, (None, 0))(w, x))
    assert of_batch(w, x) == 2 * x.sum()
    assert told == []
    assert jax.jit(jax.grad(of_batch))(w, x) == x.sum()
    assert told.pop() == (1, [True, False])
    assert_equal(jax.vmap(jax.grad(call), (None, 0))(w, x), x)
    assert told.pop() == (0, [True, True])


MEMBERS = jnp.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "here, lenders",
    (
        # In a row with members that are there, the first of these lends.
        ([5, 7], [[5, 5, 5, 7]] * 3),
        ([0, 11], [[0] * 4, [0] * 4, [11] * 4]),
        (range(12), MEMBERS),
        ([], [[0] * 4] * 3),
    ),
)
def test_lend(here, lenders):
    """Members that are not there receive what belongs to one that is: the same member for
    what varies along both axes of a batch of batches, and along one of them."""
    names = "inner", "outer"
    is_here = jnp.isin(MEMBERS, jnp.array(here, float))

    def member(here, *xs):
        return tuple(lend(x, here, names) for x in xs)

    fn = jax.vmap(member, (0, 0, None, 0, None), axis_name="inner")
    fn = jax.vmap(fn, (0, 0, 0, None, None), axis_name="outer")
    rows, columns = MEMBERS[:, 0], MEMBERS[0]
    x, row, column, both = jax.jit(fn)(is_here, MEMBERS, rows, columns, MEMBERS)
    np.testing.assert_array_equal(x, lenders)
    np.testing.assert_array_equal(row + column, lenders)
    np.testing.assert_array_equal(both, np.broadcast_to(MEMBERS, (3, 4, 3, 4)))


def test_lend_some_axes():
    """Members may share an axis that is not named, or be there along one axis only."""
    rows = jnp.array([False, True, True])
    here = jnp.isin(MEMBERS, jnp.array([2.0, 4.0, 9.0]))
    inner = ft.partial(lend, names=("inner",))
    along_one = lambda axes: jax.vmap(jax.vmap(inner, axes, axis_name="inner"))
    got = along_one((0, None))(MEMBERS, rows)
    np.testing.assert_array_equal(got[1:], MEMBERS[1:])
    want = np.where(here, MEMBERS, [[2] * 4, [4] * 4, [9] * 4])
    np.testing.assert_array_equal(along_one(0)(MEMBERS, here), want)


def test_lend_other_types():
    """Keys and integers are lent too, and tangents with values. Empty batches lend none."""
    here = jnp.array([False, True, False])
    fn = jax.vmap(ft.partial(lend, names=("inner",)), axis_name="inner")
    keys = jax.random.split(jax.random.key(0), 3)
    assert jnp.all(fn(keys, here) == keys[jnp.array([1, 1, 1])])
    np.testing.assert_array_equal(fn(jnp.arange(3), here), [1, 1, 1])
    x, dot = jnp.arange(3.0), jnp.arange(3.0, 6.0)
    got = jax.jvp(lambda x: fn(x, here), (x,), (dot,))
    np.testing.assert_array_equal(got, [[1] * 3, [4] * 3])
    assert fn(x[:0], here[:0]).shape == (0,)
