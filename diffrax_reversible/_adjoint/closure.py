"""Making what functions close over visible to differentiation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree

from .._custom_types import Args, RealScalarLike, SolverState, Terms, Y
from .._solver.base import AbstractReversibleSolver, advance_densely
from .validate import hidden_closure


def close_terms(
    solver: AbstractReversibleSolver,
    terms: Terms,
    args: Args,
    t: RealScalarLike,
    y: Y,
    solver_state: SolverState,
) -> tuple[Terms, Args]:
    """`terms` and `args`, but with the traced values that functions among their leaves
    close over as leaves too.

    A custom gradient cannot see a closed-over value, and would drop its cotangent. Only
    these functions are replaced, so that terms remain of the type that they were.
    """

    def there_and_back(terms, args, t, y, solver_state):
        solver.init(terms, t, t, y, args)
        step = solver, terms, t, t, y, args
        y, _, _, solver_state, _ = advance_densely(*step, solver_state)
        return solver.inverse_step(terms, t, t, y, args, solver_state)

    def captures(terms, args):
        known = (solver, terms, args, t, y, solver_state)

        def step(t, y, solver_state):
            return advance_densely(solver, terms, t, t, y, args, solver_state)[:4]

        return _captured(eqx.filter_closure_convert(step, t, y, solver_state), known)

    if not captures(terms, args):
        return terms, args
    spies = jtu.tree_map(lambda x: _Spy(x) if _is_function(x) else x, (terms, args))
    eqx.filter_eval_shape(there_and_back, *spies, t, y, solver_state)
    terms, args = jtu.tree_map(_close, spies)
    if captures(terms, args):
        raise NotImplementedError(hidden_closure)
    return terms, args


def _is_function(x: Any) -> bool:
    return callable(x) and not eqx.is_array(x) and not isinstance(x, type)


def _captured(closed: Callable, known: PyTree) -> bool:
    """Whether what was closed over has traced values that are not `known`."""
    ids = {id(leaf) for leaf in jtu.tree_leaves(known)}
    leaves = jtu.tree_leaves(closed)
    return any(isinstance(leaf, Tracer) and id(leaf) not in ids for leaf in leaves)


def _structure(x: PyTree) -> PyTree:
    """`x` with shapes and dtypes in place of arrays."""
    return jtu.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, x
    )


class _Spy:
    """A function that notes with what it is called."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.calls: list[PyTree] = []

    def __call__(self, *args, **kwargs):
        call = _structure((args, kwargs))
        if not any(eqx.tree_equal(call, earlier) for earlier in self.calls):
            self.calls.append(call)
        return self.fn(*args, **kwargs)


class _Closed(eqx.Module):
    """A function with what it closes over as leaves, one version for each kind of call."""

    # Of the type that `equinox.filter_closure_convert` returns.
    versions: list[Any]

    def __call__(self, *args, **kwargs):
        call = _structure((args, kwargs))
        for version in self.versions[:-1]:
            if eqx.tree_equal(call, _structure(version.in_struct)):
                return version(*args, **kwargs)
        # It says how it was called, should it not fit either.
        return self.versions[-1](*args, **kwargs)


def _close(x: Any) -> Any:
    """What is to stand in place of a leaf, given what a spy has seen."""
    if not isinstance(x, _Spy):
        return x
    versions = [
        eqx.filter_closure_convert(x.fn, *args, **kwargs) for args, kwargs in x.calls
    ]
    if any(_captured(version, ()) for version in versions):
        return _Closed(versions)
    return x.fn
