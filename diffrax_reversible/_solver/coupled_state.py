"""The solver state of two coupled copies, and whether they have drifted apart."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import BoolScalarLike, Y
from .._precision import eps
from .._tree import from_bits, from_half_the_bits, real_like, to_bits, to_half_the_bits
from .entry_scales import has_grown, largest_entry, largest_so_far, where_finite


# Restart where the distance of the copies, in any entry, exceeds `_ratio` times its error
# estimate and `eps**_floor` times its scale, and in any case where it exceeds `_most` times
# the scale. With a ratio of ten, errors are up to ten times those of the Runge–Kutta method
# and restarts hardly fewer; with three, errors are about the same. Tuned on Kepler's,
# Lorenz', Lotka and Volterra's and van der Pol's equations, and on networks.
_ratio = 3.0
_floor = 0.75
_most = 0.3
# The distance one step after a restart is taken as at least so many rounding errors.
_noise = 10.0


class Separation(eqx.Module):
    """The known facts about the distance of two copies after a step.

    For every array, as bits:

    - `seeds`: the distance after the first step since the last restart, relative to
        `scales`; zero before that.
    - `scales`: the largest magnitude of every entry since the start of the solve, in half
        the bits.
    """

    # Whether the copies have to be set equal before the next step.
    restart: BoolScalarLike
    seeds: PyTree[Int[Array, ""]]
    scales: PyTree[Int[Array, "..."]]

    @staticmethod
    def start(y: Y) -> "Separation":
        seeds = jtu.tree_map(lambda y: jnp.zeros((), real_like(y).dtype), y)
        size = lambda y: to_half_the_bits(*where_finite(jnp.abs(y)))
        scales = jtu.tree_map(size, y)
        return Separation(jnp.array(False), to_bits(seeds), scales)

    def restarted(self) -> "Separation":
        seeds = jtu.tree_map(jnp.zeros_like, self.seeds)
        return Separation(jnp.array(False), seeds, self.scales)

    def judge(self, y: Y, z: Y, error: Y) -> "Separation":
        """The separation after a step to `y` and its copy `z`, with an `error` estimate."""
        known = from_bits(self.seeds, jtu.tree_map(real_like, y)), self.scales
        leaves = zip(*map(jtu.tree_leaves, (y, z, error, *known)), strict=True)
        restart, seeds, scales = jnp.array(False), [], []
        for leaf in leaves:
            leaf_restart, seed, scale = _judge(*leaf)
            restart = restart | leaf_restart
            seeds.append(seed)
            scales.append(scale)
        structure = jtu.tree_structure(y)
        known = (jtu.tree_unflatten(structure, leaves) for leaves in (seeds, scales))
        return Separation(restart, *known)


def _judge(
    y: Array,
    z: Array,
    error: Array,
    seed: Float[Array, ""],
    scales: Int[Array, "..."],
) -> tuple[BoolScalarLike, Int[Array, ""], Int[Array, "..."]]:
    """Whether to restart, and the new `seed` and `scales`, as bits."""
    lost = copy_is_lost(y, z)
    y, distances, errors = where_finite(y, jnp.abs(y - z), jnp.abs(error))
    so_far, unit = largest_so_far(from_half_the_bits(scales, y), y)
    # A single error estimate may be small by chance: it counts as at least the largest one,
    # in proportion to the scales.
    usual = unit * (largest_entry(errors) / largest_entry(unit))
    allowed = _ratio * jnp.maximum(errors, usual)
    allowed = jnp.clip(allowed, unit * eps(y) ** _floor, unit * _most)
    inaccurate = jnp.any(distances > allowed)
    distance = largest_entry(distances / unit)
    seed = jnp.where(seed == 0, jnp.maximum(distance, _noise * eps(y)), seed)
    restart = has_grown(distance, seed) | inaccurate | lost
    return restart, to_bits(seed), to_half_the_bits(so_far)


def copy_is_lost(y: Y, z: Y) -> BoolScalarLike:
    """Whether the step back to `z` has left the domain of the vector field, as that of a
    square root, where the step to `y` has not."""
    lost = [
        jnp.any(jnp.isfinite(y) & jnp.logical_not(jnp.isfinite(z)))
        for y, z in zip(jtu.tree_leaves(y), jtu.tree_leaves(z), strict=True)
    ]
    return jnp.stack([jnp.array(False), *lost]).any()


class CoupledState(eqx.Module):
    """The solver state: the second copy of the state, and its distance from the first.

    In a cotangent, every field except `copy` is `None`.
    """

    copy: Y
    separation: Separation


def with_copy(state: CoupledState, copy: Y) -> CoupledState:
    return CoupledState(copy, state.separation)
