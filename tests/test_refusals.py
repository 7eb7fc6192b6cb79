"""Unsupported calls raise an error that names the call, the reason and a remedy."""

import warnings

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dr

from .problems import cases, InverseOnly, PID


Y0 = jnp.array([1.0, 2.0])


def solve(y0=Y0, *, terms=None, solver=None, t0=0.0, t1=1.0, **kwargs):
    defaults = dict(
        dt0=jnp.array(0.1), adjoint=dr.ReversibleAdjoint(), stepsize_controller=PID
    )
    kwargs = defaults | kwargs
    return dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y) if terms is None else terms,
        dr.ALF4() if solver is None else solver,
        t0,
        t1,
        kwargs.pop("dt0"),
        y0,
        **kwargs,
    )


reverse_mode_only = jax.custom_vjp(jnp.sin)
reverse_mode_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, bar: (jnp.cos(x) * bar,))


def brownian_term(path_cls, **kwargs):
    path = path_cls(shape=(), key=jax.random.key(0), **kwargs)
    return dfx.ControlTerm(lambda t, y, args: y, path)


def tree_term():
    return brownian_term(dfx.VirtualBrownianTree, t0=0.0, t1=1.0, tol=1e-3)


def grad_wrt(name, value, **kwargs):
    """The gradient with respect to an argument other than `y0`."""

    def total(x):
        return jnp.sum(solve(**{name: x}, **kwargs).ys)

    return jax.grad(total)(value)


def grad(**kwargs):
    return jax.grad(lambda y0: jnp.sum(solve(y0, **kwargs).ys))(Y0)


def projected(solver):
    """A `solver` of a subclass that moves the end of every step onto the unit circle."""

    class Projected(type(solver)):
        def step(self, *args):
            y1, *rest = super().step(*args)
            return y1 / jnp.linalg.norm(y1), *rest

    return Projected(**vars(solver))


class Projecting:
    """The same, as a mixin."""

    def step(self, *args):
        y1, *rest = super().step(*args)  # pyright: ignore[reportAttributeAccessIssue]
        return y1 / jnp.linalg.norm(y1), *rest


class WithMixin(Projecting, dr.ALF4):
    pass


def grad_wrt_tolerance():
    def total(rtol):
        return jnp.sum(solve(stepsize_controller=dfx.PIDController(rtol, 1e-6)).ys)

    return jax.grad(total)(1e-6)


def grad_wrt_jumps_of_steps():
    def total(ts):
        controller = dfx.ClipStepSizeController(PID, jump_ts=ts)
        saveat = dfx.SaveAt(steps=True)
        return jnp.nansum(solve(stepsize_controller=controller, saveat=saveat).ys)

    return jax.grad(total)(jnp.array([0.4]))


def grad_wrt_controller_state():
    saveat = dfx.SaveAt(t1=True, controller_state=True)
    state = solve(saveat=saveat).controller_state

    def total(scale):
        scaled = jax.tree.map(
            lambda x: x * scale if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )
        return jnp.sum(solve(controller_state=scaled).ys)

    return jax.jit(jax.grad(total))(jnp.array(1.0))


def total(y0):
    return jnp.sum(solve(y0).ys ** 2)


class Static(dfx.AbstractTerm):
    fn: object = eqx.field(static=True)

    def vf(self, t, y, args):
        return self.fn(y)

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return vf * control


def grad_wrt_static():
    def total(w):
        return jnp.sum(solve(terms=Static(lambda y: w * y)).ys)

    return jax.grad(total)(jnp.array(1.3))


def grad_of_changing_field():
    calls = []

    class Changing(dfx.ODETerm):
        """Passes other `args` on each time."""

        def vf(self, t, y, args):
            calls.append(t)
            return self.vector_field(t, y, len(calls))

    def total(w):
        return jnp.sum(solve(terms=Changing(lambda t, y, args: w * y)).ys)

    return jax.grad(total)(jnp.array(1.3))


def traced(make):
    """Solve with a traced number in place of a known one."""
    return jax.jit(lambda x: solve(**make(x)).ys)(1)


class Decay(dfx.AbstractTerm):
    def vf(self, t, y, args):
        return -y

    def contr(self, t0, t1, **kwargs):
        return 2 * (t1 - t0)

    def prod(self, vf, control):
        return vf * control


