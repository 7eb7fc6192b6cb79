"""Solvers whose step is a chain of couplings."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import equinox as eqx
import jax
from diffrax import LocalLinearInterpolation, RESULTS
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    BoolScalarLike,
    Combine,
    DenseInfo,
    Params,
    RealScalarLike,
    Terms,
    Y,
)
from .._tree import tree_add
from .chain import as_sums, as_trees, Chain, run, undo
from .chain_pullback import undo_and_pull
from .cotangent import Cotangent
from .couplings import as_chain, Coupling
from .pullback import HasPullbackFromStart, StepStart


_SolverState = TypeVar("_SolverState")

# The state and the solver state, in parts; a coupling updates one part.
_Parts = tuple[PyTree[Array], ...]


class AbstractCouplingSolver(HasPullbackFromStart[_SolverState], Generic[_SolverState]):
    """A solver whose step is a chain of couplings, for reversible methods of your own.

    Examples are splitting methods, leapfrog, and the blocks of reversible networks. A
    subclass implements `couplings`; step, backward step and pull-back follow. The parts are
    the elements of the state, a tuple, unless the subclass overrides `split` and `join`.

    Each step evaluates each increment once. The backward pass takes one evaluation and one
    pull-back of each. There is no error estimate: steps have to be constant, given, or, if
    the subclass has a `func`, chosen by `StepDensityController`. Interpolation is linear.
    Memory of `SaveAt(dense=True)`: two states per step. `Coupling` names the sources.

    **Raises:**

    `ValueError` in the solve if an increment does not fit the part that it updates, if a
    coupling cannot be undone or names no part, or if the state is not in parts.
    `NotImplementedError` from `func`, unless the subclass overrides it.

    Example:

    >>> import diffrax
    >>> import jax.numpy as jnp
    >>> from diffrax_reversible import AbstractCouplingSolver, Coupling
    >>> class TwoStreams(AbstractCouplingSolver):
    ...     term_structure = (diffrax.ODETerm, diffrax.ODETerm)
    ...
    ...     def couplings(self, terms, t0, t1, args):
    ...         f, g = terms
    ...         h = f.contr(t0, t1)
    ...         return (
    ...             Coupling(0, lambda x2: f.vf_prod(t0, x2, args, h)),
    ...             Coupling(1, lambda x1: g.vf_prod(t0, x1, args, h)),
    ...         )
    >>> f = diffrax.ODETerm(lambda t, x2, args: x2)
    >>> g = diffrax.ODETerm(lambda t, x1, args: -x1)
    >>> y0 = (jnp.array(1.0), jnp.array(0.0))
    >>> sol = diffrax.diffeqsolve((f, g), TwoStreams(), 0, 1, 0.01, y0)
    >>> print(f"{sol.ys[0][0]:.2f}")
    0.54
    """

    interpolation_cls: ClassVar = LocalLinearInterpolation

    @abc.abstractmethod
    def couplings(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, args: Args
    ) -> Sequence[Coupling]:
        """The `Coupling`s of a step from `t0` to `t1`, in the order of their updates.

        `terms` and `args` are as in `diffrax.AbstractSolver.step`."""

    def init(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> Any:
        """No solver state."""
        del terms, t0, t1, y0, args

    def split(self, y: Y, solver_state: _SolverState) -> _Parts:
        """The parts that couplings update, from the state and the solver state."""
        del solver_state
        if not isinstance(y, tuple) or len(y) < 2:
            raise ValueError(
                f"`diffeqsolve(..., solver={type(self).__name__}(), y0=...)`: the state "
                "has to be a tuple of at least two parts, as a coupling updates one part "
                "by a function of the others. Otherwise override `split` and `join`."
            )
        return y

    def join(self, parts: _Parts) -> tuple[Y, Any]:
        """The inverse of `split`."""
        return parts, None

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> NoReturn:
        """The vector field as a whole; not known unless a subclass overrides this."""
        name = type(self).__name__
        raise NotImplementedError(
            f"`{name}.func`, the vector field as a whole, is not known, and "
            "`StepDensityController` needs it: override `func`, or use "
            "`ConstantStepSize()` or `StepTo(...)`."
        )

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, None, DenseInfo, _SolverState, RESULTS]:
        del made_jump
        parts = self.split(y0, solver_state)
        parts, _ = run(self._chain(t0, t1, parts), terms, args, as_sums(parts))
        y1, solver_state = self.join(as_trees(parts))
        return y1, None, dict(y0=y0, y1=y1), solver_state, RESULTS.successful

    def backward_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, _SolverState]:
        parts = self.split(y1, solver_state)
        parts, _ = undo(self._chain(t0, t1, parts), terms, args, as_sums(parts))
        return self.join(as_trees(parts))

    def pullback_from_start(
        self,
        combine: Combine,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: StepStart | None,
    ) -> tuple[Y, _SolverState, Cotangent, tuple[Y, _SolverState]]:
        y_bar = cotangent.y
        if dense_cotangent is not None:
            y_bar = tree_add(y_bar, dense_cotangent["y1"])
        parts = self.split(y1, solver_state)
        joined = lambda parts: eqx.filter(self.join(parts), eqx.is_inexact_array)
        _, pull = jax.vjp(joined, parts)
        (bars,) = pull((y_bar, cotangent.solver_state))
        pulled = undo_and_pull(
            self._chain(t0, t1, parts),
            combine,
            params,
            as_sums(parts),
            bars,
            cotangent.params,
            start=start and start.of_chain(lambda *states: as_sums(self.split(*states))),
        )
        y0, solver_state = self.join(as_trees(pulled.parts))
        states, others = eqx.partition((y0, solver_state), eqx.is_inexact_array)
        _, pull = jax.vjp(lambda x: self.split(*eqx.combine(x, others)), states)
        ((y_bar, state_bar),) = pull(pulled.bars)
        _, off = jax.jvp(joined, (parts,), (pulled.off,))
        if dense_cotangent is not None:
            y_bar = tree_add(y_bar, dense_cotangent["y0"])
        cotangent = Cotangent(y_bar, state_bar, pulled.params_bar)
        return y0, solver_state, cotangent, off

    def _chain(self, t0: RealScalarLike, t1: RealScalarLike, parts: _Parts) -> Chain:
        return as_chain(lambda terms, args: self.couplings(terms, t0, t1, args), parts)
