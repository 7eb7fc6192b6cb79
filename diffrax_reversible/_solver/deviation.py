"""Whether the deviation of `v` from the vector field threatens the accuracy of a solve."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._coefficients.coarse_error import usual_deviation
from .._coefficients.tableau import ALFTableau
from .._custom_types import BoolScalarLike, RealScalarLike, VF, Y
from .._tree import from_bits, to_bits
from .entry_scales import has_grown, largest_entry, largest_so_far, sample, units


# Restart where the deviation of `v`, times the step size, exceeds this many times the
# Taylor term that the error estimate is a fraction of, and this power of the machine
# epsilon times the scale of the entry, but in any case where it exceeds this fraction of
# the scale. A smaller ratio restarts conservative problems needlessly. Tuned on Kepler's,
# Lorenz', Lotka and Volterra's and van der Pol's equations, and on networks.
_ratio = 3.0
_floor = 0.4
_most = 0.3
# Of a step that is short because an output is due, the error says little about the next
# ones: those of earlier steps count with this factor for each that has been made since.
_recent = 0.5
# Restart where what the deviation adds to the solution in a step may exceed this many times
# the error of the step. Tuned on the same problems, where it adds few restarts, and on
# `examples/benchmarks/solutions.py`.
_harm = 300.0
# As old counts what the largest deviation was before the step, relative to the scale of
# each entry, times this: entries take deviations over from each other.
_shared = 0.3
# A step itself makes a deviation of up to so many times the error estimate.
_made = 10.0


def watch_weights(tableau: ALFTableau) -> Float[Array, "stages+1 2"] | None:
    """Weights of `u_0 = v_0, u_1, ..., u_s` in the deviation and in the error estimate.

    `None` where the deviation cannot be told.
    """
    if tableau.deviation_weights is None:
        return None
    return jnp.stack([tableau.deviation_weights, tableau.error_weights], axis=1)


class Deviation(eqx.Module):
    """What is known of the deviation of `v` after a step: part of the solver state.

    All but `restart` as bits, and for every array:

    - `seed`: the size of the deviation after the first step since the last restart,
        relative to `scales`; before that what it may be by rounding.
    - `errors`: the error estimate of recent steps, relative to `scales`.
    - `sizes`: of the deviation of the sampled entries.
    - `scales`: the largest magnitude that they have had since the start of the solve.
    """

    # Whether `v` has to be restarted before the next step.
    restart: BoolScalarLike
    seeds: PyTree[Int[Array, ""]]
    errors: PyTree[Int[Array, ""]]
    sizes: PyTree[Int[Array, " sample"]]
    scales: PyTree[Int[Array, " sample"]]

    @staticmethod
    def start(tableau: ALFTableau, y: Y, v: VF) -> "Deviation":
        """Where `v` was evaluated."""
        scales = jtu.tree_map(lambda y: jnp.abs(sample(y)), y)
        sizes = jtu.tree_map(jnp.zeros_like, scales)
        zeros = jtu.tree_map(lambda y: jnp.zeros((), y.dtype), y)
        none = Deviation(jnp.array(False), *to_bits((zeros, zeros, sizes, scales)))
        return none.restarted(tableau, v)

    def restarted(self, tableau: ALFTableau, v: VF) -> "Deviation":
        """After a restart, with the new `v`."""

        def seed(v, scales):
            rounding = _noise(tableau) * jnp.finfo(v.dtype).eps
            return jnp.asarray(rounding, v.dtype) * largest_entry(sample(v) / units(scales))

        seeds = jtu.tree_map(seed, v, from_bits(self.scales, v))
        return Deviation(
            jnp.array(False), to_bits(seeds), self.errors, self.sizes, self.scales
        )

    def across_jump(self, v: VF) -> "Deviation":
        """What the next step makes of another field is no growth."""
        sizes = jtu.tree_map(lambda v: jnp.full_like(sample(v), jnp.inf), v)
        return Deviation(self.restart, self.seeds, self.errors, to_bits(sizes), self.scales)


class _Judged(NamedTuple):
    """Of one array."""

    restart: Bool[Array, ""]
    seed: Float[Array, ""]
    error: Float[Array, ""]
    sizes: Float[Array, " sample"]
    scales: Float[Array, " sample"]
    excess: "Excess"


class Excess(eqx.Module):
    """An error estimate of the sampled entries of an array, and their scales."""

    error: Float[Array, " sample"]
    unit: Float[Array, " sample"]

    def raise_error(self, error: Array) -> Array:
        """Another estimate, with its sampled entries no less in size than this one. If not
        all are sampled, then it is raised as a whole by as much as the sample on
        average."""
        known = jnp.abs(sample(error))
        raised = jnp.maximum(known, self.error)
        if raised.size == error.size:
            return raised.reshape(error.shape)
        before, after = (jnp.sum((x / self.unit) ** 2) for x in (known, raised))
        return error * jnp.sqrt(jnp.where(before == 0, 1, after / before))


class DeviationWatch(eqx.Module):
    """Sums of stage derivatives that tell the deviation of `v` and the local error.

    They are kept of sampled entries, see `sample`.
    """

    sums: PyTree[Float[Array, "2 sample"]]

    @staticmethod
    def start(weights: Float[Array, " 2"], v: VF) -> "DeviationWatch":
        return DeviationWatch(jtu.tree_map(lambda x: _outer(weights, sample(x)), v))

    def add(self, weight: Float[Array, " 2"], u: VF) -> "DeviationWatch":
        """Add `weight * u` of a sub-step."""

        def add(total, u):
            return total + _outer(weight, sample(u))

        return DeviationWatch(jtu.tree_map(add, self.sums, u))

    def judge(
        self,
        tableau: ALFTableau,
        control: RealScalarLike,
        y: Y,
        before: Deviation,
        fresh: BoolScalarLike,
    ) -> tuple[Deviation, PyTree[Excess]]:
        """Whether the deviation threatens the accuracy of the next steps, or the walk back.

        Every entry is measured by a scale of its own, see `Deviation`, so that none is too
        small to be seen.

        **Arguments:**

        - `control`: the length of the step.
        - `y`: at its end.
        - `before`: what was known before it.
        - `fresh`: whether there was no deviation then.

        **Returns:**

        What is known now, and an error estimate for the sampled entries: by how much more
        the deviation has grown than that of a stable step does.
        """
        known = before.seeds, before.errors, before.sizes, before.scales
        known = from_bits(known, (y, y, y, y))
        leaves = (jtu.tree_leaves(x) for x in (self.sums, y, *known))
        judged = [
            _judge(tableau, control, fresh, *leaf) for leaf in zip(*leaves, strict=True)
        ]
        restart = jnp.array(False)
        for leaf in judged:
            restart = restart | leaf.restart

        def pick(name):
            leaves = [getattr(leaf, name) for leaf in judged]
            return jtu.tree_unflatten(jtu.tree_structure(y), leaves)

        known = to_bits(tuple(map(pick, ("seed", "error", "sizes", "scales"))))
        return Deviation(restart, *known), pick("excess")


def _judge(
    tableau: ALFTableau,
    control: RealScalarLike,
    fresh: BoolScalarLike,
    sums: Float[Array, "2 sample"],
    y: Array,
    seed: Float[Array, ""],
    recent_error: Float[Array, ""],
    sizes: Float[Array, " sample"],
    scales: Float[Array, " sample"],
) -> _Judged:
    h = jnp.abs(jnp.asarray(control, y.dtype))
    eps = jnp.finfo(y.dtype).eps
    deviation, error = jnp.abs(sums)
    old = jnp.where(fresh, 0, sizes)
    scales, unit = largest_so_far(scales, y)
    # One by one, which under `vmap` is faster on a CPU than together.
    relative = largest_entry(deviation / unit)
    relative_error = largest_entry(error / unit)
    relative_old = largest_entry(old / unit)

    seed = jnp.where(fresh, jnp.maximum(seed, relative), seed)
    recent_error = jnp.maximum(relative_error, _recent * recent_error)
    taylor_term = h * recent_error / tableau.error_scale
    inaccurate = h * relative > jnp.clip(_ratio * taylor_term, eps**_floor, _most)
    # What the deviation adds to the solution grows with its own growth.
    background = jnp.maximum(old, unit * (_shared * relative_old))
    background = jnp.maximum(background, unit * (_made * relative_error))
    background = jnp.where(background == 0, 1, background)
    growth = jnp.maximum(deviation / background - 1, 0)
    effect = largest_entry(growth**2 * deviation / unit) * tableau.deviation_effect
    harmful = h * effect > jnp.maximum(h * _harm * relative_error, eps**_floor)
    restart = has_grown(relative, seed) | inaccurate | (harmful & jnp.logical_not(fresh))

    excess = tableau.deviation_error_scale * (deviation - tableau.deviation_growth * old)
    excess = h * jnp.maximum(excess - usual_deviation * error, 0)
    return _Judged(restart, seed, recent_error, deviation, scales, Excess(excess, unit))


def _outer(weights: Float[Array, " 2"], x: Float[Array, " n"]) -> Float[Array, "2 n"]:
    return weights.astype(x.dtype)[:, None] * x


def _noise(tableau: ALFTableau) -> float:
    """How many rounding errors of `v` the deviation is made of."""
    assert tableau.deviation_weights is not None
    return float(np.sum(np.abs(tableau.deviation_weights)))
