"""By how much an entry of a cotangent has grown where it should decay."""

import math

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool

from .._solver.entry_scales import units
from .._tree import largest


# All of these are tuned, with ALF4, 6 and 8 at tolerances from 1e-10 to 1e-3: to refuse
# wrong gradients on a heat equation and a fast linear mode, and to accept right ones on van
# der Pol's, Lorenz' and Kepler's equations, on networks, and on states with entries in very
# different units.
#
# Steps with `-h λ` between these may be too large for a mode. Beyond, `λ` is not a mode's
# but due to entries in other units.
_contracts = 1.0
_at_most = 1000.0
# In a step that contracts, an entry decays at least by this factor.
_decayed = math.exp(-_contracts)
# The limit per step on counting as grown because an entry has not decayed: a step or two
# that are barely accurate prove nothing.
_most_lag = 2.0
# In an unstable step, growth beyond this is no matter of accuracy.
_leap = 100.0
# If the backward pass restarts, so that the second approximation does not spoil the
# cotangent, only steps with more than this fraction of the stability limit count.
_unstable = 0.75
# Smaller steps count as well if the cotangent of a solver state that has departed from the
# state pulls back to so many times the cotangent of the state.
_parasitic = 2.0
# The largest size of an entry of the cotangent decays by this factor per step, to detect
# growth that begins after the entry has decayed.
remembered = 0.97
# The limit per step on growth that other entries may have passed on.
_passed_on = 3.0
# An entry is next to zero below this fraction of the largest in its array.
_next_to_zero = 0.1
# The growth of an entry is multiplied by this after a step that shows it to be slow.
_acquitted = 0.25


def grow(
    control: Array,
    stable: Array,
    size: BFloat16[Array, "..."],
    factor: BFloat16[Array, "..."],
    vf_bar: Array,
    pulled: Array,
    y_bar: Array,
    outputs: Array,
) -> Array:
    """The next of the `Growth.factors` of an array, from its `Probe`.

    - `stable`: the limit of stability of `|h λ|`, if the second approximation does not
        spoil the cotangent; otherwise zero.
    """
    y_bar = jnp.abs(y_bar)
    size = size.astype(y_bar.dtype) + outputs
    rate, strength = control.astype(pulled.dtype) * pulled, jnp.abs(vf_bar)
    alone = stable > 0
    contracts = _contracts_in(rate, vf_bar, pulled, y_bar, stable)
    # An entry that grows from zero, as other entries are passed on to it, does not count.
    # Passed on in larger units, it grows more, but by no more than the quotient, which an
    # unstable step exceeds. With outputs in the step, the two cannot be distinguished,
    # unless the entry outgrows all of them, without a second approximation that adds to it.
    known = size == units(size)
    by = y_bar / units(size)
    beside_all = y_bar / units(size + largest(outputs))
    outgrows = alone & (beside_all * strength > jnp.abs(rate))
    by = jnp.where((outputs != 0) & outgrows, beside_all, by)
    unstable = (by * strength > jnp.abs(rate)) & ((outputs == 0) | outgrows)
    # Among thousands of entries some are next to zero, where the quotient may have any
    # size, just before other entries are passed on to them: a single step of these proves
    # nothing.
    factor = factor.astype(by.dtype)
    next_to_zero = strength < _next_to_zero * largest(strength)
    most = jnp.where(next_to_zero, _passed_on * factor, jnp.inf)
    most = jnp.where(unstable, most, _passed_on)
    # An entry that has not decayed, with the quotient of a slow mode, does not consist of
    # growing fast ones.
    slow = jnp.logical_not(contracts) & (2 * by > 1)
    by = jnp.minimum(by, most)
    # Where the cotangent of `v` prevails, an entry should decay as that does. One that
    # stays as it is, perhaps for hundreds of steps, is spoilt, although it never grows.
    lags = contracts & (jnp.abs(pulled) > y_bar) & (outputs == 0)
    lags &= jnp.logical_not(alone | (unstable & (by > _leap)))
    lag = jnp.clip(by / _decayed, 1, _most_lag)
    by = jnp.where(contracts | (by < 1), jnp.maximum(by, remembered), 1)
    by = jnp.where(lags, lag, by)
    by = jnp.where(slow, _acquitted, jnp.where(known, by, 1))
    return jnp.maximum(factor * by, 1)


def _contracts_in(
    rate: Array, vf_bar: Array, pulled: Array, y_bar: Array, stable: Array
) -> Bool[Array, "..."]:
    """Whether the step may be too large for the mode that an entry shows, see `grow`."""
    strength, product = jnp.abs(vf_bar), jnp.real(rate * jnp.conj(vf_bar))
    alone = stable > 0
    least = jnp.where(alone, _unstable * stable, _contracts).astype(strength.dtype)
    contracts = product < -least * strength**2
    contracts &= jnp.abs(rate) < _at_most * strength
    parasitic = (product < 0) & (jnp.abs(pulled) > _parasitic * y_bar)
    return contracts | (parasitic & jnp.logical_not(alone))
