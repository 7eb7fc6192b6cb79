"""The methods of `speed.py`, and one gradient by each."""

import functools
import importlib
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from speed_problems import Problem

import diffrax_reversible as dr


OURS, LEAN, APART = "ours", "memory-lean", "apart"
# Errors of gradients in float64 at which methods are compared.
ERRORS = (1e-3, 1e-5, 1e-7)


class Setting(NamedTuple):
    """A number of fixed steps, or a tolerance of `PIDController`."""

    fixed: bool
    value: Any

    def __str__(self) -> str:
        return f"{self.value} steps" if self.fixed else f"tol {self.value:.0e}"


class Bounds(NamedTuple):
    """The room for a solve, which a user finds in the statistics of an earlier one."""

    max_steps: int
    restarts: int = 8


class Method(NamedTuple):
    """How a gradient is computed.

    - `stages`: evaluations per step. The last does not count if it is the first of the
        next step.
    - `dry`: the name of a method with the same solver, whose dry run serves for this one.
    - `direct`: whether the method is only for problems with `Problem.direct`.
    """

    name: str
    group: str
    solver: Any
    stages: int
    adjoint: Callable[[Setting, "Bounds"], dfx.AbstractAdjoint] | None
    fixed: bool = True
    adaptive: bool = True
    splits: bool = False
    dry: str | None = None
    direct: bool = False

    def serves(self, problem: Problem, fixed: bool) -> bool:
        if self.splits and problem.force is None or self.direct and not problem.direct:
            return False
        if problem.steps is not None:
            return fixed and self.name in problem.steps
        return self.fixed and problem.fixed if fixed else self.adaptive


def _reversible(setting, bounds):
    """`ReversibleAdjoint`, with room for all restarts if these are more than usual."""
    del setting
    more = bounds.restarts > Bounds(bounds.max_steps).restarts
    return dr.ReversibleAdjoint(checkpoints=bounds.restarts if more else None)


def _symplectic(setting, bounds):
    """`ReversibleAdjoint` for solvers without restarts."""
    del setting, bounds
    return dr.ReversibleAdjoint()


def _default(setting, bounds):
    del setting, bounds
    return dfx.RecursiveCheckpointAdjoint()


def _all(setting, bounds):
    del setting
    return dfx.RecursiveCheckpointAdjoint(checkpoints=bounds.max_steps)


def _direct(setting, bounds):
    del setting, bounds
    return dfx.DirectAdjoint()


def _backsolve(setting, bounds):
    """The backward solve controls the errors of the state and of its cotangent, and may
    take four times as many steps."""
    if setting.fixed:
        return dfx.BacksolveAdjoint()
    norm = dfx.adjoint_rms_seminorm
    controller = dfx.PIDController(rtol=setting.value, atol=setting.value, norm=norm)
    max_steps = 4 * bounds.max_steps
    return dfx.BacksolveAdjoint(stepsize_controller=controller, max_steps=max_steps)


_HEUN, _TSIT5, _DOPRI8 = dfx.ReversibleHeun(), dfx.Tsit5(), dfx.Dopri8()
METHODS = (
    Method("ALF4", OURS, dr.ALF4(), 5, _reversible),
    Method("ALF6", OURS, dr.ALF6(), 20, _reversible),
    Method("ALF8", OURS, dr.ALF8(), 34, _reversible, fixed=False),
    Method("BlanesMoan4", OURS, dr.BlanesMoan4(nystrom=True), 6, _symplectic, splits=True),
    Method("BlanesMoan6", OURS, dr.BlanesMoan6(nystrom=True), 11, _symplectic, splits=True),
    Method(
        "ReversibleHeun, ReversibleAdjoint", OURS, _HEUN, 1, _reversible, adaptive=False
    ),
    Method("Tsit5", LEAN, _TSIT5, 6, _default),
    Method("Dopri5", LEAN, dfx.Dopri5(), 6, _default),
    Method("Dopri8", LEAN, _DOPRI8, 13, _default),
    Method("Tsit5, all checkpoints", LEAN, _TSIT5, 6, _all, dry="Tsit5"),
    Method("Dopri8, all checkpoints", LEAN, _DOPRI8, 13, _all, dry="Dopri8"),
    Method("Tsit5, BacksolveAdjoint", LEAN, _TSIT5, 6, _backsolve, dry="Tsit5"),
    Method("ReversibleHeun", LEAN, _HEUN, 1, _default, adaptive=False),
    Method(
        "Tsit5, DirectAdjoint", APART, _TSIT5, 6, _direct, False, dry="Tsit5", direct=True
    ),
    Method("gradsolve Tsit5", APART, None, 7, None, dry="Tsit5"),
)
BY_NAME = {method.name: method for method in METHODS}


class Stats(NamedTuple):
    """The most steps and restarts of any ensemble member, and the mean evaluations."""

    steps: Any
    restarts: Any
    evaluations: Any