class TwoControls(dfx.AbstractTerm):
    def vf(self, t, y, args):
        return jnp.stack([y, y], axis=-1)

    def contr(self, t0, t1, **kwargs):
        return jnp.stack([t1 - t0, t1**2 - t0**2])

    def prod(self, vf, control):
        return vf @ control


class Following(dfx.AbstractStepSizeController):
    """Steps that depend on the state."""

    detach: bool = False

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, None

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        step = 0.1 / (1 + jnp.sum(y1**2))
        step = jax.lax.stop_gradient(step) if self.detach else step
        return True, t1, t1 + step, False, state, dfx.RESULTS.successful


def grad_at_steps(controller, adjoint=None):
    def total(inputs):
        sol = solve(
            inputs[0],
            args=inputs[1],
            terms=dfx.ODETerm(lambda t, y, k: -k * y),
            saveat=dfx.SaveAt(steps=True),
            stepsize_controller=controller,
            **({} if adjoint is None else dict(adjoint=adjoint)),
        )
        written = jnp.isfinite(sol.ts)
        times = jnp.where(written, sol.ts, 0)
        return jnp.sum(times**2) + jnp.sum(jnp.where(written[:, None], sol.ys, 0))

    return jax.grad(total)((Y0, jnp.array(1.0)))


JUMPS = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.5]))

