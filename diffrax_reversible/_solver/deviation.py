"""Whether the deviation of `v` from the vector field threatens the accuracy of a solve."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._coefficients.tableau import ALFTableau
from .._custom_types import BoolScalarLike, RealScalarLike, VF, Y


# A restart where the deviation of `v`, times the step size, exceeds this many times the
# Taylor term that the error estimate is a fraction of, and this power of the machine
# epsilon times the state. A smaller ratio makes contracting problems more accurate, and
# restarts conservative ones needlessly.
_ratio = 3.0
_floor = 0.4
_sample_size = 1024


def watch_weights(tableau: ALFTableau) -> Float[Array, "stages+1 2"] | None:
    """Weights of `u_0 = v_0, u_1, ..., u_s` in the deviation and in the error estimate.

    `None` where the deviation cannot be told.
    """
    if tableau.deviation_weights is None:
        return None
    return jnp.stack([tableau.deviation_weights, tableau.error_weights], axis=1)


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

    def deviates(self, control: RealScalarLike, error_scale: float, y: Y) -> BoolScalarLike:
        """Whether the deviation threatens the accuracy of the next steps.

        It is compared, times the step size, with the Taylor term that the error estimate
        is made of, and with the size of the state where both are next to nothing.
        """

        def deviates(sums, y):
            sums = jnp.asarray(control, sums.dtype) * sums
            sums = jnp.concatenate([sums, _sample(y)[None]])
            d, e, y = jnp.max(jnp.abs(sums), axis=1, initial=0)
            floor = jnp.finfo(y.dtype).eps ** _floor
            return d > jnp.maximum(_ratio / error_scale * e, floor * y)

        leaves = jtu.tree_leaves(jtu.tree_map(deviates, self.sums, y))
        return jnp.any(jnp.stack(leaves)) if leaves else jnp.array(False)


def _outer(weights: Float[Array, " 2"], x: Float[Array, " n"]) -> Float[Array, "2 n"]:
    return weights.astype(x.dtype)[:, None] * x


def _sample(x: Array) -> Float[Array, " sample"]:
    x = x.reshape(-1)
    # The stride is odd, for axes of even length not to be sampled at the same places.
    return x if x.size <= 2 * _sample_size else x[:: x.size // _sample_size | 1]
