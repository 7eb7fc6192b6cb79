"""Compositions of kicks and drifts, with any coefficients."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractAdaptiveSolver, AbstractTerm, RESULTS
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._exact_sum import LowPart
from .._precision import as_floats
from .._tree import larger, largest, tree_axpy, tree_scale
from .affine import is_affine
from .base import check_flags
from .capabilities import CanCrossJumps
from .chain import run, undo
from .error_estimate import nan_if_infinite
from .error_scales import HasErrorScales
from .interrupted_solver import HasExtraDenseInfo
from .osculating import OsculatingInterpolation
from .splitting_chain import Stage, Terms
from .splitting_pullback import AbstractSplittingPullback
from .splitting_state import split_sums, SplittingState, sums_of


class AbstractSplitting(
    AbstractSplittingPullback,
    CanCrossJumps[SplittingState],
    HasExtraDenseInfo[SplittingState],
    HasErrorScales[SplittingState],
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

    def __check_init__(self):
        check_flags(self, "compensated", "bitwise")

    # Symplectic steps do not contract, and in double precision rounding errors grow slowly.
    default_checkpoints: ClassVar[int] = 0
    term_structure: ClassVar = (AbstractTerm, AbstractTerm)
    interpolation_cls: ClassVar = OsculatingInterpolation

    def order(self, terms: Terms) -> int:
        del terms
        return self.tableau.order

    def error_order(self, terms: Terms) -> int:
        del terms
        return self.tableau.embedded_order + 1

    def init(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
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

    def advance(
        self,
        terms: Terms,
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

        def collect(sides, stage: Stage, evaluated):
            (q_error, p_error, _), ((velocity, _), (force, _)) = sides, evaluated
            q_error = tree_axpy(stage.drift_error, velocity, q_error)
            p_error = tree_axpy(stage.kick_error, force, p_error)
            return q_error, p_error, force

        q, p = sums_of(y0, solver_state)
        p = p.plus(tree_scale(h_p * tableau.kicks[0], force0))
        q_error = tree_scale(tableau.drift_error_weights[0], velocity0)
        p_error = tree_scale(tableau.kick_error_weights[0], force0)
        chain, sides = self._chain(h_q, h_p, t0, t1), (q_error, p_error, force0)
        (q, p), sides = run(chain, terms, args, (q, p), sides, collect)
        q_error, p_error, force = sides
        y1, low = split_sums(q, p)
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
        terms: Terms,
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

    def cross_jump(
        self,
        terms: Terms,
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
        terms: Terms,
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
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: SplittingState,
    ) -> tuple[Y, SplittingState]:
        term_q, term_p = self._terms(terms)
        h_q, h_p = term_q.contr(t0, t1), term_p.contr(t0, t1)
        chain = self._chain(h_q, h_p, t0, t1)
        (q, p), _ = undo(chain, terms, args, sums_of(y1, solver_state))
        force = self._evaluate(term_p, t0, q.high, args)
        p = p.minus(tree_scale(h_p * self.tableau.kicks[0], force))
        y0, low = split_sums(q, p)
        return y0, SplittingState(force, low, jnp.array(False))

    def _check(self, terms: Terms, t: RealScalarLike, y: Y, args: Args) -> None:
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
