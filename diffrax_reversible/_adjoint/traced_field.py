"""Vector fields that are traced once, when they are solved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .close import as_arrays, close, has_tracers, structs_of
from .validate import hidden_in_call


class _Call(NamedTuple):
    """A vector field and what it is called with: `(t, y, args)`, unless a subclass of
    `ODETerm` does otherwise. It is flattened once, as some objects can be used only once,
    such as `equinox.nn.State`.

    - `arrays`, `fixed`: the leaves that are arrays, or their shapes, and the others.
    - `structure`: that of the call, with the shapes of its arrays.
    """

    arrays: list[Array | None]
    fixed: list[Any]
    structure: tuple

    @staticmethod
    def of(field: Callable, inputs: tuple, named: dict[str, Any]) -> "_Call":
        if len(inputs) == 3:
            t, y, args = inputs
            inputs = *as_arrays((t, y)), args
        leaves, treedef = jtu.tree_flatten((field, inputs, named))
        arrays, fixed = eqx.partition(leaves, eqx.is_array)
        key = lambda x: (x.shape, x.dtype, x.sharding, getattr(x, "weak_type", False))
        keys = tuple(None if x is None else key(x) for x in structs_of(arrays))
        return _Call(arrays, fixed, (treedef, keys))

    def make(self, arrays: list[Array | None]) -> PyTree[Array]:
        """The value of the call, with other arrays."""
        treedef, _ = self.structure
        call = jtu.tree_unflatten(treedef, eqx.combine(arrays, self.fixed))
        field, inputs, named = call
        return field(*inputs, **named)

    def fits(self, fixed: list[Any], structure: tuple) -> bool:
        """Whether a call has the same leaves besides arrays, and the same `structure`."""
        # By identity, as not all objects can be compared.
        return structure == self.structure and all(
            x is y for x, y in zip(fixed, self.fixed, strict=True)
        )


class FieldSpy:
    """A vector field that records how it is called."""

    def __init__(self, field: Callable):
        self.field = field
        self.calls: list[_Call] = []

    def __call__(self, *inputs, **named):
        call = _Call.of(self.field, inputs, named)
        if not any(call.fits(known.fixed, known.structure) for known in self.calls):
            self.calls.append(call._replace(arrays=structs_of(call.arrays)))
        return call.make(call.arrays)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.field, name)

    def trace(self) -> Callable:
        """The field, traced in each of its calls."""
        versions = [
            _Version(call.fixed, close(call.make, call.arrays), call.structure)
            for call in self.calls
        ]
        return _TracedField(self.field, versions, has_tracers(versions))


class _Version(eqx.Module):
    """A vector field for one kind of call, as a function of the arrays of that."""

    fixed: list[Any]
    closed: Callable
    structure: tuple = eqx.field(static=True)


class _TracedField(eqx.Module):
    """A vector field, with a version for each kind of call. In other calls it is traced
    again, and reads Python variables as they are then; if it hides traced values, whose
    cotangents would be lost, they are an error."""

    given: Callable
    versions: list[_Version]
    hides_tracers: bool = eqx.field(static=True)

    def __call__(self, *inputs, **named):
        call = _Call.of(self.given, inputs, named)
        for version in self.versions:
            if call.fits(version.fixed, version.structure):
                return version.closed(call.arrays)
        if self.hides_tracers:
            raise NotImplementedError(hidden_in_call)
        return call.make(call.arrays)

    def __getattr__(self, name: str) -> Any:
        if name in ("given", "versions", "hides_tracers") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.given, name)


def hides_tracers(tree: PyTree) -> bool:
    """Whether a vector field that was traced had traced values that were not its leaves."""
    is_traced = lambda x: isinstance(x, _TracedField)
    fields = filter(is_traced, jtu.tree_leaves(tree, is_leaf=is_traced))
    return any(field.hides_tracers for field in fields)
