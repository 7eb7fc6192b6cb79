"""Whether the deviation of `v` from the vector field threatens the accuracy of a solve."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._coefficients.tableau import ALFTableau
from .._custom_types import BoolScalarLike, RealScalarLike, VF, Y
from .._tree import from_bits, largest, to_bits


# A restart where the deviation of `v`, times the step size, exceeds this many times the
# Taylor term that the error estimate is a fraction of, and this power of the machine
# epsilon times the state. A smaller ratio makes contracting problems more accurate, and
# restarts conservative ones needlessly.
_ratio = 3.0
_floor = 0.4
# And where it has grown by this power of the machine epsilon since the last restart, as by
# so much rounding errors grow in the walk back: to about a hundredth of the square root of
# the machine epsilon.
_growth = -0.37
_sample_size = 1024


def watch_weights(tableau: ALFTableau) -> Float[Array, "stages+1 2"] | None:
    """Weights of `u_0 = v_0, u_1, ..., u_s` in the deviation and in the error estimate.

    `None` where the deviation cannot be told.
    """
    if tableau.deviation_weights is None:
        return None
    return jnp.stack([tableau.deviation_weights, tableau.error_weights], axis=1)


class Deviation(eqx.Module):
    """What is known of the deviation of `v` after a step: part of the solver state."""

    # Whether `v` has to be restarted before the next step.
    restart: BoolScalarLike
    # For every array, the size of the deviation after the first step since the last
    # restart, as bits. Zero before that.
    seeds: PyTree[Int[Array, ""]]

    @staticmethod
    def none(v: VF) -> "Deviation":
        seeds = jtu.tree_map(lambda x: jnp.zeros((), x.dtype), v)
        return Deviation(jnp.array(False), to_bits(seeds))


class DeviationWatch(eqx.Module):
    """Sums of stage derivatives that tell the deviation of `v` and the local error.

    They are kept of about a thousand entries of every array that has many more, evenly
    spread, as to watch every entry would cost as many passes over memory as a cheap vector
    field does.
    """

    sums: PyTree[Float[Array, "2 sample"]]

    @staticmethod
    def start(weights: Float[Array, " 2"], v: VF) -> "DeviationWatch":
        return DeviationWatch(jtu.tree_map(lambda x: _outer(weights, _sample(x)), v))

    def add(self, weight: Float[Array, " 2"], u: VF) -> "DeviationWatch":
        """Add `weight * u` of a sub-step."""

        def add(total, u):
            return total + _outer(weight, _sample(u))

        return DeviationWatch(jtu.tree_map(add, self.sums, u))

    def judge(
        self, tableau: ALFTableau, control: RealScalarLike, y: Y, v: VF, before: Deviation
    ) -> Deviation:
        """Whether the deviation threatens the accuracy of the next steps, or the walk back.

        For the accuracy it is compared, times the step size, with the Taylor term that the
        error estimate is made of, and with the size of the state where both are next to
        nothing; for the walk back with its own size after the last restart, or with what it
        may be by rounding alone if that is more.
        """
        assert tableau.deviation_weights is not None
        noise = np.sum(np.abs(tableau.deviation_weights))

        def judge(sums, y, v, seed):
            # One by one, which under `vmap` is four times as fast on a CPU as together.
            arrays = (*sums, _sample(y), _sample(v))
            deviation, error, y_size, v_size = map(largest, arrays)
            eps = jnp.finfo(y.dtype).eps
            rounding = jnp.asarray(noise * eps, v.dtype) * v_size
            seed = jnp.where(seed == 0, jnp.maximum(deviation, rounding), seed)
            h = jnp.abs(jnp.asarray(control, y.dtype))
            taylor_term = h * error / tableau.error_scale
            harmless = jnp.maximum(_ratio * taylor_term, eps**_floor * y_size)
            restart = (h * deviation > harmless) | (deviation > eps**_growth * seed)
            return restart, seed

        seeds = from_bits(before.seeds, v)
        judged = jtu.tree_map(judge, self.sums, y, v, seeds)
        restarts = jtu.tree_map(lambda _, pair: pair[0], v, judged)
        seeds = jtu.tree_map(lambda _, pair: pair[1], v, judged)
        leaves = jtu.tree_leaves(restarts)
        restart = jnp.any(jnp.stack(leaves)) if leaves else jnp.array(False)
        return Deviation(restart, to_bits(seeds))


def _outer(weights: Float[Array, " 2"], x: Float[Array, " n"]) -> Float[Array, "2 n"]:
    return weights.astype(x.dtype)[:, None] * x


def _sample(x: Array) -> Float[Array, " sample"]:
    x = x.reshape(-1)
    # The stride is odd, for axes of even length not to be sampled at the same places.
    return x if x.size <= 2 * _sample_size else x[:: x.size // _sample_size | 1]