# name, call, exception, parts of the message
REFUSALS = (
    (
        "a solver that is not reversible",
        lambda: solve(solver=dfx.Tsit5()),
        ValueError,
        ("`Tsit5` is not", "ALF4", "McCallumFoster(solver)", "as_reversible.register"),
    ),
    (
        "gradients with respect to t0 or t1, if moving steps are saved",
        lambda: grad_wrt(
            "t1",
            jnp.array(0.9),
            saveat=dfx.SaveAt(steps=True),
            stepsize_controller=dfx.ConstantStepSize(),
        ),
        NotImplementedError,
        ("`t0`, `t1` or `dt0`", "`SaveAt(steps=...)`", "SaveAt(ts=...)", "stop_gradient"),
    ),
    (
        "gradients with respect to t0 or t1, if an event stops at one",
        lambda: grad_wrt("t0", jnp.array(0.1), event=dfx.Event(lambda *a, **k: a[1][0])),
        NotImplementedError,
        ("`t0`, `t1` or `dt0`", "`root_finder`", "stop_gradient"),
    ),
    (
        "gradients with respect to the root finder of an event",
        lambda: jax.grad(
            lambda tol: jnp.sum(
                solve(
                    event=dfx.Event(
                        lambda t, y, args, **kwargs: y[0] - 0.5, optx.Newton(tol, 1e-6)
                    )
                ).ys
            )
        )(jnp.array(1e-6)),
        RuntimeError,
        ("gradients with respect to `event`", "stop_gradient"),
    ),
    (
        "gradients with respect to dt0 alone",
        lambda: grad_wrt("dt0", jnp.array(0.1)),
        NotImplementedError,
        ("gradients with respect to `dt0` alone", "stop_gradient"),
    ),
    (
        "gradients with respect to dt0, if moving steps are saved",
        lambda: jax.grad(
            lambda x: jnp.sum(solve(x * Y0, dt0=x / 10, saveat=dfx.SaveAt(steps=True)).ys)
        )(jnp.array(1.0)),
        NotImplementedError,
        ("`t1` or `dt0`", "`SaveAt(steps=...)`", "stop_gradient"),
    ),
    (
        "gradients with respect to the controller, besides times that it steps to",
        grad_wrt_tolerance,
        RuntimeError,
        ("gradients with respect to `stepsize_controller`", "stop_gradient"),
    ),
    (
        "gradients with respect to times of the controller, if moving steps are saved",
        grad_wrt_jumps_of_steps,
        NotImplementedError,
        ("times that the controller steps to", "`SaveAt(steps=...)`", "`StepTo`"),
    ),
    (
        "gradients with respect to controller_state",
        grad_wrt_controller_state,
        RuntimeError,
        ("gradients with respect to `controller_state`", "stop_gradient"),
    ),
    (
        "`grad` of `grad`",
        lambda: jax.grad(lambda y0: jnp.sum(jax.grad(total)(y0)))(Y0),
        RuntimeError,
        ("`jax.grad(jax.grad(...))`", "`jax.hessian(...)`", "DirectAdjoint"),
    ),
    (
        "second derivatives along times",
        lambda: jax.hessian(lambda t1: jnp.sum(solve(t1=t1).ys))(jnp.array(1.0)),
        RuntimeError,
        ("`SaveAt(ts=...)`", "`jax.hessian(...)`", "DirectAdjoint"),
    ),
    (
        "forward mode: `jvp`",
        lambda: jax.jvp(total, (Y0,), (Y0,)),
        RuntimeError,
        ("`jax.jvp`", "ForwardMode"),
    ),
    (
        "forward mode: `jacfwd`",
        lambda: jax.jacfwd(total)(Y0),
        RuntimeError,
        ("`jax.jacfwd`", "ForwardMode", "`jax.jacrev`", "`options=dict(jac='bwd')`"),
    ),
    (
        "reverse over forward mode",
        lambda: jax.grad(lambda y0: jax.jvp(total, (y0,), (y0,))[1])(Y0),
        RuntimeError,
        ("`jax.jvp`", "ForwardMode", "forward mode over reverse mode"),
    ),
    (
        "closed-over values in what is not a leaf of a term of your own",
        grad_wrt_static,
        NotImplementedError,
        ("static field", "closes over", "through `args`"),
    ),
    (
        "a vector field that closes over values and is called in changing ways",
        grad_of_changing_field,
        NotImplementedError,
        ("closes over", "another way", "through `args`"),
    ),
    (
        "settings that are none: tolerance",
        lambda: dr.ReversibleAdjoint(drift_tol=-1.0),
        ValueError,
        ("`ReversibleAdjoint(drift_tol=-1.0)`", "non-negative"),
    ),
    (
        "settings that are none: checkpoints",
        lambda: dr.ReversibleAdjoint(checkpoints=-1),
        ValueError,
        ("`ReversibleAdjoint(checkpoints=-1)`", "non-negative"),
    ),
    *(
        (
            f"a field that cannot be differentiated forwards: {name}",
            lambda how=how: solve(
                terms=dfx.ODETerm(lambda t, y, args: reverse_mode_only(y)), **how
            ),
            ValueError,
            (name, "`jax.custom_vjp`", "`jax.custom_jvp`", "DirectAdjoint"),
        )
        for name, how in (
            ("Gauss4", dict(solver=dr.Gauss4())),
            (
                "StepDensityController",
                dict(stepsize_controller=dr.StepDensityController(), dt0=None),
            ),
        )
    ),
    (
        "a step size that cannot be differentiated forwards",
        lambda: solve(
            stepsize_controller=dr.StepDensityController(
                lambda t, y, args: 0.1 + reverse_mode_only(y[0]) ** 2
            ),
            dt0=None,
        ),
        ValueError,
        ("`step_size`", "`jax.custom_vjp`", "`jax.custom_jvp`"),
    ),
    (
        "implicit steps in half precision",
        lambda: solve(
            Y0.astype(jnp.float16),
            terms=dfx.ODETerm(lambda t, y, args: jnp.sin(y)),
            solver=dr.Gauss4(),
            **{t: jnp.array(i, jnp.float16) for i, t in enumerate(("t0", "t1", "dt0"))},
        ),
        ValueError,
        ("solver=Gauss4()", "float16", "in float32"),
    ),
    (
        "noise that changes from call to call",
        lambda: solve(
            terms=brownian_term(dfx.UnsafeBrownianPath),
            solver=InverseOnly(),
            stepsize_controller=dfx.ConstantStepSize(),
        ),
        ValueError,
        ("`UnsafeBrownianPath`", "another sample", "VirtualBrownianTree"),
    ),
    (
        "stochastic terms, by the solver",
        lambda: solve(terms=tree_term(), adjoint=dfx.RecursiveCheckpointAdjoint()),
        ValueError,
        ("solver=ALF4()", "`ControlTerm`", ".to_ode()", "ReversibleHeun"),
    ),
    (
        "stochastic terms among others, by the solver",
        lambda: solve(
            terms=dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), tree_term()),
            adjoint=dfx.RecursiveCheckpointAdjoint(),
        ),
        ValueError,
        ("solver=ALF4()", "`ControlTerm`", ".to_ode()", "need not converge"),
    ),
    (
        "terms with another control than time, by the solver",
        lambda: solve(terms=TwoControls(), adjoint=dfx.RecursiveCheckpointAdjoint()),
        ValueError,
        ("solver=ALF4()", "`TwoControls`", "`t1 - t0`", "`ODETerm`"),
    ),
    (
        "terms of other kinds among several, by the solver",
        lambda: solve(
            terms=dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -y), Decay()),
            adjoint=dfx.RecursiveCheckpointAdjoint(),
        ),
        ValueError,
        ("solver=ALF4()", "`MultiTerm`", "not all `ODETerm`s", "a single `ODETerm`"),
    ),
    (
        "jumps, by a solver of Diffrax that evaluates the field there",
        lambda: solve(solver=dfx.ReversibleHeun(), stepsize_controller=JUMPS),
        NotImplementedError,
        ("solver=ReversibleHeun()", "at a jump", "End the solve at the jump", "ALF4"),
    ),
    (
        "settings that are none: solver to couple",
        lambda: dr.McCallumFoster(dfx.Kvaerno3()),
        ValueError,
        ("`McCallumFoster(Kvaerno3())`", "explicit Runge–Kutta", "diffrax.Tsit5()"),
    ),
    (
        "settings that are none: solver to couple, with a step of its own",
        lambda: dr.McCallumFoster(projected(dfx.Tsit5())),
        ValueError,
        ("`McCallumFoster(Projected())`", "`step` is overridden", "of Diffrax"),
    ),
    (
        "a subclass of a reversible solver that overrides `step`",
        lambda: solve(solver=projected(dr.ALF4())),
        ValueError,
        ("solver=Projected()", "overrides `step`", "`advance` of `AbstractALF`"),
    ),
    (
        "a reversible solver with a mixin that overrides `step`",
        lambda: solve(solver=WithMixin()),
        ValueError,
        ("solver=WithMixin()", "`Projecting` overrides `step`", "derive"),
    ),
    (
        "settings: an adapter of a solver that overrides `step`",
        lambda: solve(solver=dr.as_reversible(projected(dfx.ReversibleHeun()))),
        ValueError,
        ("solver=Projected()", "`backward_step` of `ReversibleHeun`", "derive"),
    ),
    (
        "a subclass of a registered solver that overrides `step`",
        lambda: solve(solver=projected(dfx.ReversibleHeun())),
        ValueError,
        ("solver=Projected()", "`backward_step` of `ReversibleHeun`", "derive"),
    ),
    (
        "settings that are none: coupling",
        lambda: dr.McCallumFoster(dfx.Tsit5(), coupling=1.01),
        ValueError,
        ("`McCallumFoster(..., coupling=1.01)`", "positive", "one at the most"),
    ),
    (
        "stochastic terms, by the solver that is coupled",
        lambda: solve(terms=tree_term(), solver=dr.McCallumFoster(dfx.Heun())),
        ValueError,
        ("solver=McCallumFoster()", "`ControlTerm`", "ReversibleHeun"),
    ),
    (
        "gradients of outputs at ends of steps that follow the state",
        lambda: grad_at_steps(Following()),
        NotImplementedError,
        ("`SaveAt(steps=...)`", "`stepsize_controller`", "`jax.lax.stop_gradient`"),
    ),
    (
        "settings: checkpoints as a JAX scalar",
        lambda: dr.ReversibleAdjoint(checkpoints=jnp.array(8)),
        ValueError,
        ("`ReversibleAdjoint(checkpoints=8)`", "integer", "known when"),
    ),
    (
        "settings: a fraction of a checkpoint",
        lambda: dr.ReversibleAdjoint(checkpoints=8.0),
        ValueError,
        ("`ReversibleAdjoint(checkpoints=8.0)`", "integer"),
    ),
    (
        "settings: a traced number of checkpoints",
        lambda: traced(lambda x: dict(adjoint=dr.ReversibleAdjoint(checkpoints=x))),
        ValueError,
        ("`ReversibleAdjoint(checkpoints=", "known when the solve is compiled"),
    ),
    (
        "settings: a traced tolerance for the drift",
        lambda: traced(lambda x: dict(adjoint=dr.ReversibleAdjoint(drift_tol=x))),
        ValueError,
        ("`ReversibleAdjoint(drift_tol=", "known when the solve is compiled"),
    ),
    (
        "settings: a truth value as tolerance for the drift",
        lambda: dr.ReversibleAdjoint(drift_tol=True),
        ValueError,
        ("`ReversibleAdjoint(drift_tol=True)`", "non-negative number"),
    ),
    (
        "settings: a tolerance for the drift that is no number",
        lambda: dr.ReversibleAdjoint(drift_tol="small"),
        ValueError,
        ("`ReversibleAdjoint(drift_tol=small)`", "non-negative number"),
    ),
    (
        "settings: a report that is no function",
        lambda: dr.ReversibleAdjoint(report=True),
        ValueError,
        ("`ReversibleAdjoint(report=True)`", "must be a function"),
    ),
    (
        "settings: a watch that is no function",
        lambda: dr.ReversibleAdjoint(watch="states"),
        ValueError,
        ("`ReversibleAdjoint(watch=states)`", "must be a function"),
    ),
    (
        "settings: a traced coupling",
        lambda: traced(lambda x: dict(solver=dr.McCallumFoster(dfx.Tsit5(), 0.9 * x))),
        ValueError,
        ("`McCallumFoster(..., coupling=", "known when the solve is compiled"),
    ),
    (
        "settings: a traced choice of the rounding",
        lambda: traced(lambda x: dict(solver=dr.ALF4(compensated=x > 0))),
        ValueError,
        ("`ALF4(compensated=", "known when the solve is compiled"),
    ),
    (
        "settings: a traced choice of coefficients",
        lambda: traced(lambda x: dict(solver=dr.BlanesMoan4(nystrom=x > 0))),
        ValueError,
        ("`BlanesMoan4(nystrom=", "known when the solve is compiled"),
    ),
    (
        "settings: the class of a solver",
        lambda: dr.McCallumFoster(dfx.Tsit5),
        ValueError,
        ("`McCallumFoster(Tsit5)`", "`diffrax.Tsit5()`"),
    ),
    (
        "settings: lengths in place of a tableau",
        lambda: dr.ALF([1.0]),
        ValueError,
        ("`ALF([1.0])`", "ALFTableau"),
    ),
)