def make_loss(
    problem: Problem, method: Method, setting: Setting, bounds: Bounds, throw: bool = True
) -> Callable[..., tuple[Any, Stats]]:
    """The loss and its `Stats`, as a function of `y0` and `args`."""
    if setting.fixed:
        controller, dt0 = dfx.ConstantStepSize(), problem.t1 / setting.value
    else:
        controller = dfx.PIDController(rtol=setting.value, atol=setting.value)
        dt0 = None
    terms: Any = dfx.ODETerm(problem.field)
    if method.splits:
        assert problem.force is not None
        terms = dfx.ODETerm(lambda t, p, args: p), dfx.ODETerm(problem.force)
    saveat = dfx.SaveAt(t1=True) if problem.ts is None else dfx.SaveAt(ts=problem.ts)
    assert method.adjoint is not None
    adjoint = method.adjoint(setting, bounds)

    def solve(y0, args):
        sol = dfx.diffeqsolve(
            terms,
            method.solver,
            0.0,
            problem.t1,
            dt0,
            problem.split(y0) if method.splits else y0,
            args,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=bounds.max_steps,
            throw=throw,
        )
        ys = problem.merge(sol.ys) if method.splits else sol.ys
        restarts = jnp.asarray(sol.stats.get("num_restarts", 0))
        return problem.loss(ys), sol.stats["num_steps"], restarts

    def loss(y0, args):
        each = jax.vmap(solve) if problem.ensemble else solve
        value, steps, restarts = each(y0, args)
        evaluations = jnp.mean(method.stages * steps + restarts)
        stats = Stats(jnp.max(steps), jnp.max(restarts), evaluations)
        return jnp.sum(value), stats

    return loss


@functools.cache
def gradsolve() -> Any:
    """The package, or `None` if it is not installed."""
    try:
        return importlib.import_module("gradsolve")
    except ImportError as e:
        print(f"gradsolve is skipped: {e}")
        return None


def make_gradsolve_loss(problem: Problem, stages: int, setting: Setting) -> Callable:
    """As `make_loss`, by gradsolve, which takes arrays of states and of parameters.

    Adaptive steps are chosen here, outside the timed function.
    """
    lead = (lambda fn: jax.vmap(fn)) if problem.ensemble else (lambda fn: fn)
    inputs = problem.y0, problem.args
    member = jax.tree.map(lambda x: x[0] if problem.ensemble else x, inputs)
    _, unravel_y = ravel_pytree(member[0])
    _, unravel_args = ravel_pytree(member[1])

    def field(t, y, args):
        return ravel_pytree(problem.field(t, unravel_y(y), unravel_args(args)))[0]

    def rows(tree):
        flat = lead(lambda x: ravel_pytree(x)[0])(tree)
        return flat if problem.ensemble else flat[None]

    y0, args = rows(problem.y0), rows(problem.args)
    spec = types.SimpleNamespace(
        name="benchmark",
        dim=y0.shape[1],
        t0=0.0,
        t1=problem.t1,
        is_stiff=False,
        f_jax=field,
    )
    if setting.fixed:
        tsit5 = importlib.import_module("gradsolve.solvers.fixed_step_tsit5")
        steps = np.array([setting.value])

        def solve(y0, args):
            n = dict(n_steps=setting.value)
            if problem.ts is None:
                return tsit5.solve_jax(spec, y0, args, **n)
            return tsit5.solve_jax_saveat(spec, y0, args, problem.ts, **n)[1]

    else:
        tols = dict(rtol=setting.value, atol=setting.value, engine="tsit5_replay")
        steps = gradsolve().solve(spec, y0, args, **tols).accepted_steps
        wrt = ("y0", "params")
        solve = gradsolve().grad_closure(
            spec, y0, args, wrt=wrt, saveat=problem.ts, fused=False, **tols
        )

    def loss(y0, args):
        ys = solve(rows(y0), rows(args))
        to_state = unravel_y if problem.ts is None else jax.vmap(unravel_y)
        return jnp.sum(jax.vmap(lambda y: problem.loss(to_state(y)))(ys)), stats

    longest = steps.max()
    stats = Stats(*map(jnp.asarray, (longest, 0, stages * longest)))
    return loss


class Gradient(NamedTuple):
    """A compiled gradient, its compile time in seconds and temporary memory in bytes."""

    run: Callable[[], tuple[Any, Stats]]
    compile_time: float
    memory: int


def compile_gradient(
    problem: Problem, method: Method, setting: Setting, bounds: Bounds
) -> Gradient:
    if method.solver is None:
        loss = make_gradsolve_loss(problem, method.stages, setting)
    else:
        loss = make_loss(problem, method, setting, bounds)
    start = time.perf_counter()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    compiled = gradient.lower(problem.y0, problem.args).compile()
    compile_time = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None
    run = lambda: jax.block_until_ready(compiled(problem.y0, problem.args))
    return Gradient(run, compile_time, analysis.temp_size_in_bytes)


def flatten(gradient: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(gradient)[0])


def distance(gradient: np.ndarray, reference: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))
