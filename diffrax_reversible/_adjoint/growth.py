"""Detecting cotangents that grow where the solution contracts."""

import dataclasses
import functools as ft

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, BFloat16, Bool, Float, PyTree

from .._custom_types import (
    BoolScalarLike,
    IntScalarLike,
    Params,
    RealScalarLike,
    Y,
)
from .._precision import for_sums
from .._solver.cotangent import Probe
from .._solver.entry_scales import units
from .._solver.probe import Departure
from .._tree import largest, sum_of_magnitudes
from .division import Division
from .entry_growth import grow, remembered
from .plan import Plan
from .spread import Spread


# An entry counts as grown above this factor, over steps in which it should decay. Any
# solve of a few, barely accurate steps may show less.
_least = 4.0
# The accepted share of grown entries in an array of the gradient. If the initial
# state is not differentiated, a share of the largest size that the array has had: grown
# entries change sign from step to step, and hardly affect sums over the steps. The backward
# pass is done again from the same ratio on, of grown entries to the rest in an integral of
# the array over time.
_least_share = 0.01
_share_of_all = 0.3

# The second approximation spoils an entry if it is about to add more than this share of its
# size.
_spoils = 1e-3
# Steps with larger `|h λ|` are hardly stable, so that the departure is no power of it.
_stable = 4.0

# The share of what has grown in each array of a cotangent.
Shares = list[Float[Array, ""]]


