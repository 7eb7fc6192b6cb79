"""Whether a cotangent grows on the way back where the solution contracts."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, BFloat16, Float, PyTree

from .._custom_types import Y
from .._solver.entry_scales import units
from .._solver.pullback import Probe
from .._tree import largest, sum_of_magnitudes


# All of these are tuned, with ALF4, 6 and 8 at tolerances from 1e-10 to 1e-3. On a heat
# equation and a fast linear mode gradients that are off have to be refused, and on van der
# Pol's, Lorenz' and Kepler's equations, on networks, and on states of entries in very
# different units none of those that are right.
#
# Steps with `h λ` between these may be too large for a mode. What is beyond is no mode, but
# other entries in other units.
_contracts = -1.0
_at_most = 1000.0
# In smaller steps as well, if the cotangent of a solver state that has grown apart from the
# state pulls back to so many times the cotangent of the state.
_parasitic = 2.0
# What an entry of the cotangent has been is forgotten by so much a step, for growth to be
# seen that begins after an entry has decayed.
_remembered = 0.97
# By so much an entry has to grow in steps in which it should not. By less it may in any
# solve of a few steps that are barely accurate.
_least = 4.0
# Of growth that may have been passed on by other entries, this much counts.
_passed_on = 3.0
# Beside the largest of its array.
_next_to_zero = 0.1
# What an entry has grown by counts this much after a step in which it is seen to be slow.
_acquitted = 0.25
# A share of an array of the gradient that may be made up of what has grown. If the state
# that the solve starts from is not differentiated, a share of what the array has ever been:
# what has grown changes sign from step to step, and sums over the steps hardly see it.
least_share = 0.01
_share_of_all = 0.3


class Growth(eqx.Module):
    """What is known of the growth of a cotangent.

    A mode of which the solution has died out can be seen neither by the error estimate nor
    by the deviation, and steps are accepted that it is not stable for. The solution is the
    same, but the cotangent excites the mode again, and it grows on the way back, under
    whatever adjoint: the derivative of such steps is large, and that of the flow is tiny.

    The modes that an entry is made of are told by how the vector field pulls cotangents
    back. Of `Jᵀ w = λ w` the quotient of both sides is `λ`, and as growing modes prevail,
    what has grown shows its own. A cotangent may well grow as the flow demands; then the
    quotient is positive, or if modes oscillate, then it is negative only where an entry
    passes through zero, and is not at its largest. What a step adds to an entry at its
    largest is little of it, but if `v` of asynchronous leapfrog has a cotangent of its own,
    as the deviation of `v` has in the forward pass, then that is most of it.

    - `sizes`: what each entry of the cotangent of the state has been at the most, less what
        is forgotten.
    - `factors`: by how much it has grown beyond that where it should not.
    - `largest`: the largest entry of each array that there has been of those that had not.

    The former two are kept to two or three digits, in a quarter of the memory.
    """

    sizes: PyTree[BFloat16[Array, "..."]]
    factors: PyTree[BFloat16[Array, "..."]]
    largest: PyTree[Float[Array, ""]]

    @staticmethod
    def start(y_bar: Y) -> "Growth":
        sizes = jtu.tree_map(jnp.abs, y_bar)
        ones = jtu.tree_map(jnp.ones_like, sizes)
        return Growth(_few_digits(sizes), _few_digits(ones), largest(sizes))

    def expect(self, added: Y) -> "Growth":
        """After outputs have `added` to the cotangent."""
        sizes = sum_of_magnitudes(added, [added])
        sizes = jtu.tree_map(lambda s, a: s.astype(a.dtype) + a, self.sizes, sizes)
        return Growth(_few_digits(sizes), self.factors, self.largest)

    def update(self, probe: Probe) -> "Growth":
        """After a step was pulled back."""
        control = jnp.asarray(probe.control)

        def grow(size, factor, vf_bar, pulled, y_bar, outputs):
            y_bar = jnp.abs(y_bar)
            size = size.astype(y_bar.dtype) + outputs
            rate, strength = control.astype(pulled.dtype) * pulled, jnp.abs(vf_bar)
            product = jnp.real(rate * jnp.conj(vf_bar))
            contracts = product < _contracts * strength**2
            contracts &= jnp.abs(rate) < _at_most * strength
            contracts |= (product < 0) & (jnp.abs(pulled) > _parasitic * y_bar)
            # Not what an entry grows from nothing, as others are passed on to it. Of units
            # in which others are large that is more, but not by more than what is pulled
            # back is beyond the entry's own; what an unstable step grows by is. Where
            # there are outputs as well, it cannot be told.
            known = size == units(size)
            by = y_bar / units(size)
            unstable = (by * strength > jnp.abs(rate)) & (outputs == 0)
            # Of thousands of entries some are next to zero, where the quotient is of any
            # size, just before others are passed on to them: of these, a single step proves
            # nothing.
            factor = factor.astype(by.dtype)
            next_to_zero = strength < _next_to_zero * largest(strength)
            most = jnp.where(next_to_zero, _passed_on * factor, jnp.inf)
            most = jnp.where(unstable, most, _passed_on)
            # An entry that has not decayed, and of which the quotient is that of a slow
            # mode, is not made of what grows in fast ones.
            slow = jnp.logical_not(contracts) & (2 * by > 1)
            by = jnp.minimum(by, most)
            by = jnp.where(contracts | (by < 1), jnp.maximum(by, _remembered), 1)
            by = jnp.where(slow, _acquitted, jnp.where(known, by, 1))
            return jnp.maximum(factor * by, 1)

        factors = jtu.tree_map(
            grow,
            *(self.sizes, self.factors),
            *(probe.vf_bar, probe.pulled, probe.y_bar, probe.outputs),
        )
        sizes = jtu.tree_map(
            lambda s, o, y: jnp.maximum(_remembered * (s.astype(o.dtype) + o), jnp.abs(y)),
            *(self.sizes, probe.outputs, probe.y_bar),
        )

        def right(size, factor, so_far):
            size = jnp.where(factor <= _least, size, 0)
            return jnp.maximum(so_far, largest(size))

        rights = jtu.tree_map(right, sizes, factors, self.largest)
        return Growth(_few_digits(sizes), _few_digits(factors), rights)

    def shares(self, y_bar: Y, beside_all: bool) -> list[Float[Array, ""]]:
        """For every array the largest entry that has grown, as a fraction of its largest,
        or `beside_all` that there have been, in which case more is let through."""

        def share(y_bar, factor, so_far):
            y_bar = jnp.abs(y_bar)
            grown = largest(jnp.where(factor > _least, y_bar, 0))
            more = _share_of_all / least_share
            beside = so_far * more if beside_all else largest(y_bar)
            return grown / jnp.where(beside == 0, 1, beside)

        return jtu.tree_leaves(jtu.tree_map(share, y_bar, self.factors, self.largest))


def _few_digits(x: PyTree[Array]) -> PyTree[BFloat16[Array, "..."]]:
    return jtu.tree_map(lambda x: x.astype(jnp.bfloat16), x)