@pytest.mark.parametrize(
    "call, exception, parts",
    [row[1:] for row in REFUSALS],
    ids=[row[0] for row in REFUSALS],
)
def test_refused(call, exception, parts):
    with warnings.catch_warnings():
        # Diffrax warns of complex states, and of solvers not marked as SDE solvers.
        warnings.simplefilter("ignore")
        with pytest.raises(exception) as e:
            call()
    message = str(e.value)
    for part in parts:
        assert part in message, message
    if "with respect to" in message:
        assert "RecursiveCheckpointAdjoint" in message


@pytest.mark.slow
def test_steps_that_are_detached():
    """A controller of your own may detach them by `stop_gradient`."""
    ours = grad_at_steps(Following(detach=True))
    default = dfx.RecursiveCheckpointAdjoint()
    theirs = grad_at_steps(Following(detach=True), default)
    for g, e in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12)


def test_numpy_scalars():
    adjoint = dr.ReversibleAdjoint(checkpoints=np.int32(8), drift_tol=np.float32(1e-6))
    assert type(adjoint.checkpoints) is int and type(adjoint.drift_tol) is float
    assert jnp.all(jnp.isfinite(grad(adjoint=adjoint)))


def test_no_steps():
    """With `max_steps=0` the gradient is that of the start, or the error of the solve
    itself."""
    gradient = grad(max_steps=0, throw=False, saveat=dfx.SaveAt(t0=True))
    np.testing.assert_array_equal(gradient, jnp.ones_like(Y0))
    with pytest.raises(Exception, match="maximum number of solver steps"):
        grad(max_steps=0)


@pytest.mark.parametrize("bad", cases((jnp.nan,), more=(-1.0, 0.0)))
def test_step_size_that_turns_bad(bad):
    """The solve ends with an error of Diffrax, and so does its gradient."""
    controller = dr.StepDensityController(lambda t, y, args: jnp.where(t > 0.5, bad, 0.1))
    kwargs = dict(stepsize_controller=controller, dt0=None)
    assert solve(throw=False, **kwargs).result == dfx.RESULTS.dt_min_reached
    with pytest.raises(Exception, match="minimum step size"):
        grad(**kwargs)


def test_plain_solves_are_not_refused():
    """Settings that only a gradient could fail on are accepted without one."""
    assert jnp.all(jnp.isfinite(solve(max_steps=None).ys))
    adjoint = dr.ReversibleAdjoint(checkpoints=0)
    assert jnp.all(jnp.isfinite(solve(stepsize_controller=JUMPS, adjoint=adjoint).ys))


def test_abstract_classes_cannot_be_made():
    for cls in (dr.AbstractReversibleSolver, dr.AbstractALF):
        with pytest.raises(TypeError):
            cls()


def test_integer_states_become_real():
    """As with Diffrax's own solvers."""
    assert solve(jnp.array([1, 2])).ys.dtype == jnp.float64
