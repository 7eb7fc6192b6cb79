"""Adapters that make existing solvers reversible."""

import functools as ft
from typing import Generic, TypeVar

from diffrax import AbstractSolver, RESULTS

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Terms, VF, Y
from .base import AbstractReversibleSolver


_SolverState = TypeVar("_SolverState")


@ft.singledispatch
def as_reversible(solver: AbstractSolver) -> AbstractReversibleSolver:
    """The reversible form of a solver, which `ReversibleAdjoint` uses in its place.

    This is a registry, a `functools.singledispatch` on the type of the solver. To use an
    existing solver that is not an `AbstractReversibleSolver`, register a class that adds
    the inverse of its step. For a solver with the `backward_step` that was proposed for
    Diffrax in its pull request 727 (https://github.com/patrick-kidger/diffrax/pull/727),

        from diffrax_reversible import AbstractReversibleAdapter, as_reversible


        class FromBackwardStep(AbstractReversibleAdapter):
            def backward_step(self, terms, t0, t1, y1, args, solver_state):
                # In place of None there may be earlier times, which few solvers need.
                y0, _, solver_state, _ = self.solver.backward_step(
                    terms, t0, t1, y1, args, None, solver_state, made_jump=False
                )
                return y0, solver_state


        as_reversible.register(MySolver, FromBackwardStep)

    and pass `solver=MySolver()` and `adjoint=ReversibleAdjoint()` as usual. Subclasses of
    `MySolver` are included, unless they override its `step` and not a `backward_step`. The
    solver state is that of `MySolver.init`.

    Diffrax's reversible solvers are registered already: `diffrax.ReversibleHeun`,
    `diffrax.LeapfrogMidpoint` and `diffrax.SemiImplicitEuler`.

    **Raises:**

    `ValueError` if no class is registered for the solver.

    Example:

    >>> import diffrax
    >>> from diffrax_reversible import AbstractReversibleSolver, as_reversible
    >>> isinstance(as_reversible(diffrax.ReversibleHeun()), AbstractReversibleSolver)
    True
    """
    name = type(solver).__name__
    raise ValueError(
        "`diffeqsolve(..., adjoint=ReversibleAdjoint())` needs a reversible solver, and "
        f"`{name}` is not. Use `diffrax_reversible.ALF4` or another solver of this "
        "package; or make an explicit Runge–Kutta solver reversible with "
        "`diffrax_reversible.McCallumFoster(solver)`; or, if its steps can be undone, "
        "register their inverse with "
        f"`diffrax_reversible.as_reversible.register({name}, ...)`."
    )


@as_reversible.register
def _(solver: AbstractReversibleSolver) -> AbstractReversibleSolver:
    return solver


class AbstractReversibleAdapter(
    AbstractReversibleSolver[_SolverState], Generic[_SolverState]
):
    """A wrapper around an existing `solver`, to which a subclass adds `backward_step`.

    Use it for a solver of another package, see `as_reversible`.

    **Arguments:**

    - `solver`: the solver that makes the steps.
    """

    solver: AbstractSolver

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms: Terms) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self, terms: Terms, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> _SolverState:
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms: Terms, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)
