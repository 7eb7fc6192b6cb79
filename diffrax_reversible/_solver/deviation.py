"""Whether the deviation of `v` from the vector field threatens the accuracy of a solve."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._coefficients.alf_tableau import ALFTableau
from .._coefficients.coarse_error import usual_deviation
from .._custom_types import BoolScalarLike, RealScalarLike, VF, Y
from .._precision import eps
from .._tree import from_bits, from_half_the_bits, real_like, to_bits, to_half_the_bits
from .entry_scales import (
    has_grown,
    largest_entry,
    largest_so_far,
    least,
    units,
    where_finite,
)


# Restart where the deviation of `v`, times the step size, exceeds `_ratio` times the Taylor
# term behind the error estimate and `eps**_floor` times the scale of the entry, and in any
# case where it exceeds `_most` times the scale. A smaller ratio restarts conservative
# problems needlessly. Tuned on Kepler's, Lorenz', Lotka and Volterra's and van der Pol's
# equations, and on networks.
_ratio = 3.0
_floor = 0.4
_most = 0.3
# The rounding errors of `v` do not decay with an entry, and steps become small to bound
# their effect. Restart where the deviation exceeds the Taylor term in the same way on the
# scale of what is left of the entry, and this part of it.
_outlives = 1e-2
# A step that is short because an output is due says little about the errors of the next
# steps. Errors of earlier steps count too, with this factor for each step since.
_recent = 0.5
# Restart where the effect of the deviation on the solution in a step may exceed this many
# times the error of the step. Tuned on the same problems, where it adds few restarts, and
# on `examples/benchmarks/solutions.py`.
#
# It helps solutions to restart wherever the third error estimate dominates, too: steps at
# the limit of stability are then longer. But they exceed the limit for modes that have died
# out, as those of other explicit solvers do, and gradients are refused or wrong, as in
# `tests/test_growth.py::test_slow_manifold`.
_harm = 300.0
# A step itself causes a deviation of up to so many times the error estimate.
_made = 10.0
# A jump after the last evaluation of a step shows in a deviation of more than so many times
# its estimate. With a factor of one, smooth steps are rejected for it where they contract.
_usual = 5.0
# In larger arrays the third error estimate does not remember the deviation of every entry.
_remembers = 2048


class Known(NamedTuple):
    """The known facts about the deviation in one array after a step.

    `seed`, `error` and `size` are maxima over the entries, relative to `scales`.

    - `seed`: the deviation after the first step since the last restart; before that its
        possible size by rounding.
    - `error`: the error estimate of recent steps.
    - `size`: the deviation.
    - `sizes`: the deviation of every entry after recent steps, if an error estimate uses
        them and they are few.
    - `scales`: the largest magnitude of every entry since the start of the solve.
    """

    seed: Array
    error: Array
    size: Array
    sizes: Array
    scales: Array

    def pack(self) -> "Packed":
        """Bits, with the scalars stacked, which is faster for small states."""
        numbers = jnp.stack([self.seed, self.error, self.size])
        sizes, scales = map(to_half_the_bits, (self.sizes, self.scales))
        return Packed(to_bits(numbers), sizes, scales)

    @staticmethod
    def unpack(packed: "Packed", y: Array) -> "Known":
        seed, error, size = from_bits(packed.numbers, real_like(y))
        sizes, scales = (from_half_the_bits(x, y) for x in (packed.sizes, packed.scales))
        return Known(seed, error, size, sizes, scales)


class Packed(NamedTuple):
    """`Known` as bits: two or six digits of every entry, in half the memory of a state."""

    numbers: Int[Array, "3"]
    sizes: Int[Array, "..."]
    scales: Int[Array, "..."]


class Deviation(eqx.Module):
    """The known facts about the deviation of `v` after a step: part of the solver state."""

    # Whether `v` has to be restarted before the next step.
    restart: BoolScalarLike
    # A `Packed` for every array of the state.
    known: PyTree[Array]

    @staticmethod
    def start(tableau: ALFTableau, y: Y, v: VF) -> "Deviation":
        """The facts at a state where `v` was evaluated."""

        def known(y):
            (scales,) = where_finite(jnp.abs(y))
            zero = jnp.zeros((), scales.dtype)
            remembers = has_third_estimate(tableau) and y.size <= _remembers
            sizes = jnp.zeros(y.shape if remembers else 0, scales.dtype)
            return Known(zero, zero, zero, sizes, scales)

        packed = jtu.tree_map(lambda y: known(y).pack(), y)
        return Deviation(jnp.array(False), packed).restarted(tableau, v)

    def restarted(self, tableau: ALFTableau, v: VF) -> "Deviation":
        """The facts after a restart, with the new `v`."""

        def restart(v: Array, packed: Packed) -> Packed:
            known = Known.unpack(packed, v)
            rounding = _noise(tableau) * eps(v)
            (size,) = where_finite(jnp.abs(v))
            relative = largest_entry(size / units(known.scales))
            return known._replace(seed=relative * rounding).pack()

        return Deviation(jnp.array(False), jtu.tree_map(restart, v, self.known))

    def across_jump(self, v: VF) -> "Deviation":
        """The facts after a jump: the next step must not count another field as growth."""

        def cross(v: Array, packed: Packed) -> Packed:
            known = Known.unpack(packed, v)
            size, sizes = (jnp.full_like(x, jnp.inf) for x in (known.size, known.sizes))
            return known._replace(size=size, sizes=sizes).pack()

        return Deviation(self.restart, jtu.tree_map(cross, v, self.known))

    def after_step(
        self,
        tableau: ALFTableau,
        control: RealScalarLike,
        resolution: RealScalarLike,
        evaluated: BoolScalarLike,
        y: Y,
        v: VF,
        error: Y,
        deviation: VF,
        missed: VF | None,
    ) -> tuple["Deviation", PyTree[Float[Array, "..."]] | None]:
        """Judge whether the deviation threatens the accuracy of the next steps or of the
        backward pass.

        Every entry is measured on its own scale, so that small entries are not missed.

        **Arguments:**

        - `control`, `resolution`: the length of the step, and up to which length steps are
            a matter of rounding.
        - `evaluated`: whether there was no deviation before the step.
        - `y`, `v`: the state and its derivative at its end.
        - `error`, `deviation`: the sums of stage derivatives that give them.
        - `missed`: the deviation at its end, if that was evaluated.

        **Returns:**

        The known facts after the step, and an error estimate, or `None`: the growth of the
        deviation beyond that of a stable step.
        """
        structure = jtu.tree_structure(y)
        trees = y, v, error, deviation, self.known
        leaves = [structure.flatten_up_to(x) for x in trees]
        restart, known, excess = jnp.array(False), [], []
        ends = [None] * structure.num_leaves
        if missed is not None:
            ends = structure.flatten_up_to(missed)
        step = tableau, control, resolution, evaluated
        for leaf, v_of, error_of, deviation_of, packed, end in zip(
            *leaves, ends, strict=True
        ):
            before = Known.unpack(packed, leaf)
            judged = _judge(*step, leaf, v_of, error_of, deviation_of, end, before)
            restart = restart | judged[0]
            known.append(judged[1].pack())
            excess.append(judged[2])
        known = jtu.tree_unflatten(structure, known)
        if any(x is None for x in excess):
            return Deviation(restart, known), None
        return Deviation(restart, known), jtu.tree_unflatten(structure, excess)


def _judge(
    tableau: ALFTableau,
    control: RealScalarLike,
    resolution: RealScalarLike,
    evaluated: BoolScalarLike,
    y: Array,
    v: Array,
    error: Array,
    deviation: Array,
    missed: Array | None,
    before: Known,
) -> tuple[BoolScalarLike, Known, Float[Array, "..."] | None]:
    """The judgement of `Deviation.after_step` for one array."""
    h = jnp.abs(jnp.asarray(control, y.dtype))
    floor = eps(y) ** _floor
    y, v, deviation, error = where_finite(
        *(y, jnp.abs(v), jnp.abs(deviation), jnp.abs(error))
    )
    scales, unit = largest_so_far(before.scales, y)
    # Two reductions, which under `vmap` are faster on a CPU than one.
    relative = largest_entry(deviation / unit)
    relative_error = largest_entry(error / unit)

    seed = jnp.where(evaluated, jnp.maximum(before.seed, relative), before.seed)
    recent_error = jnp.maximum(relative_error, _recent * before.error)
    taylor_term = h * recent_error / tableau.error_scale
    inaccurate = h * relative > jnp.clip(_ratio * taylor_term, floor, _most)
    # What is left of an entry that has decayed, which at a zero crossing still moves.
    left = jnp.maximum(jnp.maximum(jnp.abs(y), h * v), least(unit))
    taylor_term_of_left = h * largest_entry(error / left) / tableau.error_scale
    allowed = jnp.clip(_ratio * taylor_term_of_left, _outlives, _most)
    outlives = h * largest_entry(deviation / left) > allowed
    # The effect of the deviation on the solution increases with its growth.
    background = jnp.maximum(before.size, _made * relative_error)
    growth = jnp.maximum(relative / jnp.where(background == 0, 1, background) - 1, 0)
    effect = tableau.deviation_effect * growth**2 * relative
    harmful = h * effect > jnp.maximum(h * _harm * relative_error, floor)
    restart = (
        has_grown(relative, seed)
        | inaccurate
        | outlives
        | (harmful & jnp.logical_not(evaluated))
    )

    remembers = before.sizes.shape == y.shape
    sizes = before.sizes
    if remembers:
        # The estimate of a deviation that changes its sign may be small by chance.
        faded = jnp.where(evaluated | jnp.isinf(sizes), 0, _recent * sizes)
        sizes = jnp.maximum(deviation, faded)
    known = Known(seed, recent_error, relative, sizes, scales)
    # What is not remembered was at most the largest, on the scale of the entry.
    old = jnp.where(evaluated, 0, before.sizes if remembers else before.size * unit)
    excess = _excess(tableau, deviation, old, missed)
    if excess is not None:
        # A jump is at a time that is itself rounded, so no smaller step is more accurate.
        h = jnp.maximum(h - jnp.asarray(resolution, h.dtype), 0)
        excess = h * jnp.maximum(excess - usual_deviation * error, 0)
    return restart, known, excess


def _excess(
    tableau: ALFTableau, deviation: Array, old: Array, missed: Array | None
) -> Float[Array, "..."] | None:
    """The part of a deviation that did not arise from the `old` one, as an error per unit
    of time; `None` if no error estimate uses it."""
    third = has_third_estimate(tableau)
    if not third and missed is None:
        return None
    # Before its first evaluation, and after its last one, a step drifts with `v`.
    drift = abs(float(tableau.drifts[-1]))
    scale = tableau.deviation_error_scale if third else drift
    # After a jump that was crossed, `old` is infinite.
    excess = scale * jnp.maximum(deviation - tableau.deviation_growth * old, 0)
    if missed is None:
        return excess
    # The vector field at the end of a step may not be finite where the step is.
    _, unseen = where_finite(missed, jnp.abs(missed) - _usual * deviation)
    return excess + drift * jnp.maximum(unseen, 0)


def has_third_estimate(tableau: ALFTableau) -> bool:
    """Whether the growth of the deviation is an error estimate."""
    return tableau.deviation_error_scale > 0


def _noise(tableau: ALFTableau) -> float:
    """The rounding error of the deviation, as a multiple of that of `v`."""
    assert tableau.deviation_weights is not None
    return float(np.sum(np.abs(tableau.deviation_weights)))
