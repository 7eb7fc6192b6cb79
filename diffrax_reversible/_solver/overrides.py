"""Subclasses that change the step of a solver, but not what undoes it."""

from typing import Any

from diffrax import AbstractSolver

from .adapter import as_reversible
from .base import AbstractReversibleSolver


def overrides(solver: Any, method: str, base: type) -> bool:
    """Whether a `method` of the `solver` was defined by a subclass of `base`."""
    definer = _definer(solver, method)
    return base is not object and definer is not base and issubclass(definer, base)


def check_step_is_undone(solver: AbstractSolver) -> None:
    """Raise an error if the backward pass would undo another step than the solver makes."""
    if isinstance(solver, AbstractReversibleSolver):
        pull = "pullback_from_start"
        pull = pull if hasattr(solver, pull) else "backward_step_and_pullback"
        users = [("step", name) for name in ("advance", "backward_step", pull)]
        users = [*users, ("advance", "backward_step")]
        pairs = [(method, _definer(solver, user)) for method, user in users]
    else:
        # The inverse of a registered solver may call one of the solver's own.
        own = issubclass(_definer(solver, "backward_step"), _definer(solver, "step"))
        registered = (c for c in type(solver).__mro__ if c in as_reversible.registry)
        pairs = [] if own else [("step", next(registered))]
    for method, base in pairs:
        if overrides(solver, method, base):
            _refuse(solver, method)


def _definer(solver: Any, method: str) -> type:
    """The class from which the `solver` has a `method`; `object` if it has none."""
    definers = (c for c in type(solver).__mro__ if method in vars(c))
    return next(definers, object)


def _refuse(solver: AbstractSolver, method: str) -> None:
    new = _definer(solver, method)
    mro = type(solver).__mro__
    old = mro[mro.index(new) + 1]
    raise ValueError(
        f"`diffeqsolve(..., solver={type(solver).__name__}(), "
        f"adjoint=ReversibleAdjoint())` undoes steps of `{old.__name__}`, but "
        f"`{new.__name__}` overrides `{method}`. Use "
        "`adjoint=RecursiveCheckpointAdjoint()`; or derive it from "
        "`diffrax_reversible.AbstractReversibleSolver`, with a `backward_step` that undoes "
        "this step."
    )