class Growth(eqx.Module):
    """The growth of a cotangent where the solution contracts.

    A mode that has died out in the solution shows in neither the error estimate nor the
    deviation, so steps beyond its stability limit are accepted. The solution is unaffected,
    but the cotangent excites the mode again, and it grows in the backward pass of every
    adjoint: such steps have a large derivative, and the flow a tiny one.

    The pull-back through the vector field shows which modes an entry consists of. For
    `Jᵀ w = λ w` the quotient of both sides is `λ`, and as growing modes prevail, grown
    entries show theirs. Where a cotangent grows as the flow demands, the quotient is
    positive; if modes oscillate, it is negative only where an entry passes through zero,
    and is not at its largest. A step adds little to an entry at its largest, unless `v` of
    asynchronous leapfrog has a cotangent of its own, as its deviation has in the forward
    pass; then it adds most of it. Such an entry has to decay, so that it counts as grown
    already if it does not.

    - `sizes`: the largest size of each entry of the state's cotangent, with decay.
    - `factors`: its growth beyond that in steps where it should not grow.
    - `largest`: the largest entry of each array so far among those that have not grown.
    - `integrals`: for each array, the integral over time of the sizes of those entries that
        have grown, and of those that have not. What parameters receive is an integral, too.
    - `plan`: what the backward pass does about it.
    - `restarts`: the number of these restarts.
    - `division`: the rates at which entries that have grown should decay, and the parts of
        steps that are too large for these, if the backward pass cures that.
    - `spread`: the cotangent that the parameters have received since an entry has grown, if
        the backward pass cures that; `None` if the initial state is differentiated, or if
        there are many parameters.
    - `strained`: whether the cotangent of the initial state consists of modes that should
        decay, at the start of the solve. See `with_strain`.

    The former two are kept to two or three digits, in a quarter of the memory.
    """

    sizes: PyTree[BFloat16[Array, "..."]]
    factors: PyTree[BFloat16[Array, "..."]]
    largest: PyTree[Float[Array, ""]]
    integrals: PyTree[Float[Array, "2"]]
    plan: Plan
    restarts: IntScalarLike
    division: Division
    spread: Spread | None
    strained: BoolScalarLike

    @staticmethod
    def start(
        y_bar: Y,
        plan: Plan,
        division: Division,
        spread: Spread | None,
    ) -> "Growth":
        sizes = jtu.tree_map(jnp.abs, y_bar)
        ones = jtu.tree_map(jnp.ones_like, sizes)
        most = largest(sizes)
        none = jtu.tree_map(lambda m: jnp.zeros(2, for_sums(m.dtype)), most)
        sizes, ones = _few_digits(sizes), _few_digits(ones)
        no, strained = jnp.array(0), jnp.array(False)
        return Growth(sizes, ones, most, none, plan, no, division, spread, strained)

    def count(self, restart: BoolScalarLike) -> "Growth":
        return dataclasses.replace(self, restarts=self.restarts + jnp.where(restart, 1, 0))

    def expect(self, added: Y) -> "Growth":
        """The growth after outputs have `added` to the cotangent."""
        sizes = sum_of_magnitudes(added, [added])
        sizes = jtu.tree_map(lambda s, a: s.astype(a.dtype) + a, self.sizes, sizes)
        return dataclasses.replace(self, sizes=_few_digits(sizes))

    def update(
        self,
        probe: Probe,
        departure: Departure,
        when: RealScalarLike,
        parts: IntScalarLike,
    ) -> "Growth":
        """The growth after the pull-back of a step.

        - `probe`: zero if the step is divided.
        - `when`: the fraction of the steps of the solve that precede it.
        - `parts`: the number of parts that it was pulled back through.
        """
        # `first` is the better estimate, and the other one detects more.
        choose = lambda first, y: jnp.where(self.plan.cures, first, y)
        y_bar = jtu.tree_map(choose, probe.first, probe.y_bar)
        stable = jnp.where(self.plan.cures, departure.stable, 0)
        factors = jtu.tree_map(
            ft.partial(grow, jnp.asarray(probe.control), stable),
            *(self.sizes, self.factors),
            *(probe.vf_bar, probe.pulled, y_bar, probe.outputs),
        )
        sizes = jtu.tree_map(
            lambda s, o, y: jnp.maximum(remembered * (s.astype(o.dtype) + o), jnp.abs(y)),
            *(self.sizes, probe.outputs, y_bar),
        )

        def right(size, factor, so_far):
            size = jnp.where(factor <= _least, size, 0)
            return jnp.maximum(so_far, largest(size))

        rights = jtu.tree_map(right, sizes, factors, self.largest)
        control = jnp.abs(jnp.asarray(probe.control))
        integrate = ft.partial(_integrate, control)
        integrals = jtu.tree_map(integrate, probe.y_bar, factors, self.integrals)
        more = jtu.tree_map(lambda new, old: new[0] > old[0], integrals, self.integrals)
        some = jnp.stack([jnp.array(False), *jtu.tree_leaves(more)]).any()

        def with_rates(division):
            grown = jtu.tree_map(lambda f: f > _least, factors)
            return division.update(probe, sizes, grown, when)

        division = lax.cond(
            eqxi.unvmap_any(some), with_rates, lambda division: division, self.division
        )
        division = division.notice(control, when).count_parts(parts)
        sizes, factors = _few_digits(sizes), _few_digits(factors)
        new = dict(sizes=sizes, factors=factors, largest=rights, integrals=integrals)
        return dataclasses.replace(self, **new, division=division)

    def after_step(self, params_bar: Params) -> "Growth":
        """The growth at the end of a step."""
        if (spread := self.spread) is None:
            return self

        def after(spread):
            grown = [jnp.any(f > _least) for f in jtu.tree_leaves(self.factors)]
            grown = self.plan.cures & jnp.stack([jnp.array(False), *grown]).any()
            return spread.after_step(params_bar, grown)

        # Only where the first walk has found that something grew.
        some = eqxi.unvmap_any(self.plan.cures)
        spread = lax.cond(some, after, lambda s: s, spread)
        return dataclasses.replace(self, spread=spread)

    def at_known(self, params_bar: Params, here: BoolScalarLike) -> "Growth":
        """The growth at a known state, if this element is `here`."""
        if (spread := self.spread) is None:
            return self
        some = eqxi.unvmap_any(here & self.plan.cures)
        spread = lax.cond(some, lambda s: s.at_known(params_bar, here), lambda s: s, spread)
        return dataclasses.replace(self, spread=spread)

    def spoils(self, probe: Probe, departure: Departure) -> BoolScalarLike:
        """Whether this element `cures`, and the cotangent of the second approximation,
        which grows where the flow contracts, is about to spoil that of the state.

        The solve restarts where the two approximations depart. In a mode that has died out
        they do not, although the second one would amplify any perturbation of the first.
        The gradient is such a perturbation. So the backward pass restarts, too: it takes
        the gradient of a solve that restarts at that step, which differs from this one by
        as little as the two approximations do.
        """

        def spoils(size, vf_bar, pulled, second):
            rate = jnp.asarray(probe.control).astype(pulled.dtype) * pulled
            contracts = jnp.real(rate * jnp.conj(vf_bar)) < 0
            step = jnp.minimum(jnp.abs(rate) / units(jnp.abs(vf_bar)), _stable)
            added = departure.coefficient * step**departure.power * jnp.abs(second)
            return jnp.any(contracts & (added > _spoils * units(size.astype(added.dtype))))

        leaves = probe.vf_bar, probe.pulled, probe.second
        spoilt = jtu.tree_leaves(jtu.tree_map(spoils, self.sizes, *leaves))
        return self.plan.cures & jnp.stack([jnp.array(False), *spoilt]).any()

    def matters(self, gradient: Params) -> BoolScalarLike:
        """Whether what has grown may have spoilt the gradient of the parameters."""
        if self.spread is None:
            return True
        return jnp.logical_not(self.plan.cures) | self.spread.matters(gradient)

    def shares(self, y_bar: Y, beside_all: bool) -> Shares:
        """The largest grown entry of every array, as a fraction of its largest entry, or
        `beside_all`, of the largest so far, in which case larger shares are accepted."""

        def share(y_bar, factor, so_far):
            y_bar = jnp.abs(y_bar)
            grown = largest(jnp.where(factor > _least, y_bar, 0))
            more = _share_of_all / _least_share
            beside = so_far * more if beside_all else largest(y_bar)
            return grown / jnp.where(beside == 0, 1, beside)

        return jtu.tree_leaves(jtu.tree_map(share, y_bar, self.factors, self.largest))

    def shares_of_integrals(self) -> Shares:
        """As `shares`, of what the parameters have received. By the start of the solve,
        what has grown may have been passed on to all entries, or have decayed.

        Much of it may cancel, or not reach the parameters, so that this is no reason to
        refuse a gradient.
        """

        def share(integrals):
            grown, rest = integrals
            return grown / jnp.where(rest == 0, 1, rest) * (_least_share / _share_of_all)

        return [share(integrals) for integrals in jtu.tree_leaves(self.integrals)]


