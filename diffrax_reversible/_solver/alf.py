"""Asynchronous leapfrog and its compositions."""

from typing import Any, ClassVar, NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractAdaptiveSolver, AbstractTerm, ControlTerm, RESULTS
from jaxtyping import Array, PyTree

from .._coefficients.alf import alf2, alf4, alf6, alf8
from .._coefficients.tableau import ALFTableau
from .._custom_types import (
    Args,
    Bind,
    BoolScalarLike,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    VF,
    Y,
)
from .._diffrax import WrapTerm
from .._tree import tree_add, tree_axpy, tree_scale
from .base import AbstractReversibleSolver, Cotangent, maybe_restart
from .interpolation import HermiteInterpolation


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


# A restart where the deviation of `v`, times the step size, exceeds this many times the
# Taylor term of the error estimate, or this power of the machine epsilon times the state.
_restart_ratio = 3.0
_restart_floor = 0.4
_sample_size = 1024

# Which linear functionals of a step are formed in full, and which on a sample.
_sums = ("error", "y_mid", "k_mid")
_watched = ("deviation", "error")


class _SubStep(NamedTuple):
    """One sub-step's share of the tableau; stacked along the first axis for a step."""

    length: Array
    midpoint: Array
    # The weight of the evaluation in each of the linear functionals of a step.
    weights: dict[str, Array]


class ALFState(eqx.Module):
    """Solver state: `v`, and whether it has to be restarted before the next step.

    Of a cotangent, `restart` is `None`.
    """

    v: VF
    restart: BoolScalarLike | None


