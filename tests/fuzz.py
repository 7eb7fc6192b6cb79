"""Random solves, whose gradients are compared with those of Diffrax's default adjoint.

To run the cases from `FIRST` to before `LAST` by hand:
`JAX_ENABLE_X64=1 python -m tests.fuzz FIRST LAST`.
"""

import collections
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import diffrax_reversible as dr

from .problems import as_vector, kepler, lorenz, Network, network_args


MAX_STEPS = 1024


class Problem(NamedTuple):
    """`field` is a pair, like the state, for solvers of Hamiltonian systems."""

    field: Any
    y0: Any
    args: Any


def _relaxation(t, y, rate):
    return {"a": -rate * (y["a"] - jnp.cos(t).astype(y["a"].dtype)), "b": jnp.sin(y["a"])}


def _kink(t, y, args):
    return args["scale"] * jnp.stack([jax.nn.relu(y[1]) - y[0], -jnp.abs(y[0]), y[2]])


def _scales(t, y, args):
    """Entries of very different sizes."""
    return args["scale"] * jnp.stack([-1e-6 * y[1] / 1e3, 1e9 * y[0], -y[2]])


def _rotation(t, y, args):
    return (1j * args["scale"] - 0.1) * y * jnp.abs(y)


def _pendulum(t, p, args):
    return p / args["scale"]


def _pull(t, q, args):
    return -args["scale"] * jnp.sin(q) + 0.2 * jnp.sin(t).astype(q.dtype)


_Y0 = jnp.array([1.0, 2.0, 0.5])
PROBLEMS = {
    "network": Problem(Network(), _Y0, network_args()),
    "kepler": Problem(kepler, (jnp.array([0.6, 0.0]), jnp.array([0.0, 1.4])), None),
    "lorenz": Problem(lambda t, y, s: s * lorenz(t, y, None), _Y0, jnp.array(0.3)),
    "relaxation": Problem(
        _relaxation, {"a": jnp.ones(2), "b": jnp.array([0.3, 1.0])}, jnp.array(12.0)
    ),
    "kink": Problem(_kink, jnp.array([1.0, 0.0, 0.2]), network_args()),
    "scales": Problem(_scales, jnp.array([1e-3, 1.0, 1e6]), network_args()),
    "complex": Problem(_rotation, jnp.array([1.0 + 0.2j, 0.3j]), network_args()),
    "pendulum": Problem((_pendulum, _pull), (_Y0, _Y0 / 2), network_args()),
    "oscillator": Problem((_pendulum, Network()), (_Y0, -_Y0), network_args()),
}
SOLVERS = {
    "ALF2": dr.ALF2(),
    "ALF4": dr.ALF4(),
    "ALF6": dr.ALF6(),
    "ALF8": dr.ALF8(),
    "ALF4 compensated": dr.ALF4(compensated=True),
    "ALF6 bitwise": dr.ALF6(bitwise=True),
    "McCallumFoster Tsit5": dr.McCallumFoster(dfx.Tsit5()),
    "McCallumFoster Bosh3": dr.McCallumFoster(dfx.Bosh3(), coupling=1),
    "ReversibleHeun": dfx.ReversibleHeun(),
    "LeapfrogMidpoint": dfx.LeapfrogMidpoint(),
    "ImplicitMidpoint": dr.ImplicitMidpoint(),
    "Gauss6": dr.Gauss6(),
}
SPLITTINGS = {
    "StormerVerlet": dr.StormerVerlet(),
    "BlanesMoan4": dr.BlanesMoan4(),
    "BlanesMoan6 nystrom": dr.BlanesMoan6(nystrom=True),
    "KahanLi8 compensated": dr.KahanLi8(compensated=True),
    "SemiImplicitEuler": dfx.SemiImplicitEuler(),
}
# Solvers without error estimates.
FIXED = ("ALF2", "LeapfrogMidpoint", "SemiImplicitEuler")
CONTROLLERS = ("constant", "pid", "clipped", "jumps", "step to", "density")
SAVEATS = ("t1", "t0 ts", "steps", "every third", "dense", "fn", "subs", "no ts")
WITH_RESPECT_TO = ("y0", "args", "both", "ts", "t1")
TRANSFORMS = ("jit", "vmap", "scan", "hessian-vector", "event", "event with root")


class Case(NamedTuple):
    seed: int
    problem: str
    solver: str
    controller: str
    saveat: str
    wrt: str
    transform: str
    single: bool
    backwards: bool
    tol: float


