"""How much of the gradient of the parameters stems from cotangents that have grown."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._custom_types import BoolScalarLike, Params
from .._precision import finest


# The accepted part of every entry of the gradient.
_accepted = 1e-3
# XLA would hold a copy of the cotangent of more parameters. Networks have more, and their
# resting states depend on them.
_most = 1024


def many(params: Params) -> bool:
    """Whether there are too many parameters to keep what each element has added to each."""
    return sum(x.size for x in jtu.tree_leaves(params)) > _most


class Spread(eqx.Module):
    """What was added to the cotangent of the parameters since that of the state has grown.

    Before its first input arrives, a system may rest in a state that does not depend on its
    parameters. Steps of any size are accurate there, and the cotangent of the state grows
    in steps that are too large for its modes. If the initial state is not differentiated,
    this matters only to the cotangent of the parameters, to which rest adds nothing.

    - `begun`: whether an entry has grown.
    - `earlier`: what was added up to the last known state, where the cotangent of the
        parameters begins anew with zero.
    - `since`: that cotangent after the last step.
    - `when_begun`: the gradient when the growth began.
    """

    begun: BoolScalarLike
    earlier: Float[Array, " parameters"]
    since: Float[Array, " parameters"]
    when_begun: Float[Array, " parameters"]

    @staticmethod
    def start(params_bar: Params, earlier: Params | None) -> "Spread | None":
        """`None` if there are too many parameters, or none.

        - `params_bar`, `earlier`: the cotangent of the parameters, and what belongs to
            known states before, if that is apart.
        """
        if many(params_bar) or len(jtu.tree_leaves(params_bar)) == 0:
            return None
        zeros = jnp.zeros_like(_flat(params_bar))
        before = zeros if earlier is None else _flat(earlier)
        return Spread(jnp.array(False), before, zeros, zeros)

    def after_step(self, params_bar: Params, grown: BoolScalarLike) -> "Spread":
        """After a step in which an entry may have `grown`."""
        begins = grown & jnp.logical_not(self.begun)
        when_begun = jnp.where(begins, self.earlier + self.since, self.when_begun)
        return Spread(self.begun | grown, self.earlier, _flat(params_bar), when_begun)

    def at_known(self, params_bar: Params, here: BoolScalarLike) -> "Spread":
        """At a known state, where `params_bar` is added to the gradient, if this element is
        `here`."""
        earlier = self.earlier + jnp.where(here, _flat(params_bar), 0)
        since = jnp.where(here, 0, self.since)
        return Spread(self.begun, earlier, since, self.when_begun)

    def matters(self, gradient: Params) -> BoolScalarLike:
        """Whether more than a thousandth of an entry of the `gradient` was added since."""
        whole = _flat(gradient)
        right = jnp.abs(whole - self.when_begun) <= _accepted * jnp.abs(whole)
        return self.begun & jnp.logical_not(right.all())


def _flat(tree: PyTree[Array]) -> Float[Array, " parameters"]:
    """The entries of all arrays as real numbers, in the finest of their dtypes."""
    parts = []
    for x in map(jnp.ravel, jtu.tree_leaves(tree)):
        parts += [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    dtype = finest(parts)
    return jnp.concatenate([x.astype(dtype) for x in parts])
