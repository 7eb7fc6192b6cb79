"""Errors of the reconstruction at known states, and the refusal of wrong gradients."""

from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import RealScalarLike
from .._precision import eps
from .._solver.entry_scales import growth_power, units
from .._tree import largest, tree_select
from .growth import any_grown
from .problem import Inputs
from .shared import params_where, Shared
from .validate import call, torn_steps


# The least default tolerance. With it, in double precision, gradients were off by at most
# 4e-4, see `drift_tol`.
_default_tol = 1e-6

_decades = range(-16, 9)


def _message(size: str) -> str:
    return (
        f"{call}: the backward pass, from the end of the solve, missed a known state "
        f"by a relative error {size}, more than `ReversibleAdjoint(drift_tol=...)` allows, "
        "so its gradient would be wrong. Either steps were too large to be stable "
        "(decrease the tolerances or `dt0`), or the solution contracts too strongly or is "
        "too unstable from one known state to the next (hold more, by "
        "`ReversibleAdjoint(checkpoints=...)`, shorten the solve, or use "
        "`adjoint=RecursiveCheckpointAdjoint()`), or rounding was too coarse (use float64, "
        "or compensated additions, as in `ALF4(compensated=True)`). If a gradient of that "
        "accuracy suffices, increase `drift_tol`."
    )


_grown = (
    f"{call}: the gradient grows in modes in which the solution contracts, as steps exceed "
    "the stability limit of these modes. They have died out and do not affect the "
    "solution, but every gradient excites them again, whatever the adjoint. Bound steps "
    "well below the stability limit of the fastest mode (`PIDController(dtmax=...)`), or "
    "tighten the tolerances, or use an implicit solver (`solver=Kvaerno5()` with "
    "`adjoint=RecursiveCheckpointAdjoint()`). To get the gradient anyway, pass "
    "`ReversibleAdjoint(drift_tol=float('inf'))`."
)

_messages = [
    *(_message(f"between 1e{d:+03d} and 1e{d + 1:+03d}") for d in _decades),
    f"{call}: the backward pass, from the end of the solve, met values that are not "
    "finite, so there is no gradient. The solution or its vector field overflowed, or is "
    "NaN, or the equations of an implicit step were not solved; check the solution itself, "
    "decrease the tolerances or `dt0`, and check the `linear_solver` and `root_finder` of "
    "an implicit solver. Entries that are padded with NaN, or infinite bounds, have to be "
    "finite numbers, such as zero, or leave the state.",
]


class Drift(NamedTuple):
    """The largest error in an array: `by_entry` relative to the scale of each entry, and
    `beside` relative to at least a fraction of the largest scale in the array."""

    by_entry: Float[Array, ""]
    beside: Float[Array, ""]


def drifts(
    reconstructed: PyTree, true: PyTree, scales: PyTree, least: RealScalarLike
) -> list[Drift]:
    """The errors of every leaf, where `least` is that fraction of the largest scale."""

    def of_leaf(r, t, scale):
        scale, error = units(scale), jnp.abs(r - t)
        floor = jnp.asarray(least, scale.dtype) * largest(scale)
        both = error / scale, error / jnp.maximum(scale, floor)
        # One reduction for both, so that XLA does not store the scales.
        zeros = jnp.zeros((2,), scale.dtype)
        larger = lambda a, b: (jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1]))
        return Drift(*lax.reduce(both, tuple(zeros), larger, tuple(range(error.ndim))))

    leaves = zip(*map(_inexact_leaves, (reconstructed, true, scales)), strict=True)
    return [of_leaf(*leaf) for leaf in leaves]


def largest_drift(drifts: list[Drift]) -> Drift:
    """The largest error in any array; NaN if there is one."""
    none = Drift(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    parts = zip(none, *drifts, strict=True)
    return Drift(*(jnp.max(jnp.stack([x.astype(jnp.float32) for x in p])) for p in parts))


def tolerance(drift_tol: float | None, state: PyTree) -> float:
    """The `drift_tol` for a state, whose default depends on its coarsest array."""
    if drift_tol is not None:
        return drift_tol
    # Arrays of the finer dtypes depend on those of the coarsest.
    return max(coarsest_eps(state), _default_tol**2) ** 0.5


def replay_tolerance(drift_tol: float | None, state: PyTree) -> float:
    """The accepted difference between a replay and the solve. By default it is at least the
    inverse of the factor by which rounding errors grow between restarts."""
    tol = tolerance(drift_tol, state)
    if drift_tol is not None:
        return tol
    return max(tol, coarsest_eps(state) ** -growth_power)


def coarsest_eps(state: PyTree) -> float:
    """The machine epsilon of the coarsest array; zero if there is none."""
    return max((eps(x) for x in _inexact_leaves(state)), default=0.0)


def _inexact_leaves(tree: PyTree) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))


def refuse_wrong(
    gradient: Inputs,
    shared: Shared | None,
    drift: Float[Array, ""],
    shares: list[Float[Array, ""]],
    torn: Bool[Array, ""],
    drift_tol: float,
    throw: bool,
) -> Inputs:
    """Replace a gradient by an error, or by NaN, if the walk missed a known state, if steps
    are `torn`, or if the gradient grew where the solution contracts."""
    within, grown = drift <= drift_tol, any_grown(shares, drift_tol)
    wrong = torn | jnp.invert(within) | grown
    if not throw:
        return _poison(wrong, gradient, shared)
    decade = jnp.floor(jnp.log10(drift)) - _decades[0]
    index = jnp.where(
        jnp.isfinite(drift), jnp.clip(decade, 0, len(_decades) - 1), len(_decades)
    ).astype(jnp.int32)
    messages = [*_messages, _grown, torn_steps]
    # A batch raises the largest index, which has to belong to an element that is wrong.
    index = jnp.where(grown & within, len(messages) - 2, index)
    index = jnp.where(torn, len(messages) - 1, index)
    # Only a Boolean passes through the error, which gathers its operand on one device.
    wrong = eqx.internal.branched_error_if(wrong, wrong, index, messages)
    return _poison(wrong, gradient, shared)


def _poison(wrong: Bool[Array, ""], gradient: Inputs, shared: Shared | None) -> Inputs:
    nan = jtu.tree_map(lambda g: jnp.full_like(g, jnp.nan), gradient)
    states = lambda inputs: (inputs.y0, inputs.solver_state)
    y0, state = tree_select(wrong, states(nan), states(gradient))
    context = params_where(shared, wrong, nan.context, gradient.context)
    return Inputs(y0, state, context)
