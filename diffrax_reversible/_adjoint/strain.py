"""Detecting a gradient of the initial state that consists of modes that should decay."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._custom_types import Y
from .._precision import for_sums
from .._solver.ode_term import as_ode_term
from .._tree import largest
from .growth import Growth
from .walk import Walk


# The accepted share of modes that should have decayed. On heat equations in single
# precision, see `examples/benchmarks/refusals.py`, all gradients off by more than 3 % have
# more than this share, and hardly one of the others has a third of it.
_most = 0.03


def with_strain(walk: Walk, growth: Growth, y_bar: Y) -> Growth:
    """The growth at the start of the solve, with whether the cotangent of the initial state
    is strained, and by which rates: whether modes that should decay in a single step, for
    which some step is unstable, make up much of an array of it.

    - `y_bar`: that cotangent, without what outputs at the start of the solve have added.

    A mode with `h λ < -4` decays to a fiftieth in a step. If the step is unstable, it grows
    instead. Where a solve still finds its step size, one such step is enough to spoil the
    gradient of the initial state, in which slow modes may hide that no entry has grown by
    much. Pulling back through the vector field multiplies each mode by its `λ`. So the
    Rayleigh quotient of `Jᵀ w` is that of the fastest modes of `w` (the power method), and
    the size of `Jᵀ w` beside it is their share of `w`.
    """
    problem = walk.problem
    if not walk.differentiates_start or walk.departure is None:
        return growth
    terms, args = walk.combine(walk.params)
    term, (y0, _) = as_ode_term(problem.solver, terms), walk.start_states

    def slope(y):
        # A vector field may broadcast.
        vf = term.vf(problem.t0, y, args)
        return jtu.tree_map(lambda f, y: jnp.zeros_like(y) + jnp.asarray(f, y.dtype), vf, y)

    scale = jnp.array([0, *jtu.tree_leaves(largest(y_bar))], jnp.float32).max()
    scale = jnp.where(scale == 0, 1, scale)
    w = jtu.tree_map(lambda x: x / scale.astype(x.dtype), y_bar)
    _, pull = jax.vjp(slope, y0)
    (once,) = pull(w)
    (twice,) = pull(once)
    control = term.contr(problem.t0, walk.residuals.end.tprev)
    leaves = zip(*map(jtu.tree_leaves, (w, once, twice)), strict=True)
    both = [_share_and_rate(jnp.sign(jnp.asarray(control)), *leaf) for leaf in leaves]
    shares, rates = jnp.array(both, jnp.float32).reshape(-1, 2).T
    rates = jnp.where(shares > _most, rates, 0)
    division, strained = growth.division.at_start(rates, walk.departure.stable)
    return dataclasses.replace(growth, division=division, strained=strained)


def _share_and_rate(
    sign: Array, w: Array, once: Array, twice: Array
) -> list[Float[Array, ""]]:
    """The share of the fastest modes in an array, and the rate at which they decay."""
    total = lambda x: jnp.sum(x, dtype=for_sums(x.dtype))
    size = largest(once)
    scale = jnp.where(size == 0, 1, size).astype(once.dtype)
    once, twice = once / scale, twice / scale
    square = total(jnp.abs(once) ** 2)
    product = total(jnp.real(twice * jnp.conj(once)))
    rate = -sign.astype(square.dtype) * product / jnp.where(square == 0, 1, square)
    beside = rate * jnp.sqrt(total(jnp.abs(w) ** 2))
    share = size.astype(square.dtype) * jnp.sqrt(square)
    return [share / jnp.where(beside > 0, beside, jnp.inf), rate]
