"""Compositions of kicks and drifts, with any coefficients."""

import functools as ft
from typing import Any, ClassVar, NamedTuple, TYPE_CHECKING

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import Array, PyTree

from .._coefficients.splitting import SplittingTableau
from .._custom_types import (
    Args,
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    VF,
    Y,
)
from .._exact_sum import LowPart, Sum
from .._isolated import isolated
from .._jaxpr import derives_custom_vjp
from .._precision import as_floats
from .._total_derivative import total_derivatives
from .._tree import (
    larger,
    largest,
    tree_add,
    tree_axpy,
    tree_scale,
    tree_zeros_like,
)
from .affine import is_affine
from .base import check_flags
from .capabilities import CanCrossJumps, HasErrorScales, HasExtraDenseInfo
from .chain import Chain, run, undo, Update
from .chain_pullback import undo_and_pull
from .error_estimate import nan_if_infinite
from .ode_term import as_ode_term
from .osculating import OsculatingInterpolation
from .pullback import Cotangent, HasPullbackFromStart, StepStart


if TYPE_CHECKING:
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


_Terms = tuple[AbstractTerm, AbstractTerm]


_no_higher_derivatives = (
    "`{}` interpolates with derivatives of the vector field, by forward mode, which a "
    "function with `jax.custom_vjp` does not have. Define it with `jax.custom_jvp`; or "
    "use `SaveAt(t1=True)` or `SaveAt(steps=True)`; or take a solver of order 4, such as "
    "`BlanesMoan4`."
)


class SplittingState(eqx.Module):
    """The solver state of a composition of kicks and drifts.

    - `force`: the force at the current state.
    - `low`: the low parts of `q` and `p`, if sums are compensated.
    - `evaluated`: whether the force was evaluated at the start of the next step, after any
        jump there, as at the start of a solve.

    In a cotangent, every field except `force` is `None`.
    """

    force: VF
    low: tuple[LowPart, LowPart] | None
    evaluated: BoolScalarLike | None


class _Stage(NamedTuple):
    """A drift and the kick after it; stacked along the first axis for a step."""

    drift: Array
    drift_time: Array
    kick: Array
    kick_time: Array
    drift_error: Array
    kick_error: Array
    # One for the last kick, and zero for all others.
    is_last: Array


