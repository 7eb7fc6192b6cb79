"""Whether the deviation of `v` from the vector field threatens the accuracy of a solve."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._coefficients.coarse_error import usual_deviation
from .._coefficients.tableau import ALFTableau
from .._custom_types import BoolScalarLike, RealScalarLike, VF, Y
from .._precision import eps
from .._tree import from_bits, real_like, to_bits, tree_add, tree_outer
from .entry_scales import has_grown, largest_entry, largest_so_far, sample, units
from .error_estimate import Excess


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
# A step itself makes a deviation of up to so many times the error estimate.
_made = 10.0


def watch_weights(tableau: ALFTableau) -> Float[Array, "stages+1 2"] | None:
    """Weights of `u_0 = v_0, u_1, ..., u_s` in the deviation and in the error estimate.

    `None` where the deviation cannot be told.
    """
    if tableau.deviation_weights is None:
        return None
    return jnp.stack([tableau.deviation_weights, tableau.error_weights], axis=1)


class Known(NamedTuple):
    """What is known of the deviation in one array after a step.

    But for those of single entries, sizes are relative to `scales`, and the largest ones.

    - `seed`: of the deviation after the first step since the last restart; before that what
        it may be by rounding.
    - `error`: of the error estimate of recent steps.
    - `size`: of the deviation.
    - `sizes`: those of the sampled entries, but only if an error estimate is made of them.
    - `scales`: the largest magnitude that they have had since the start of the solve.
    """

    seed: Array
    error: Array
    size: Array
    sizes: Array
    scales: Array

    def pack(self) -> "Packed":
        """As bits, and scalars together, for which small states are the faster. What may be
        sharded stays by itself."""
        numbers = jnp.stack([self.seed, self.error, self.size])
        return to_bits(Packed(numbers, self.sizes, self.scales))

    @staticmethod
    def unpack(packed: "Packed", y: Array) -> "Known":
        real: Any = real_like(y)
        packed = from_bits(packed, Packed(real, real, real))
        seed, error, size = packed.numbers
        return Known(seed, error, size, packed.sizes, packed.scales)


class Packed(NamedTuple):
    """`Known`, as bits."""

    numbers: Array
    sizes: Array
    scales: Array


class Deviation(eqx.Module):
    """What is known of the deviation of `v` after a step: part of the solver state."""

    # Whether `v` has to be restarted before the next step.
    restart: BoolScalarLike
    # For every array of the state a `Packed`.
    known: PyTree[Array]

    @staticmethod
    def start(tableau: ALFTableau, y: Y, v: VF) -> "Deviation":
        """Where `v` was evaluated."""

        def known(y):
            zero, scales = jnp.zeros((), real_like(y).dtype), jnp.abs(sample(y))
            sizes = jnp.zeros_like(scales) if _keeps_sizes(tableau) else scales[:0]
            return Known(zero, zero, zero, sizes, scales)

        packed = jtu.tree_map(lambda y: known(y).pack(), y)
        return Deviation(jnp.array(False), packed).restarted(tableau, v)

    def restarted(self, tableau: ALFTableau, v: VF) -> "Deviation":
        """After a restart, with the new `v`."""

        def restart(v: Array, packed: Packed) -> Packed:
            known = Known.unpack(packed, v)
            rounding = _noise(tableau) * eps(v)
            relative = largest_entry(jnp.abs(sample(v)) / units(known.scales))
            return known._replace(seed=relative * rounding).pack()

        return Deviation(jnp.array(False), jtu.tree_map(restart, v, self.known))

    def across_jump(self, v: VF) -> "Deviation":
        """What the next step makes of another field is no growth."""

        def cross(v: Array, packed: Packed) -> Packed:
            known = Known.unpack(packed, v)
            size, sizes = (jnp.full_like(x, jnp.inf) for x in (known.size, known.sizes))
            return known._replace(size=size, sizes=sizes).pack()

        return Deviation(self.restart, jtu.tree_map(cross, v, self.known))


class DeviationWatch(eqx.Module):
    """Sums of stage derivatives that tell the deviation of `v` and the local error.

    They are kept of sampled entries, see `sample`.
    """

    sums: PyTree[Float[Array, "2 sample"]]

    @staticmethod
    def start(weights: Float[Array, " 2"], v: VF) -> "DeviationWatch":
        return DeviationWatch(tree_outer(weights, jtu.tree_map(sample, v)))

    def add(self, weight: Float[Array, " 2"], u: VF) -> "DeviationWatch":
        """Add `weight * u` of a sub-step."""
        more = tree_outer(weight, jtu.tree_map(sample, u))
        return DeviationWatch(tree_add(self.sums, more))

    def judge(
        self,
        tableau: ALFTableau,
        control: RealScalarLike,
        y: Y,
        before: Deviation,
        evaluated: BoolScalarLike,
    ) -> tuple[Deviation, PyTree[Excess | None]]:
        """Whether the deviation threatens the accuracy of the next steps, or the walk back.

        Every entry is measured by a scale of its own, see `Deviation`, so that none is too
        small to be seen.

        **Arguments:**

        - `control`: the length of the step.
        - `y`: at its end.
        - `before`: what was known before it.
        - `evaluated`: whether there was no deviation then.

        **Returns:**

        What is known now, and an error estimate for the sampled entries: by how much more
        the deviation has grown than that of a stable step does.
        """
        structure = jtu.tree_structure(y)
        leaves = (structure.flatten_up_to(x) for x in (self.sums, y, before.known))
        leaves = zip(*leaves, strict=True)
        restart, known, excess = jnp.array(False), [], []
        for sums, leaf, packed in leaves:
            judged = _judge(
                tableau, control, evaluated, sums, leaf, Known.unpack(packed, leaf)
            )
            restart = restart | judged[0]
            known.append(judged[1].pack())
            excess.append(judged[2])
        known, excess = (jtu.tree_unflatten(structure, x) for x in (known, excess))
        return Deviation(restart, known), excess


def _judge(
    tableau: ALFTableau,
    control: RealScalarLike,
    evaluated: BoolScalarLike,
    sums: Float[Array, "2 sample"],
    y: Array,
    before: Known,
) -> tuple[BoolScalarLike, Known, Excess | None]:
    """Of one array."""
    h = jnp.abs(jnp.asarray(control, y.dtype))
    floor = eps(y) ** _floor
    deviation, error = jnp.abs(sums)
    scales, unit = largest_so_far(before.scales, y)
    # One by one, which under `vmap` is faster on a CPU than together.
    relative = largest_entry(deviation / unit)
    relative_error = largest_entry(error / unit)

    seed = jnp.where(evaluated, jnp.maximum(before.seed, relative), before.seed)
    recent_error = jnp.maximum(relative_error, _recent * before.error)
    taylor_term = h * recent_error / tableau.error_scale
    inaccurate = h * relative > jnp.clip(_ratio * taylor_term, floor, _most)
    # What the deviation adds to the solution grows with its own growth.
    background = jnp.maximum(before.size, _made * relative_error)
    growth = jnp.maximum(relative / jnp.where(background == 0, 1, background) - 1, 0)
    effect = tableau.deviation_effect * growth**2 * relative
    harmful = h * effect > jnp.maximum(h * _harm * relative_error, floor)
    restart = (
        has_grown(relative, seed) | inaccurate | (harmful & jnp.logical_not(evaluated))
    )

    if not _keeps_sizes(tableau):
        return restart, Known(seed, recent_error, relative, before.sizes, scales), None
    old = jnp.where(evaluated, 0, before.sizes)
    excess = tableau.deviation_error_scale * (deviation - tableau.deviation_growth * old)
    excess = h * jnp.maximum(excess - usual_deviation * error, 0)
    known = Known(seed, recent_error, relative, deviation, scales)
    return restart, known, Excess(excess, unit)


def _keeps_sizes(tableau: ALFTableau) -> bool:
    return tableau.deviation_error_scale > 0


def _noise(tableau: ALFTableau) -> float:
    """How many rounding errors of `v` the deviation is made of."""
    assert tableau.deviation_weights is not None
    return float(np.sum(np.abs(tableau.deviation_weights)))
