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
from .._solver.capabilities import advance_densely
from .close import as_arrays, close, has_tracers, structs_of
from .traced_field import FieldSpy, hides_tracers
from .validate import hidden_closure, hidden_in_controller


def close_terms(
    solver: AbstractReversibleSolver,
    terms: Terms,
    args: Args,
    t: RealScalarLike,
    y: Y,
    solver_state: SolverState,
) -> tuple[Terms, Args, bool]:
    """`terms` and `args` as they are now, with the traced values that functions close over
    as leaves. Also whether the `terms` are bound to these `args`, and ignore others.

    The vector field of an `ODETerm` or a `ControlTerm` is traced here, and not again in the
    backward pass, where a Python variable that it reads may have changed, such as that of a
    loop. (Controls and other terms are traced again.)

    A custom gradient cannot see a closed-over traced value, and would drop its cotangent.
    If there are any, the vector field is replaced as a whole, together with its `args`, so
    that they may hide anywhere in it. In controls and other terms, only functions among the
    leaves are replaced, which preserves their types.
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

    calls = t, y, solver_state
    spies = _map_fields(FieldSpy, terms)
    eqx.filter_eval_shape(there_and_back, spies, args, *calls)
    traced = _map_fields(lambda spy: spy.trace(), spies)
    if not hides_tracers(traced) and not captures(traced, args):
        return traced, args, False
    spies = _map_fields(lambda field: _BoundSpy(field, args), terms)
    eqx.filter_eval_shape(there_and_back, spies, args, *calls)
    terms = _map_fields(lambda spy: spy.close(), spies)
    if not captures(terms, args):
        return terms, args, True
    terms, args = _close_leaves((terms, args), lambda x: there_and_back(x[0], x[1], *calls))
    if captures(terms, args):
        raise NotImplementedError(hidden_closure)
    return terms, args, True


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
        controller, lambda c: adapt(c, t, t, y, y, args, y, error_order, state)[:3]
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


class _BoundSpy:
    """A vector field, bound to its `args`, that records the structure of its calls."""

    def __init__(self, field: Callable, args: Args):
        self.given = field
        self.field = lambda t, y: field(t, y, _copy(args))
        self.calls: list[PyTree] = []

    def __call__(self, t, y, args):
        del args
        point = as_arrays((t, y))
        _note(_structure(point), self.calls)
        return self.field(*point)

    def close(self) -> Callable:
        if len(self.calls) == 0:
            return self.given
        return _ClosedField([close(self.field, *point) for point in self.calls])


class _ClosedField(eqx.Module):
    """A vector field with everything that it depends on, the `args` included, as leaves:
    one version for each structure of its calls."""

    versions: list[Any]

    def __call__(self, t, y, args):
        del args
        point = as_arrays((t, y))
        return _choose(self.versions, point, {})(*point)


def _note(call: PyTree, calls: list[PyTree]) -> None:
    if not any(eqx.tree_equal(call, earlier) for earlier in calls):
        calls.append(call)


def _choose(versions: list[Any], args: tuple, kwargs: dict) -> Callable:
    call = _structure((args, kwargs))
    for version in versions[:-1]:
        if eqx.tree_equal(call, _structure(version.in_struct)):
            return version
    # If this does not fit either, its error shows the call.
    return versions[-1]


def _close_leaves(tree: PyTree, run: Callable[[PyTree], Any]) -> PyTree:
    """`tree` with the functions among its leaves closed, for the calls that `run` makes."""
    spies = jtu.tree_map(lambda x: _Spy(x) if _is_function(x) else x, tree)
    eqx.filter_eval_shape(run, spies)
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
        _note(_structure((args, kwargs)), self.calls)
        return self.fn(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)


class _Closed(eqx.Module):
    """A function with its closed-over values as leaves, one version per call structure."""

    # Results of `equinox.filter_closure_convert`.
    versions: list[Any]

    def __call__(self, *args, **kwargs):
        return _choose(self.versions, args, kwargs)(*args, **kwargs)


def _close(x: Any) -> Any:
    """The replacement for a leaf, from the calls that a spy has recorded."""
    if not isinstance(x, _Spy):
        return x
    versions = [close(x.fn, *args, **kwargs) for args, kwargs in x.calls]
    if has_tracers(versions):
        return _Closed(versions)
    return x.fn