class AbstractSplitting(
    CanCrossJumps[SplittingState],
    HasExtraDenseInfo[SplittingState],
    HasErrorScales[SplittingState],
    HasPullbackFromStart[SplittingState],
    AbstractAdaptiveSolver[SplittingState],
):
    """Compositions of kicks and drifts, for `q' = f(t, p)` and `p' = g(t, q)`.

    Terms are `(term_q, term_p)` and the state is `(q, p)`, two arbitrary PyTrees. A step is
    the chain

        p += h b_0 g(q),    q += h a_1 f(p),    p += h b_1 g(q),    ...

    whose last evaluation of the force `g` is the first of the next step. Each update is
    undone by a subtraction. If `f` and `g` are derivatives of a Hamiltonian
    `T(t, p) + V(t, q)`, the step is symplectic.
    """

    tableau: AbstractVar[SplittingTableau]
    compensated: AbstractVar[bool]
    bitwise: AbstractVar[bool]

    def __check_init__(self):
        check_flags(self, "compensated", "bitwise")

    # Symplectic steps do not contract, and in double precision rounding errors grow slowly.
    default_checkpoints: ClassVar[int] = 0
    differentiates_control: ClassVar[bool] = False
    term_structure: ClassVar = (AbstractTerm, AbstractTerm)
    interpolation_cls: ClassVar = OsculatingInterpolation

    def order(self, terms: _Terms) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: _Terms) -> int:
        del terms
        return self.tableau.embedded_order + 1

    def init(
        self, terms: _Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> SplittingState:
        self._check(terms, t0, y0, args)
        q, p = y0
        term_q, term_p = self._terms(terms)
        force = self._evaluate(term_p, t0, q, args)
        low = None
        if self.compensated or self.bitwise:
            velocity = self._evaluate(term_q, t0, p, args)
            increments = (term_q.contr(t0, t1), velocity), (term_p.contr(t0, t1), force)
            scales = (
                jtu.tree_map(jnp.maximum, largest(x), largest(tree_scale(h, vf)))
                for x, (h, vf) in zip(y0, increments, strict=True)
            )
            low_q, low_p = map(LowPart.start, y0, scales)
            low = (low_q, low_p)
        return SplittingState(force, low, jnp.array(True))

    def func(self, terms: _Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        (term_q, term_p), (q, p) = self._terms(terms), y0
        return term_q.vf(t0, p, args), term_p.vf(t0, q, args)

    def advance(
        self,
        terms: _Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: SplittingState,
    ) -> tuple[Y, Y, DenseInfo, SplittingState, RESULTS]:
        tableau = self.tableau
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)
        force0 = solver_state.force
        velocity0 = self._evaluate(term_q, t0, y0[1], args)

        def collect(sides, stage: _Stage, evaluated):
            (q_error, p_error, _), ((velocity, _), (force, _)) = sides, evaluated
            q_error = tree_axpy(stage.drift_error, velocity, q_error)
            p_error = tree_axpy(stage.kick_error, force, p_error)
            return q_error, p_error, force

        q, p = _sums_of(y0, solver_state)
        p = p.plus(tree_scale(h_p * tableau.kicks[0], force0))
        q_error = tree_scale(tableau.drift_error_weights[0], velocity0)
        p_error = tree_scale(tableau.kick_error_weights[0], force0)
        chain, sides = self._chain(h_q, h_p, t0, t1), (q_error, p_error, force0)
        (q, p), sides = run(chain, terms, args, (q, p), sides, collect)
        q_error, p_error, force = sides
        y1, low = _split_sums(q, p)
        y1 = jtu.tree_map(nan_if_infinite, y1, y0)
        y_error = tree_scale(h_q, q_error), tree_scale(h_p, p_error)
        velocity = term_q.vf(t1, y1[1], args)
        dense_info = dict(
            y0=y0,
            y1=y1,
            k0=(tree_scale(h_q, velocity0), tree_scale(h_p, force0)),
            k1=(tree_scale(h_q, velocity), tree_scale(h_p, force)),
        )
        solver_state = SplittingState(force, low, jnp.array(False))
        return y1, y_error, dense_info, solver_state, RESULTS.successful

    def extra_dense_info(
        self,
        terms: _Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
        dense_info: DenseInfo,
    ) -> DenseInfo:
        return {
            f"higher{end}": self._higher_derivatives(
                terms, t, (t0, t1), dense_info[f"y{end}"], args
            )
            for end, t in enumerate((t0, t1))
        }

    def _higher_derivatives(
        self,
        terms: _Terms,
        t: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike],
        y: Y,
        args: Args,
    ) -> list[VF]:
        """The second and higher derivatives of the solution for dense output."""
        t, t0, t1 = as_floats(t, *step)
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)

        def field(t, y):
            velocity, force = self.func(terms, t, y, args)
            return tree_scale(h_q, velocity), tree_scale(h_p, force)

        count = self.tableau.order // 2 - 2
        if count <= 0:
            return []
        derivatives = total_derivatives(field, count, t1 - t0)
        if derives_custom_vjp(derivatives, t, y):
            # Most solves do not read them. While `t` is traced, only a read is an error.
            message = _no_higher_derivatives.format(type(self).__name__)
            unknown = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), field(t, y))
            return [eqx.error_if(unknown, t == t, message)] * count
        _, *higher = derivatives(t, y)
        return higher

    def cross_jump(
        self,
        terms: _Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: SplittingState,
    ) -> tuple[SplittingState, BoolScalarLike]:
        """Evaluate the force again, unless it was evaluated at `t1`."""
        del t0
        _, term_p = self._terms(terms)
        force = self._evaluate(term_p, t1, y[0], args)
        crossed = SplittingState(force, solver_state.low, solver_state.evaluated)
        assert solver_state.evaluated is not None
        return crossed, jnp.logical_not(solver_state.evaluated)

    def error_scales(
        self,
        terms: _Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: SplittingState,
        y_end: Y,
        solver_state_end: SplittingState,
    ) -> tuple[Y, SplittingState]:
        """The scales of `q` and `p` are at least the size of one step's update. The scale
        of the force is at least the size that changes `p` by its own size in `length`."""
        # The force at the end is not used, so that it need not stay in memory.
        del solver_state_end
        term_q, term_p = self._terms(terms)
        velocity = self._evaluate(term_q, t0, y0[1], args)
        steps = (
            tree_scale(term.contr(t0, t1), vf)
            for term, vf in ((term_q, velocity), (term_p, solver_state.force))
        )
        q, p = (jtu.tree_map(larger, *ys) for ys in zip(y0, steps, y_end, strict=True))
        force = jtu.tree_map(
            lambda f, p: larger(f, p / jnp.asarray(length, p.dtype)), solver_state.force, p
        )
        return (q, p), SplittingState(force, None, None)

    def backward_step(
        self,
        terms: _Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: SplittingState,
    ) -> tuple[Y, SplittingState]:
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)
        chain = self._chain(h_q, h_p, t0, t1)
        (q, p), _ = undo(chain, terms, args, _sums_of(y1, solver_state))
        force = self._evaluate(term_p, t0, q.high, args)
        p = p.minus(tree_scale(h_p * self.tableau.kicks[0], force))
        y0, low = _split_sums(q, p)
        return y0, SplittingState(force, low, jnp.array(False))

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: SplittingState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, SplittingState, Cotangent, tuple[Y, SplittingState]]:
        """One evaluation and one pull-back for each evaluation of a step, and an evaluation
        of the force at its start."""
        terms, args = combine(params)
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)
        if dense_cotangent is not None:
            end = t1, (t0, t1), y1, solver_state, cotangent, dense_cotangent, 1
            cotangent = self._pull_derivatives(combine, params, *end)

        def sides_bar(stage: _Stage):
            """Only the last force of a step is kept in the solver state."""
            force_bar = tree_scale(stage.is_last, cotangent.solver_state.force)
            return None, (force_bar, None)

        after_first_kick = ft.partial(self._after_first_kick, h_p)
        pulled = undo_and_pull(
            self._chain(h_q, h_p, t0, t1),
            combine,
            params,
            _sums_of(y1, solver_state),
            cotangent.y,
            cotangent.params,
            sides_bar,
            start and start.of_chain(after_first_kick),
        )
        (q, p), (q_bar, p_bar) = pulled.parts, pulled.bars
        force = self._evaluate(term_p, t0, q.high, args)
        p = p.minus(tree_scale(h_p * self.tableau.kicks[0], force))
        force_bar = tree_scale(h_p * self.tableau.kicks[0], p_bar)
        y0, low = _split_sums(q, p)
        solver_state = SplittingState(force, low, jnp.array(False))
        state_bar = _with_force(cotangent.solver_state, force_bar)
        cotangent = Cotangent((q_bar, p_bar), state_bar, pulled.params_bar)
        if dense_cotangent is not None:
            end = t0, (t0, t1), y0, solver_state, cotangent, dense_cotangent, 0
            cotangent = self._pull_derivatives(combine, params, *end)
        # The force follows from the state.
        off = _with_force(cotangent.solver_state, tree_zeros_like(force))
        return y0, solver_state, cotangent, (pulled.off, off)

    def _after_first_kick(self, h_p: RealScalarLike, y0: Y, state0: SplittingState):
        """The position and the momentum after the first kick of a step."""
        q, p = _sums_of(y0, state0)
        return q, p.plus(tree_scale(h_p * self.tableau.kicks[0], state0.force))

    def _pull_derivatives(
        self,
        combine: Combine,
        params: Params,
        t: RealScalarLike,
        step: tuple[RealScalarLike, RealScalarLike],
        y: Y,
        solver_state: SplittingState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo,
        end: int,
    ) -> Cotangent:
        """Pull the interpolation data at one `end` of the step back, if they were read."""
        y_bar = dense_cotangent[f"y{end}"]
        derivatives_bar = dense_cotangent[f"k{end}"], dense_cotangent[f"higher{end}"]

        def derivatives(y, force, params):
            terms, args = combine(params)
            term_q, term_p = self._terms(terms)
            h_q, h_p = term_q.contr(*step), term_p.contr(*step)
            k = tree_scale(h_q, term_q.vf(t, y[1], args)), tree_scale(h_p, force)
            return k, self._higher_derivatives(terms, t, step, y, args)

        def pull():
            _, pull = jax.vjp(derivatives, y, solver_state.force, params)
            return pull(derivatives_bar)

        some = sum(jnp.sum(leaf != 0) for leaf in jtu.tree_leaves(derivatives_bar))
        like = (y, solver_state.force, params)
        more_y_bar, force_bar, params_bar = lax.cond(
            eqxi.unvmap_any(some != 0), pull, lambda: tree_zeros_like(like)
        )
        y_bar = tree_add(tree_add(cotangent.y, y_bar), more_y_bar)
        force_bar = tree_add(cotangent.solver_state.force, force_bar)
        state_bar = _with_force(cotangent.solver_state, force_bar)
        return Cotangent(y_bar, state_bar, tree_add(cotangent.params, params_bar))

    def _evaluate(self, term: AbstractTerm, t: RealScalarLike, y: Y, args: Args) -> VF:
        """A vector field; if `bitwise`, it rounds alike wherever it is compiled."""
        if not self.bitwise:
            return term.vf(t, y, args)
        return isolated(lambda t, y: term.vf(t, y, args), t, y)

    def _chain(
        self,
        h_q: RealScalarLike,
        h_p: RealScalarLike,
        t0: RealScalarLike,
        t1: RealScalarLike,
    ) -> Chain:
        """The drifts and kicks, which update `q` and `p`, without the first kick."""

        def make_update(target: int, term: AbstractTerm, t, factor, args: Args):
            evaluate = lambda y: (term.vf(t, y, args), None)
            alike = lambda y: (self._evaluate(term, t, y, args), None)
            alike = alike if self.bitwise else None
            return Update(target, evaluate, factor=factor, alike=alike)

        def make_round(terms: _Terms, args: Args, stage: _Stage):
            term_q, term_p = self._terms(terms)
            drift = stage.drift_time, h_q * stage.drift
            kick = stage.kick_time, h_p * stage.kick
            return make_update(0, term_q, *drift, args), make_update(1, term_p, *kick, args)

        return Chain(make_round, _stages(self.tableau, t0, t1))

    def _terms(self, terms: _Terms) -> _Terms:
        term_q, term_p = terms
        return as_ode_term(self, term_q), as_ode_term(self, term_p)

    def _check(self, terms: _Terms, t: RealScalarLike, y: Y, args: Args) -> None:
        call = f"`diffeqsolve(..., solver={type(self).__name__}())`"
        drift = lambda t, p: terms[0].vf(t, p, args)
        if self.tableau.nystrom and not is_affine(drift, *as_floats(t), y[1]):
            raise ValueError(
                f"{call[:-3]}nystrom=True))` has its order only if drifts are affine in "
                "time and momentum, as `p / m` is, and `term_q` is not recognised as "
                "affine. Write it in an affine form, or use "
                f"`{type(self).__name__}()`."
            )
        for i, (name, of) in enumerate((("q", "p"), ("p", "q"))):
            try:
                vf = eqx.filter_eval_shape(self._terms(terms)[i].vf, t, y[1 - i], args)
            except (TypeError, IndexError) as error:
                raise ValueError(
                    f"{call}: the vector field of `term_{name}` could not be evaluated as "
                    f"`vf(t, {of}, args)`."
                ) from error
            if _shapes(vf) != _shapes(y[i]):
                raise ValueError(
                    f"{call}: the vector field of `term_{name}`, called as `vf(t, {of}, "
                    f"args)`, has to have the structure and shapes of `{name}`, "
                    f"{_shapes(y[i])}, but has {_shapes(vf)}."
                )