class AbstractALF(AbstractReversibleSolver[ALFState], AbstractAdaptiveSolver[ALFState]):
    """Compositions of asynchronous-leapfrog sub-steps, for ODEs.

    The solver state holds `v`, a second approximation to the vector field `f(t, y)`, of
    the structure of the state. With it, a step is a chain of sub-steps

        k = z + h/2 v,    u = f(t + h/2, k),    v' = 2u - v,    z' = k + h/2 v'

    each of which is undone by one evaluation of `f` at the same point `k`. The same
    evaluation serves to pull cotangents back:

        v̄ <- v̄' + h/2 z̄',  k̄ = z̄' + (∂f/∂z)ᵀ 2v̄,  θ̄ += (∂f/∂θ)ᵀ 2v̄,  z̄ = k̄,  v̄ <- h/2 k̄ - v̄

    so that the backward pass costs one evaluation and one pull-back a sub-step.
    """

    tableau: AbstractVar[ALFTableau]

    term_structure: ClassVar = AbstractTerm[Any, RealScalarLike]
    interpolation_cls: ClassVar = HermiteInterpolation

    def order(self, terms: Terms) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Terms) -> int:
        del terms
        assert self.tableau.embedded_order is not None
        return self.tableau.embedded_order + 1

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> ALFState:
        del t1
        _check_term(self, terms)
        _check_state(self, y0)
        # Checkpointed, as otherwise a gradient would hold on to the activations of this
        # evaluation for the length of the solve.
        v = eqx.filter_checkpoint(type(terms).vf)(terms, t0, y0, args)
        return ALFState(v, jnp.array(False))

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: ALFState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, ALFState, RESULTS]:
        v0 = maybe_restart(self, terms, t0, y0, args, solver_state, made_jump).v
        control = terms.contr(t0, t1)

        def sub_step(carry, sub: _SubStep):
            z, v, sums, samples = carry
            half = control * sub.length / 2
            k = tree_axpy(half, v, z)
            u = terms.vf(t0 + sub.midpoint * (t1 - t0), k, args)
            v = jtu.tree_map(lambda ui, vi: 2 * ui - vi, u, v)
            z = tree_axpy(half, v, k)
            sums = _accumulate(sums, sub.weights, u)
            samples = _accumulate(samples, sub.weights, _sample(u))
            return z, v, sums, samples

        functionals = self._functionals()
        first = {name: w[0] for name, w in functionals.items()}
        sums = {name: tree_scale(w, v0) for name, w in first.items() if name in _sums}
        sample = _sample(v0)
        samples = {n: tree_scale(w, sample) for n, w in first.items() if n in _watched}
        carry = (y0, v0, sums, samples)
        y1, v1, sums, samples = self._chain(sub_step, carry, functionals, t0)
        sums = {name: tree_scale(control, total) for name, total in sums.items()}
        samples = {name: tree_scale(control, total) for name, total in samples.items()}
        y_error = sums.pop("error")
        restart = self._deviates(samples, _sample(y1))
        k0, k1 = tree_scale(control, v0), tree_scale(control, v1)
        dense_info = dict(y0=y0, y1=y1, k0=k0, k1=k1, **sums)
        return y1, y_error, dense_info, ALFState(v1, restart), RESULTS.successful

    def needs_restart(self, solver_state: ALFState) -> BoolScalarLike:
        if self.tableau.deviation_weights is None or solver_state.restart is None:
            return False
        return solver_state.restart

    def restart(
        self,
        terms: AbstractTerm,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: ALFState,
    ) -> ALFState:
        del solver_state
        return ALFState(terms.vf(t, y, args), jnp.array(False))

    def _deviates(self, samples: dict[str, Y], y1: Y) -> BoolScalarLike:
        """Whether the deviation of `v` threatens the accuracy of the next steps.

        It is compared, times the step size, with the Taylor term that the error estimate
        is made of, and with the size of the state where both are next to nothing.
        """
        if "deviation" not in samples:
            return jnp.array(False)
        ratio = _restart_ratio / self.tableau.error_scale

        def deviates(d, e, y):
            d, e, y = (jnp.max(jnp.abs(x), initial=0) for x in (d, e, y))
            floor = jnp.finfo(y.dtype).eps ** _restart_floor
            return d > jnp.maximum(ratio * e, floor * y)

        watched = samples["deviation"], samples["error"], y1
        leaves = jtu.tree_leaves(jtu.tree_map(deviates, *watched))
        return jnp.any(jnp.stack(leaves)) if leaves else jnp.array(False)

    def inverse_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: ALFState,
    ) -> tuple[Y, ALFState]:
        control = terms.contr(t0, t1)

        def sub_step(carry, sub: _SubStep):
            z, v = carry
            half = control * sub.length / 2
            k = tree_axpy(-half, v, z)
            u = terms.vf(t0 + sub.midpoint * (t1 - t0), k, args)
            v = jtu.tree_map(lambda ui, vi: 2 * ui - vi, u, v)
            return tree_axpy(-half, v, k), v

        carry = (y1, solver_state.v)
        y0, v0 = self._chain(sub_step, carry, {}, t0, reverse=True)
        return y0, ALFState(v0, jnp.array(False))

    def inverse_step_and_pullback(
        self,
        bind: Bind,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: ALFState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> tuple[Y, ALFState, Cotangent]:
        control = bind(params)[0].contr(t0, t1)
        start, functionals, sums_cotangent = None, {}, {}
        if dense_cotangent is not None:
            start, end, sums_cotangent = _split(dense_cotangent, control)
            cotangent = _add_state(cotangent, *end)
            functionals = {name: self._functionals()[name] for name in sums_cotangent}
            assert all(w[0] == 0 for w in functionals.values())

        def sub_step(carry, sub: _SubStep):
            z, v, ct = carry
            half = control * sub.length / 2
            k = tree_axpy(-half, v, z)
            u, pull = _linearise_field(bind, t0 + sub.midpoint * (t1 - t0), k, params)
            v = jtu.tree_map(lambda ui, vi: 2 * ui - vi, u, v)
            z = tree_axpy(-half, v, k)
            v_bar = tree_axpy(half, ct.y, ct.solver_state.v)
            u_bar = tree_scale(2, v_bar)
            for name, weight in sub.weights.items():
                u_bar = tree_axpy(weight, sums_cotangent[name], u_bar)
            k_bar, params_bar = pull(u_bar)
            z_bar = tree_add(ct.y, k_bar)
            v_bar = jtu.tree_map(jnp.subtract, tree_scale(half, z_bar), v_bar)
            state_bar = ALFState(v_bar, None)
            return z, v, Cotangent(z_bar, state_bar, tree_add(ct.params, params_bar))

        carry = (y1, solver_state.v, cotangent)
        y0, v0, cotangent = self._chain(sub_step, carry, functionals, t0, reverse=True)
        if start is not None:
            cotangent = _add_state(cotangent, *start)
        return y0, ALFState(v0, jnp.array(False)), cotangent

    def _functionals(self) -> dict[str, np.ndarray]:
        """Weights of `u_0 = v_0, u_1, ..., u_s` in what a step returns besides `(z, v)`."""
        functionals = {"error": self.tableau.error_weights}
        if self.tableau.midpoint_weights is not None:
            functionals["y_mid"], functionals["k_mid"] = self.tableau.midpoint_weights
        if self.tableau.deviation_weights is not None:
            functionals["deviation"] = self.tableau.deviation_weights
        return functionals

    def _chain(self, sub_step, carry, functionals, t0, reverse: bool = False):
        """Scan `sub_step` over the sub-steps (compiles faster than unrolling them)."""
        dtype = jnp.result_type(t0)
        sub_steps = _SubStep(
            jnp.asarray(self.tableau.sub_steps, dtype),
            jnp.asarray(self.tableau.midpoints, dtype),
            {name: jnp.asarray(w[1:], dtype) for name, w in functionals.items()},
        )
        if self.tableau.stages == 1:
            return sub_step(carry, jtu.tree_map(lambda x: x[0], sub_steps))
        carry, _ = lax.scan(
            lambda carry, sub: (sub_step(carry, sub), None),
            carry,
            sub_steps,
            reverse=reverse,
        )
        return carry


def _accumulate(sums: dict[str, Y], weights: dict[str, Array], u: VF) -> dict[str, Y]:
    return {name: tree_axpy(weights[name], u, total) for name, total in sums.items()}


def _sample(x: PyTree[Array]) -> PyTree[Array]:
    """About a thousand entries of every array that has many more, evenly spread.

    The deviation of `v` is watched there, as to watch every entry would cost as many
    passes over memory as a cheap vector field does. The stride is odd, for axes of even
    length not to be sampled at the same places each time.
    """

    def sample(leaf):
        if leaf.size <= 2 * _sample_size:
            return leaf
        return leaf.reshape(-1)[:: leaf.size // _sample_size | 1]

    return jtu.tree_map(sample, x)


def _linearise_field(bind: Bind, t: RealScalarLike, k: Y, params: Params):
    """The vector field at `(t, k)` and its pull-back, from one evaluation."""

    def field(k, params):
        terms, args = bind(params)
        return terms.vf(t, k, args)

    return jax.vjp(field, k, params)


def _split(dense_cotangent: DenseInfo, control: RealScalarLike):
    """Cotangents of `(y0, v0)`, of `(y1, v1)` and of the sums `Σ w_i u_i`."""
    ct = dict(dense_cotangent)
    start = ct.pop("y0"), tree_scale(control, ct.pop("k0"))
    end = ct.pop("y1"), tree_scale(control, ct.pop("k1"))
    return start, end, {name: tree_scale(control, leaf) for name, leaf in ct.items()}


def _add_state(cotangent: Cotangent, y: Y, v: VF) -> Cotangent:
    return Cotangent(
        tree_add(cotangent.y, y),
        ALFState(tree_add(cotangent.solver_state.v, v), None),
        cotangent.params,
    )


def _check_term(solver: AbstractALF, term: AbstractTerm) -> None:
    while isinstance(term, WrapTerm):
        term = term.term
    if isinstance(term, ControlTerm):
        raise ValueError(
            f"`diffeqsolve(..., solver={type(solver).__name__}())` solves ordinary "
            "differential equations and got a `ControlTerm`. If the control is "
            "differentiable use `ControlTerm(...).to_ode()`; for stochastic differential "
            "equations use for example `diffrax.ReversibleHeun()`."
        )


def _check_state(solver: AbstractALF, y0: Y) -> None:
    for leaf in jtu.tree_leaves(y0):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"`diffeqsolve(..., solver={type(solver).__name__}(), y0=...)` needs a "
                f"state of real floating-point arrays, got {jnp.result_type(leaf)}. "
                "Split complex states into their real and imaginary parts."
            )


class ALF2(AbstractALF):
    """Asynchronous leapfrog.

    Order 2, embedded order 1, one evaluation a step (and one at the start), cubic Hermite
    interpolation of order 2.

    Algebraically reversible: a step is undone by one evaluation, up to rounding. The
    price is the second half of the state, `v`, of which the deviation from the vector
    field grows where the flow contracts. With a single sub-step it cannot be told from the
    local error, so that this solver does not restart as the others do: avoid it on
    dissipative problems.

    ??? cite "Reference"

        Mutze (2013), arXiv:1311.6602; Zhuang, Dvornek, Tatikonda & Duncan (2021), *MALI*,
        arXiv:2102.04668.
    """

    tableau: ClassVar[ALFTableau] = alf2


class ALF4(AbstractALF):
    """Fourth-order composition of asynchronous leapfrog.

    Order 4, embedded order 3, five evaluations a step (and one at the start), cubic
    Hermite interpolation of order 4. The one to start with at the tolerances of machine
    learning, 1e-3 to 1e-6.

    Algebraically reversible: a step is undone by five evaluations, up to rounding. Where
    the flow contracts, the deviation of `v` from the vector field grows, and `v` is
    restarted, at one evaluation, before it matters: about once for every `λ T = 10`.

    ??? cite "Reference"

        McLachlan & Atela (1992), doi:10.1088/0951-7715/5/2/011, for the splitting method
        that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf4


class ALF6(AbstractALF):
    """Sixth-order composition of asynchronous leapfrog.

    Order 6, embedded order 5, twenty evaluations a step (and one at the start), quintic
    interpolation of order 5. For tolerances of 1e-6 and below, and for long integrations.

    Algebraically reversible: a step is undone by twenty evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does.

    ??? cite "Reference"

        Blanes & Moan (2002), doi:10.1016/S0377-0427(01)00492-7, method S10 of order 6,
        for the splitting method that its coefficients come from.
    """

    tableau: ClassVar[ALFTableau] = alf6


class ALF8(AbstractALF):
    """Eighth-order composition of asynchronous leapfrog.

    Order 8, embedded order 7, thirty-four evaluations a step (and one at the start),
    quintic interpolation of order 6. For tolerances of 1e-10 and below.

    Algebraically reversible: a step is undone by thirty-four evaluations, up to rounding.
    Restarts as [`diffrax_reversible.ALF4`][] does.

    ??? cite "Reference"

        Kahan & Li (1997), doi:10.1090/S0025-5718-97-00873-9, composition of 17 stages, on
        pairs of sub-steps.
    """

    tableau: ClassVar[ALFTableau] = alf8


class ALF(AbstractALF):
    """Asynchronous leapfrog composed with coefficients of your own.

    As [`diffrax_reversible.ALF4`][], with the order, embedded order, evaluations and
    interpolation of the tableau.
    """

    tableau: ALFTableau = eqx.field(static=True)


for _cls in (ALF2, ALF4, ALF6, ALF8):
    _cls.__init__.__doc__ = """**Arguments:** None"""

ALF.__init__.__doc__ = """**Arguments:**

- `tableau`: an [`diffrax_reversible.ALFTableau`][], which checks its coefficients.
"""
