"""Making closed-over values visible to differentiation."""

import copy
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from diffrax import AbstractStepSizeController, ControlTerm, ODETerm
from jaxtyping import PyTree

from .._controller.base import AbstractReversibleStepSizeController
from .._custom_types import Args, RealScalarLike, SolverState, Terms, Y
from .._diffrax import State
from .._solver.base import AbstractReversibleSolver
from .._solver.interrupted_solver import advance_densely
from .close import as_arrays, close, has_tracers, structs_of
from .traced_field import FieldSpy
from .validate import hidden_closure, hidden_in_controller


def close_terms(
    solver: AbstractReversibleSolver,
    terms: Terms,
    args: Args,
    t: RealScalarLike,
    y: Y,
    solver_state: SolverState,
) -> tuple[Terms, Args]:
    """`terms` and `args` as they are now, with the traced values that functions close over
    as leaves.

    The vector field of an `ODETerm` or a `ControlTerm` is traced here, and not again in the
    backward pass, where a Python variable that it reads may have changed, such as that of a
    loop. (Controls and other terms are traced again.)

    A custom gradient cannot see a closed-over traced value, and would drop its cotangent.
    Those of a vector field, and of functions in `args` that it calls, become leaves of the
    traced one, wherever they hide. If controls and other terms have any, the functions
    among their leaves, and those in `args`, are replaced, which preserves their types.
    """

    def there_and_back(terms, args, t, y, solver_state):
        solver.init(terms, t, t, y, _copy(args))
        step = solver, terms, t, t, y, _copy(args)
        y, _, _, solver_state, _ = advance_densely(*step, solver_state)
        return solver.backward_step(terms, t, t, y, _copy(args), solver_state)

    def step(solver, terms, args, t, y, solver_state):
        return advance_densely(solver, terms, t, t, y, args, solver_state)[:4]

    def captures(terms, args):
        return _captures(step, solver, terms, args, t, y, solver_state)

    def trace_fields(terms, args):
        spies = _map_fields(FieldSpy, terms)
        run((spies, args))
        return _map_fields(lambda spy: spy.trace(), spies)

    def run(called):
        return eqx.filter_eval_shape(there_and_back, *called, t, y, solver_state)

    traced = trace_fields(terms, args)
    if captures(traced, args):
        terms, args = _close_leaves((terms, args), run)
        traced = trace_fields(terms, args)
        if captures(traced, args):
            raise NotImplementedError(hidden_closure)
    return traced, args


def close_controller(
    controller: AbstractStepSizeController,
    solver: AbstractReversibleSolver,
    terms: Terms,
    t: RealScalarLike,
    args: Args,
    init_state: State,
) -> AbstractStepSizeController:
    """`controller`, with the traced values that its functions close over as leaves, such as
    the norm of a `PIDController`. If any remain, it is replaced as a whole."""
    y, state = init_state.y, init_state.controller_state
    error_order = solver.error_order(terms)

    def adapt(controller, t0, t1, y0, y1, args, y_error, error_order, state):
        step = t0, t1, y0, y1, args, y_error, error_order
        return controller.adapt_step_size(*step, state)

    def captures(controller):
        return _captures(adapt, controller, t, t, y, y, args, y, error_order, state)

    if not captures(controller):
        return controller
    controller = _close_leaves(
        controller,
        lambda c: eqx.filter_eval_shape(adapt, c, t, t, y, y, args, y, error_order, state),
    )
    if not captures(controller):
        return controller
    if isinstance(controller, AbstractReversibleStepSizeController):
        raise NotImplementedError(hidden_in_controller)
    _, y_error, *_ = eqx.filter_eval_shape(
        advance_densely, solver, terms, t, t, y, args, init_state.solver_state
    )
    step = t, t, y, y, args, y_error, error_order
    # Python scalars, which the first state may contain, become arrays in a loop.
    states = state, as_arrays(state)
    bound = ft.partial(adapt, controller)
    return _ClosedController(_Closed([close(bound, *step, state) for state in states]))


def _map_fields(fn: Callable, terms: Terms) -> Terms:
    """`terms` with `fn` applied to the vector field of each `ODETerm` or `ControlTerm`."""

    def has_field(x):
        return isinstance(x, ODETerm | ControlTerm)

    def replace(term):
        if not has_field(term):
            return term
        # `equinox.tree_at` cannot replace a PyTree without leaves.
        new = copy.copy(term)
        object.__setattr__(new, "vector_field", fn(term.vector_field))
        return new

    return jtu.tree_map(replace, terms, is_leaf=has_field)


def _copy(args: Args) -> Args:
    """A copy, as some objects can be used only once, such as `equinox.nn.State`."""
    return jtu.tree_map(lambda x: x, args)


class _ClosedController(AbstractStepSizeController[PyTree, RealScalarLike | None]):
    """A controller with everything that its steps depend on as leaves."""

    adapt: Callable

    def wrap(self, direction):
        # Diffrax has already called it, and `init`.
        raise AssertionError

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        raise AssertionError

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        step = t0, t1, y0, y1_candidate, args, y_error, error_order
        return self.adapt(*step, controller_state)


def _close_leaves(tree: PyTree, run: Callable[[PyTree], Any]) -> PyTree:
    """`tree` with the functions among its leaves closed, for the calls that `run` makes."""
    spies = jtu.tree_map(lambda x: _Spy(x) if _is_function(x) else x, tree)
    run(spies)
    return jtu.tree_map(_close, spies)


def _is_function(x: Any) -> bool:
    return callable(x) and not eqx.is_array(x) and not isinstance(x, type)


def _captures(fn: Callable, *args) -> bool:
    """Whether `fn(*args)` depends on traced values that are not leaves of `args`."""
    return has_tracers(close(fn, *args))


def _structure(x: PyTree) -> PyTree:
    """`x` with shapes and dtypes in place of arrays."""
    leaves, treedef = jtu.tree_flatten(x)
    return jtu.tree_unflatten(treedef, map(_strong, structs_of(leaves)))


def _strong(x: Any) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class _Spy:
    """A function that records the structure of its calls."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.calls: list[PyTree] = []

    def __call__(self, *args, **kwargs):
        call = _structure((args, kwargs))
        if not any(eqx.tree_equal(call, known) for known in self.calls):
            self.calls.append(call)
        return self.fn(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)


class _Closed(eqx.Module):
    """A function with its closed-over values as leaves, one version per call structure."""

    # Results of `equinox.filter_closure_convert`.
    versions: list[Any]

    def __call__(self, *args, **kwargs):
        call = _structure((args, kwargs))
        for version in self.versions[:-1]:
            if eqx.tree_equal(call, _structure(version.in_struct)):
                return version(*args, **kwargs)
        # If this does not fit either, its error shows the call.
        return self.versions[-1](*args, **kwargs)


def _close(x: Any) -> Any:
    """The replacement for a leaf, from the calls that a spy has recorded."""
    if not isinstance(x, _Spy):
        return x
    versions = [close(x.fn, *args, **kwargs) for args, kwargs in x.calls]
    if has_tracers(versions):
        return _Closed(versions)
    return x.fn
