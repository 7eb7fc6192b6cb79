"""The pull-back of the interpolation data of compositions of asynchronous leapfrog."""

from collections.abc import Callable

import equinox.internal as eqxi
import jax
import jax.lax as lax

from .._custom_types import Args, Combine, DenseInfo, Params, RealScalarLike, Terms, VF, Y
from .._tree import (
    any_nonzero,
    tree_add,
    tree_axpy,
    tree_scale,
    tree_select,
    tree_zeros_like,
)
from .alf_chain import AbstractALFChain, add_weighted
from .alf_state import add_to_state, ALFState, sums_of
from .chain import run
from .cotangent import Cotangent
from .interpolation import with_slopes
from .ode_term import as_ode_term
from .pullback import StepStart


class AbstractALFDensePullback(AbstractALFChain):
    """Pulls the cotangent of the `dense_info` of a step of an `AbstractALF` back."""

    def _pull_outputs(
        self,
        combine: Combine,
        params: Params,
        control: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        start: StepStart | None,
    ) -> tuple[DenseInfo, Cotangent, dict[str, VF]]:
        """Pull the `dense_info` of a step back through the evaluations at its mid-point and
        its end. Returns what is left of its cotangent, the cotangent at the end, and that
        of the sums of evaluations, by functional."""
        _, t1, y1, _ = step
        dense = dict(dense_cotangent)
        if "k_mid" in dense:
            dense, cotangent = self._pull_midpoint(
                combine, params, step, cotangent, dense, start
            )
        cotangent = self._pull_end(
            combine, params, control, t1, y1, cotangent, dense["y1"], dense["k1"]
        )
        functionals = self._inner_functionals()
        # `u_0` is not an evaluation of this step.
        assert all(w[0] == 0 for w in functionals.values())
        inner = zip(functionals, dense["inner"], strict=True)
        return dense, cotangent, {name: tree_scale(control, bar) for name, bar in inner}

    def _pull_end(
        self,
        combine: Combine,
        params: Params,
        control: RealScalarLike,
        t: RealScalarLike,
        y: Y,
        cotangent: Cotangent,
        y_bar: Y,
        slope_bar: VF,
    ) -> Cotangent:
        """Pull the cotangents of the interpolation data at one end of the step back to the
        state there: of the solution, and of its derivative times the length of the step."""
        slope_bar = tree_scale(control, slope_bar)
        if not self._evaluates_slopes:
            return add_to_state(cotangent, y_bar, slope_bar)
        more_y_bar, params_bar = self._pull_field(combine, params, t, y, slope_bar)
        y_bar = tree_add(y_bar, more_y_bar)
        return Cotangent(
            tree_add(cotangent.y, y_bar),
            cotangent.solver_state,
            tree_add(cotangent.params, params_bar),
            cotangent.probe,
        )

    def _pull_midpoint(
        self,
        combine: Combine,
        params: Params,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        start: StepStart | None,
    ) -> tuple[DenseInfo, Cotangent]:
        """Pull the cotangent of the derivative at the mid-point back, if it is not zero."""
        t0, t1, y1, _ = step
        ct = dict(dense_cotangent)
        slope_bar = ct.pop("k_mid")
        middle = self._midpoint
        weights = self.tableau.continuous_extension.slope_weights[middle]
        control = as_ode_term(self, combine(params)[0]).contr(t0, t1)

        def mid_point():
            terms, args = combine(params)
            y0, inner = self._sum_to_midpoint(terms, args, control, step, start)
            term, ends = as_ode_term(self, terms), dict(k0=(t0, y0), k1=(t1, y1))
            slopes = {
                name: tree_scale(control, self._field(term, t, y, args))
                for name, (t, y) in ends.items()
            }
            return tree_add(y0, with_slopes(inner, weights, slopes))

        slope_bar = tree_scale(control, slope_bar)
        y_bar, params_bar = self._pull_field(
            combine, params, t0 + (t1 - t0) / 2, mid_point, slope_bar
        )
        inner = list(ct["inner"])
        inner[middle] = tree_add(inner[middle], y_bar)
        ct |= dict(y0=tree_add(ct["y0"], y_bar), inner=inner)
        for name, weight in zip(("k0", "k1"), weights, strict=False):
            ct[name] = tree_axpy(float(weight), y_bar, ct[name])
        params_bar = tree_add(cotangent.params, params_bar)
        return ct, Cotangent(cotangent.y, cotangent.solver_state, params_bar)

    def _sum_to_midpoint(
        self,
        terms: Terms,
        args: Args,
        control: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike, Y, ALFState],
        start: StepStart | None,
    ) -> tuple[Y, VF]:
        """The state at the start of a step, and the weighted sum of evaluations from there
        to the mid-point.

        They are known only once the step is undone, or made again from its `start`, which
        is done here just for that.
        """
        t0, t1, y1, solver_state = step
        name = list(self._inner_functionals())[self._midpoint]
        functional = {name: self._inner_functionals()[name]}

        def undone():
            y0, _, sums = self._walk_back(terms, t0, t1, y1, args, solver_state, functional)
            return y0, sums[name]

        def made():
            assert start is not None
            y0, state0 = start.states()
            chain = self._chain(control, t0, t1, functional)
            zeros = {name: tree_zeros_like(y1)}
            _, sums = run(chain, terms, args, sums_of(y0, state0), zeros, add_weighted)
            return y0, tree_scale(control, sums[name])

        if start is None:
            return undone()
        either = lambda: tree_select(start.needs, made(), undone())
        return lax.cond(eqxi.unvmap_any(start.needs), either, undone)

    def _pull_field(
        self,
        combine: Combine,
        params: Params,
        t: RealScalarLike,
        y: Y | Callable[[], Y],
        vf_bar: VF,
    ) -> tuple[Y, Params]:
        """Pull the cotangent of the vector field at `(t, y)` back, if it is not zero."""

        def pull():
            point = y() if callable(y) else y
            pull = self._field_pullback(combine, t, point, params)
            return pull(vf_bar)

        zeros = tree_zeros_like((vf_bar, params))
        return lax.cond(eqxi.unvmap_any(any_nonzero(vf_bar)), pull, lambda: zeros)

    def _field_pullback(self, combine: Combine, t: RealScalarLike, k: Y, params: Params):
        """The pull-back of the vector field at `(t, k)`."""

        def field(k, params):
            terms, args = combine(params)
            return as_ode_term(self, terms).vf(t, k, args)

        _, pull = jax.vjp(field, k, params)
        return pull
