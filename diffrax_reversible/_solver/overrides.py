"""Subclasses that change the step of a solver, but not what undoes it."""

from typing import Any

from diffrax import AbstractSolver

from .adapter import AbstractReversibleAdapter, as_reversible
from .base import AbstractReversibleSolver


def overrides(solver: Any, method: str, base: type) -> bool:
    """Whether the `solver` has another `method` than its superclass `base`, by a subclass
    of that or by a mixin."""
    inherited = getattr(base, method, None)
    if inherited is None or getattr(inherited, "__isabstractmethod__", False):
        return False
    mro = type(solver).__mro__
    return mro.index(_definer(solver, method)) < mro.index(base)


def check_step_is_undone(solver: AbstractSolver) -> None:
    """Raise an error if the backward pass would undo another step than the solver makes."""
    if isinstance(solver, AbstractReversibleAdapter):
        solver = solver.solver
    if isinstance(solver, AbstractReversibleSolver):
        pull = "pullback_from_start"
        pull = pull if hasattr(solver, pull) else "backward_step_and_pullback"
        pairs = [("step", user) for user in ("advance", "backward_step", pull)]
        for method, user in (*pairs, ("advance", "backward_step")):
            _refuse_override(solver, method, user, _definer(solver, user))
        return
    # The inverse of a registered solver may call one of the solver's own.
    has_inverse = issubclass(_definer(solver, "backward_step"), _definer(solver, "step"))
    if not has_inverse:
        registered = (c for c in type(solver).__mro__ if c in as_reversible.registry)
        _refuse_override(solver, "step", "backward_step", next(registered))


def _definer(solver: Any, method: str) -> type:
    """The class from which the `solver` has a `method`; `object` if it has none."""
    definers = (c for c in type(solver).__mro__ if method in vars(c))
    return next(definers, object)


def _refuse_override(solver: AbstractSolver, method: str, user: str, base: type) -> None:
    if not overrides(solver, method, base):
        return
    raise ValueError(
        f"`diffeqsolve(..., solver={type(solver).__name__}(), "
        f"adjoint=ReversibleAdjoint())`: `{_definer(solver, method).__name__}` overrides "
        f"`{method}`, but the `{user}` of `{base.__name__}` is for another step, and would "
        "be used. Use `adjoint=RecursiveCheckpointAdjoint()`; or derive the solver from "
        "`diffrax_reversible.AbstractReversibleSolver`, with a `step` and a "
        "`backward_step` that undoes it."
    )