def _integrate(
    length: Array, y_bar: Array, factor: Array, so_far: Float[Array, "2"]
) -> Float[Array, "2"]:
    """The `Growth.integrals` of an array after a step."""
    grown, size = factor > _least, jnp.abs(y_bar)
    parts = jnp.where(grown, size, 0), jnp.where(grown, 0, size)
    sums = jnp.stack([jnp.sum(part, dtype=so_far.dtype) for part in parts])
    return so_far + length.astype(sums.dtype) * sums


def any_grown(shares: Shares, drift_tol: float) -> Bool[Array, ""]:
    """Whether one of the `Growth.shares` is not accepted."""
    grown = [share > max(_least_share, drift_tol) for share in shares]
    return jnp.stack([jnp.array(False), *grown]).any()


def any_overflown(shares: Shares) -> Bool[Array, ""]:
    """Whether one of the `Growth.shares` is not finite, as in single precision where a
    cotangent grows over hundreds of steps."""
    finite = [jnp.isfinite(share) for share in shares]
    return jnp.logical_not(jnp.stack([jnp.array(True), *finite]).all())


def _few_digits(x: PyTree[Array]) -> PyTree[BFloat16[Array, "..."]]:
    return jtu.tree_map(lambda x: x.astype(jnp.bfloat16), x)