def draw(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    problem = rng.choice(list(PROBLEMS))
    splits = isinstance(PROBLEMS[problem].field, tuple)
    solver = rng.choice(list(SPLITTINGS if splits else SOLVERS))
    controllers = CONTROLLERS
    if solver in FIXED:
        controllers = ("constant", "step to", "density")
    wrt = str(rng.choice(WITH_RESPECT_TO, p=(0.2, 0.2, 0.4, 0.1, 0.1)))
    controller = str(rng.choice(controllers))
    if wrt == "t1" and controller in ("constant", "density"):
        # Their steps move with `t1`, which gradients ignore.
        controller = "step to"
    return Case(
        seed,
        str(problem),
        str(solver),
        controller,
        str(rng.choice(SAVEATS)),
        "y0" if wrt == "args" and PROBLEMS[problem].args is None else wrt,
        str(rng.choice(TRANSFORMS, p=(0.4, 0.2, 0.1, 0.1, 0.1, 0.1))),
        bool(rng.random() < 0.25),
        bool(rng.random() < 0.2),
        float(10 ** rng.uniform(-8, -2)),
    )


def _cast(x: Any) -> Any:
    """`x` in single precision, if it is an array."""
    dtypes = {jnp.dtype("float64"): "float32", jnp.dtype("complex128"): "complex64"}
    return x.astype(dtypes.get(x.dtype, x.dtype)) if isinstance(x, jax.Array) else x


def _run(fn: Callable, *args: Any) -> Any:
    return jax.jit(fn)(*args)


def gradient(
    case: Case, adjoint: dfx.AbstractAdjoint, run: Callable[..., Any] = _run
) -> Any:
    """The gradient of a case. With `run=jax.eval_shape` it is only traced."""
    problem = PROBLEMS[case.problem]
    solver = SOLVERS.get(case.solver) or SPLITTINGS[case.solver]
    sign = -1 if case.backwards else 1
    pair = isinstance(problem.field, tuple)
    field, y0, args = problem
    if case.single:
        y0, args, field = jax.tree.map(_cast, (y0, args, field))
    terms = jax.tree.map(dfx.ODETerm, field, is_leaf=callable)
    terms = terms if pair else dfx.ODETerm(field)
    tol = max(case.tol, 1e-4) if case.single else case.tol
    t1 = sign * 2.0
    pid = dfx.PIDController(rtol=tol, atol=tol)
    inner = sign * jnp.array([0.3, 1.1])
    grid = sign * jnp.array([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.1, 1.4, 1.7, 2.0])
    controller = {
        "constant": dfx.ConstantStepSize(),
        "pid": pid,
        "clipped": dfx.ClipStepSizeController(pid, step_ts=inner),
        "jumps": dfx.ClipStepSizeController(pid, jump_ts=inner),
        "step to": dfx.StepTo(grid),
        "density": dr.StepDensityController(fraction=0.05),
    }[case.controller]
    dt0 = {"step to": None, "density": None, "pid": None}.get(case.controller, sign * 0.05)
    ts = sign * jnp.array([0.0, 0.07, 0.3, 0.31, 1.2, 1.9, 2.0])
    square = lambda t, y, args: jax.tree.map(lambda y: y * y, y)
    event = None
    if case.transform.startswith("event"):
        root = optx.Newton(1e-6, 1e-6) if "root" in case.transform else None
        first = lambda y: jnp.real(jax.tree.leaves(y)[0].reshape(-1)[0])
        event = dfx.Event(lambda t, y, args, **_: first(y) - 0.7, root)

    def loss(y0, args, times):
        ts, t1 = times
        saveat = {
            "t1": dfx.SaveAt(t1=True),
            "t0 ts": dfx.SaveAt(t0=True, ts=ts),
            "steps": dfx.SaveAt(steps=True),
            "every third": dfx.SaveAt(steps=3, t1=True),
            "dense": dfx.SaveAt(dense=True),
            "fn": dfx.SaveAt(ts=ts, fn=square),
            "subs": dfx.SaveAt(
                subs=[dfx.SubSaveAt(ts=ts), dfx.SubSaveAt(t1=True, fn=square)]
            ),
            "no ts": dfx.SaveAt(t0=True, t1=True),
        }[case.saveat]
        sol = dfx.diffeqsolve(
            terms,
            solver,
            *(0.0, t1, dt0, y0, args),
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            event=event,
            max_steps=MAX_STEPS,
        )
        ys = sol.ys
        if case.saveat == "dense":
            # These times lie before any event.
            ys = jax.vmap(sol.evaluate)(t1 * jnp.linspace(0.01, 0.1, 5))
        leaves = jax.tree.leaves(ys)
        finite = (jnp.where(jnp.isfinite(y), y, 0) for y in leaves)
        return sum(jnp.sum(jnp.abs(y) ** 2 + jnp.real(y)) for y in finite)

    wrt = {"y0": (0,), "args": (1,), "both": (0, 1), "ts": (2,), "t1": (2,)}[case.wrt]
    chosen = [(y0, args, (ts, jnp.array(t1)))[i] for i in wrt]
    is_real = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    leaves, structure = jax.tree.flatten(chosen)
    numbers = [leaf for leaf in leaves if is_real(leaf)]

    def of(numbers):
        rest = iter(numbers)
        full = [next(rest) if is_real(leaf) else leaf for leaf in leaves]
        inputs = [y0, args, (ts, jnp.array(t1))]
        for i, x in zip(wrt, jax.tree.unflatten(structure, full), strict=True):
            inputs[i] = x
        if case.wrt == "ts":
            inputs[2] = inputs[2][0], jnp.array(t1)
        if case.wrt == "t1":
            inputs[2] = ts, inputs[2][1]
        return loss(*inputs)

    grad = jax.grad(of)
    if case.transform == "vmap":
        factors = jnp.array([1.0, 0.7, 1.2])
        batch = [jax.vmap(lambda f, n=n: n * f.astype(n.dtype))(factors) for n in numbers]
        batch = numbers if case.wrt in ("ts", "t1") else batch
        if case.wrt in ("ts", "t1"):
            return run(lambda n: jax.vmap(lambda _: grad(n))(factors), numbers)
        return run(jax.vmap(grad), batch)
    if case.transform == "scan":
        step = lambda n, _: (n, grad(n))
        return run(lambda n: jax.lax.scan(step, n, None, length=2)[1], numbers)
    if case.transform == "hessian-vector":
        return run(lambda n: jax.jvp(grad, (n,), (n,))[1], numbers)
    return run(grad, numbers)


# Words that mark intended errors.
WORDED = (
    "ReversibleAdjoint",
    "diffrax_reversible",
    "StepDensityController",
    "nystrom=True",
)


def outcome(case: Case) -> tuple[str, str]:
    """The outcome of a case, and details of it."""

    def attempt(adjoint):
        try:
            return as_vector(gradient(case, adjoint)), ""
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            # Drop the place where an error on the device was raised.
            return None, f"{type(error).__name__}: {error}".split("EquinoxRuntimeError: ")[
                -1
            ]

    # Checkpoints for all restarts, the default, or hardly any.
    checkpoints = (64, None, 1)[case.seed % 3]
    ours, message = attempt(dr.ReversibleAdjoint(checkpoints=checkpoints))
    want, other = attempt(dfx.RecursiveCheckpointAdjoint(checkpoints=MAX_STEPS))
    if want is None:
        return ("both fail" if ours is None else "only ours"), other[:200]
    if ours is None:
        worded = any(word in message for word in WORDED)
        return ("refused" if worded else "defect"), message[:600]
    if not np.all(np.isfinite(want)):
        return "not finite", ""
    # The loss is of order one, so a gradient of 1e-8 may be zero.
    error = np.max(np.abs(ours - want), initial=0) / (np.max(np.abs(want), initial=1e-8))
    # Less than the documentation of `drift_tol` allows, in either precision.
    if error <= (0.05 if case.single else 6e-6):
        return "equal", f"{error:.0e}"
    return "defect", f"off by {error:.1e}"


def main(first: int, last: int) -> None:
    counts = collections.Counter()
    for seed in range(first, last):
        case = draw(seed)
        with jax.numpy_dtype_promotion("standard"):
            what, more = outcome(case)
        counts[what] += 1
        if what not in ("equal", "not finite"):
            print(what, case, more.replace("\n", " "), flush=True)
        if seed % 10 == 9:
            jax.clear_caches()
            print(dict(counts), flush=True)
    print(dict(counts))


if __name__ == "__main__":
    if not jax.config.read("jax_enable_x64"):
        # The arrays above are already in single precision.
        raise RuntimeError("Set `JAX_ENABLE_X64=1`.")
    jax.config.update("jax_disable_most_optimizations", True)
    main(*map(int, sys.argv[1:]))