def _shapes(tree: PyTree) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _sums_of(y: Y, solver_state: SplittingState) -> tuple[Sum, Sum]:
    """`q` and `p` as sums."""
    low_q, low_p = (None, None) if solver_state.low is None else solver_state.low
    return LowPart.join(y[0], low_q), LowPart.join(y[1], low_p)


def _split_sums(q: Sum, p: Sum) -> tuple[Y, tuple[LowPart, LowPart] | None]:
    (q_high, low_q), (p_high, low_p) = LowPart.split(q), LowPart.split(p)
    low = None if low_q is None or low_p is None else (low_q, low_p)
    return (q_high, p_high), low


def _with_force(state: SplittingState, force: VF) -> SplittingState:
    return SplittingState(force, state.low, state.evaluated)


def _stages(tableau: SplittingTableau, t0: RealScalarLike, t1: RealScalarLike) -> _Stage:
    t0, t1 = as_floats(t0, t1)
    array = lambda x: jnp.asarray(x, t0.dtype)
    times = t0 + array(tableau.kick_times[1:-1]) * (t1 - t0)
    # Exactly the float at which the next step begins.
    kick_times = jnp.concatenate([times, t1[None]])
    return _Stage(
        array(tableau.drifts),
        t0 + array(tableau.drift_times) * (t1 - t0),
        array(tableau.kicks[1:]),
        kick_times,
        array(tableau.drift_error_weights[1:]),
        array(tableau.kick_error_weights[1:]),
        array(np.arange(len(tableau.drifts)) == len(tableau.drifts) - 1),
    )
