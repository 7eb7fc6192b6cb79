"""A solve as it was passed to `explain`, and its gradient."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax import (
    AbstractAdjoint,
    AbstractSolver,
    AbstractStepSizeController,
    ConstantStepSize,
    diffeqsolve,
    SaveAt,
    Solution,
    SubSaveAt,
)
from jaxtyping import PyTree


def sum_of_squares(sol: Solution) -> jax.Array:
    """The sum of squares of all outputs."""
    leaves = jtu.tree_leaves(eqx.filter(sol.ys, eqx.is_inexact_array))
    return jnp.asarray(sum(jnp.sum(jnp.abs(y) ** 2) for y in leaves))


@dataclasses.dataclass(frozen=True)
class Solve:
    """The arguments of a call of `diffeqsolve`, and the loss to differentiate."""

    terms: PyTree
    solver: AbstractSolver
    t0: Any
    t1: Any
    dt0: Any
    y0: PyTree
    args: PyTree
    settings: dict[str, Any]
    loss: Callable[[Solution], jax.Array]

    def but(self, **changes: Any) -> "Solve":
        """The solve with changed arguments or settings."""
        names = {field.name for field in dataclasses.fields(self)}
        fields = {k: v for k, v in changes.items() if k in names}
        settings = {k: v for k, v in changes.items() if k not in names}
        return dataclasses.replace(self, **fields, settings=self.settings | settings)

    def promoted(self) -> "Solve":
        """The solve with the state in the precision that `diffeqsolve` gives it, which is
        at least that of times."""
        prescribed = [sub.ts for sub in _outputs(self.saveat)]
        times = jtu.tree_leaves((self.t0, self.t1, self.dt0, prescribed))
        with jax.numpy_dtype_promotion("standard"):
            precision = jnp.result_type(*times)
            if not jnp.issubdtype(precision, jnp.floating):
                precision = jnp.result_type(float)
            promote = lambda x: jnp.asarray(x, jnp.result_type(x, precision))
            return self.but(y0=jtu.tree_map(promote, self.y0))

    def in_precision(self, dtype: str) -> "Solve":
        """The solve with all numbers in another real `dtype`, or the complex one alike."""
        dtypes = {
            np.floating: dtype,
            np.complexfloating: np.result_type(dtype, np.complex64),
        }

        def cast(x):
            if not isinstance(x, np.ndarray | np.generic | jax.Array):
                return x
            kinds = [d for kind, d in dtypes.items() if jnp.issubdtype(x.dtype, kind)]
            return jnp.asarray(x, kinds[0]) if len(kinds) > 0 else x

        names = [field.name for field in dataclasses.fields(self)]
        values = jtu.tree_map(cast, [getattr(self, name) for name in names])
        solve = dataclasses.replace(self, **dict(zip(names, values, strict=True)))
        # Times that are Python numbers would promote the state.
        times = dict(t0=solve.t0, t1=solve.t1, dt0=solve.dt0)
        as_time = lambda t: jnp.asarray(t, dtype)
        return solve.but(**jtu.tree_map(as_time, times))

    @property
    def controller(self) -> AbstractStepSizeController:
        return self.settings.get("stepsize_controller", ConstantStepSize())

    @property
    def saveat(self) -> SaveAt:
        return self.settings.get("saveat", SaveAt(t1=True))

    @property
    def direction(self) -> float:
        """The sign of time. Solvers integrate forwards in `direction * t`."""
        return 1.0 if self.t1 >= self.t0 else -1.0

    @property
    def differentiated(self) -> PyTree:
        return eqx.filter((self.y0, self.args, self.terms), eqx.is_inexact_array)

    def run(self, differentiated: PyTree) -> Solution:
        everything = self.y0, self.args, self.terms
        y0, args, terms = eqx.combine(differentiated, everything)
        ends = self.t0, self.t1, self.dt0
        return diffeqsolve(terms, self.solver, *ends, y0, args, **self.settings)

    def value(self, differentiated: PyTree) -> jax.Array:
        return self.loss(self.run(differentiated))

    def compile_solve(self) -> Any:
        return jax.jit(self.value).lower(self.differentiated).compile()

    def compile_gradient(self, adjoint: AbstractAdjoint) -> Any:
        solve = self.but(adjoint=adjoint)
        return jax.jit(jax.grad(solve.value)).lower(self.differentiated).compile()

    def states(self) -> np.ndarray:
        """All outputs, in one row; the final state if they are at steps or dense, as other
        solvers take other steps."""
        solve = self
        if self.saveat.dense or any(sub.steps for sub in _outputs(self.saveat)):
            solve = self.but(saveat=SaveAt(t1=True))
        ys = eqx.filter_jit(solve.run)(self.differentiated).ys
        leaves = jtu.tree_leaves(eqx.filter(ys, eqx.is_inexact_array))
        return np.concatenate([np.ravel(y) for y in leaves])

    def milliseconds(self, compiled: Any, repeats: int = 10) -> float:
        """The least wall time of a compiled function, after one run. Other processes only
        add to it."""
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(self.differentiated))
            times.append(1e3 * (time.perf_counter() - start))
        return min(times[1:])


def _outputs(saveat: SaveAt) -> list[SubSaveAt]:
    is_output = lambda x: isinstance(x, SubSaveAt)
    return jtu.tree_leaves(saveat.subs, is_leaf=is_output)


def temporary_bytes(compiled: Any) -> int | None:
    """Compiled temporary memory, or `None` where XLA does not report it."""
    memory = compiled.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes
