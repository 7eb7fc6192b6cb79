"""The names of solvers in texts."""

import dataclasses
from typing import Any

from diffrax import AbstractSolver


def solver_name(solver: Any) -> str:
    """The constructor call of a solver, in short: with the solver inside and those
    arguments that differ from their defaults."""
    told = []
    for field in dataclasses.fields(solver):
        value = getattr(solver, field.name)
        if isinstance(value, AbstractSolver):
            told.append(solver_name(value))
        elif not _is_default(field, value):
            told.append(f"{field.name}={_short(value)}")
    return f"{type(solver).__name__}({', '.join(told)})"


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return value is default or type(value) is type(default) and bool(value == default)


def _short(value: Any) -> str:
    """A number or a string as it is; anything else by its class."""
    simple = isinstance(value, bool | int | float | complex | str | None)
    return repr(value) if simple else f"{type(value).__name__}(...)"
