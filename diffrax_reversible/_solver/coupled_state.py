"""The solver state of two coupled copies, and whether these have parted."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import BoolScalarLike, Y
from .._precision import eps
from .._tree import from_bits, real_like, to_bits
from .entry_scales import has_grown, largest_entry, largest_so_far, sample


# Restart where the distance of the copies, in any entry, exceeds this many times its error
# estimate, and this power of the machine epsilon times its scale, but in any case where it
# exceeds this fraction of the scale. With a ratio of ten errors were up to ten times those
# of the Runge–Kutta method, and restarts hardly fewer; with three they are about the same.
# Tuned on Kepler's, Lorenz', Lotka and Volterra's and van der Pol's equations, and on
# networks.
_ratio = 3.0
_floor = 0.75
_most = 0.3
# The distance after a restart and a step is no less than so many rounding errors.
_noise = 10.0


class Separation(eqx.Module):
    """What is known of the distance of two copies after a step.

    All but `restart` as bits, and for every array:

    - `seed`: the distance after the first step since the last restart, relative to
        `scales`; zero before that.
    - `scales`: the largest magnitude that the sampled entries have had since the start of
        the solve.
    """

    # Whether they have to be set equal before the next step.
    restart: BoolScalarLike
    seeds: PyTree[Int[Array, ""]]
    scales: PyTree[Int[Array, " sample"]]

    @staticmethod
    def start(y: Y) -> "Separation":
        seeds = jtu.tree_map(lambda y: jnp.zeros((), real_like(y).dtype), y)
        scales = jtu.tree_map(lambda y: jnp.abs(sample(y)), y)
        return Separation(jnp.array(False), *to_bits((seeds, scales)))

    def restarted(self) -> "Separation":
        seeds = jtu.tree_map(jnp.zeros_like, self.seeds)
        return Separation(jnp.array(False), seeds, self.scales)

    def judge(self, y: Y, z: Y, error: Y) -> "Separation":
        """After a step to `y` and its copy `z`, with an `error` estimate."""
        like = jtu.tree_map(real_like, y)
        known = from_bits((self.seeds, self.scales), (like, like))
        leaves = zip(*map(jtu.tree_leaves, (y, z, error, *known)), strict=True)
        restart, seeds, scales = jnp.array(False), [], []
        for leaf in leaves:
            leaf_restart, seed, scale = _judge(*leaf)
            restart = restart | leaf_restart
            seeds.append(seed)
            scales.append(scale)
        structure = jtu.tree_structure(y)
        known = (jtu.tree_unflatten(structure, leaves) for leaves in (seeds, scales))
        return Separation(restart, *to_bits(tuple(known)))


def _judge(
    y: Array,
    z: Array,
    error: Array,
    seed: Float[Array, ""],
    scales: Float[Array, " sample"],
) -> tuple[BoolScalarLike, Float[Array, ""], Float[Array, " sample"]]:
    scales, unit = largest_so_far(scales, y)
    distances = jnp.abs(sample(y) - sample(z))
    errors = jnp.abs(sample(error))
    # An error estimate may be small by chance, but not beside those of all other entries.
    usual = unit * (largest_entry(errors) / largest_entry(unit))
    allowed = _ratio * jnp.maximum(errors, usual)
    allowed = jnp.clip(allowed, unit * eps(y) ** _floor, unit * _most)
    inaccurate = jnp.any(distances > allowed)
    distance = largest_entry(distances / unit)
    seed = jnp.where(seed == 0, jnp.maximum(distance, _noise * eps(y)), seed)
    return has_grown(distance, seed) | inaccurate, seed, scales


class CoupledState(eqx.Module):
    """Solver state: the second copy of the state, and how far it is from the first.

    Of a cotangent, all but the copy is `None`.
    """

    copy: Y
    separation: Separation


def with_copy(state: CoupledState, copy: Y) -> CoupledState:
    return CoupledState(copy, state.separation)
