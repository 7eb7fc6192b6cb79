"""Ordinary user code that hides differentiated values anywhere: gradients equal those of
the default adjoint."""

import dataclasses
import functools as ft
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

import diffrax_reversible as dr

from .problems import cases, PID, relative_error, sum_of_squares


Y0 = jnp.array([1.0, 2.0])
W = jnp.array(1.3)


class Plain:
    """An object that is no PyTree, like the modules of other libraries."""

    def __init__(self, w):
        self.w = w

    def rate(self, y):
        return self.w * y

    def __call__(self, y):
        return jnp.sin(self.rate(y))


class Static(eqx.Module):
    fn: Callable = eqx.field(static=True)

    def __call__(self, t, y, args):
        return self.fn(y)


@jtu.register_pytree_node_class
@dataclasses.dataclass
class Registered:
    bias: jax.Array
    fn: Callable

    def tree_flatten(self):
        return (self.bias,), self.fn

    @classmethod
    def tree_unflatten(cls, fn, children):
        return cls(*children, fn)


def field_and_args_close_over_the_same(w):
    return lambda t, y, args: jnp.sin(args(y)) - w * y, lambda y: w * y


def a_method_of_an_object_in_args(w):
    return lambda t, y, args: args(y) - args.rate(y) * args.w, Plain(w)


def a_static_field(w):
    return Static(lambda y: jnp.sin(w * y)), None


def a_static_field_of_a_constant(w):
    scale = jax.lax.stop_gradient(w)
    return Static(lambda y: jnp.sin(scale * y)), w


def a_partial(w):
    return ft.partial(lambda k, t, y, args: jnp.sin(k * y) * args.keywords["w"], w), (
        ft.partial(lambda y, w: w * y, w=w)
    )


def a_jax_partial_of_a_closure(w):
    return lambda t, y, args: args(y), jtu.Partial(lambda y: jnp.sin(w * y))


def a_registered_class(w):
    return (
        lambda t, y, args: args.fn(y) + args.bias,
        Registered(w, lambda y: jnp.sin(w * y)),
    )


def functions_that_call_functions(w):
    args = {"f": lambda g, y: g(jnp.sin(y)), "g": lambda y: w * y}
    return lambda t, y, args: args["f"](args["g"], y), args


def a_function_that_returns_one(w):
    return lambda t, y, args: args(2.0)(y), lambda k: lambda y: jnp.sin(w * y) * k


def jitted_and_checkpointed(w):
    inner = jax.checkpoint(lambda y: jnp.sin(w * y))
    return lambda t, y, args: inner(y) + args(y), eqx.filter_jit(lambda y: -w * y)


def functions_as_keys(w):
    def fn(y):
        return w * y

    return lambda t, y, args: jnp.sin(y) * len(args[0].__name__) * fn(y), (fn, {fn: 1})


IDIOMS = (
    field_and_args_close_over_the_same,
    a_method_of_an_object_in_args,
    a_static_field,
    a_static_field_of_a_constant,
    a_partial,
    a_jax_partial_of_a_closure,
    a_registered_class,
    functions_that_call_functions,
    a_function_that_returns_one,
    jitted_and_checkpointed,
    functions_as_keys,
)


def gradients(make, saveat=None, **kwargs):
    def loss(w, adjoint):
        field, args = make(w)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dr.ALF4(),
            0.0,
            1.0,
            0.1,
            Y0 * w,
            args,
            saveat=dfx.SaveAt(t1=True) if saveat is None else saveat,
            stepsize_controller=PID,
            adjoint=adjoint,
            **kwargs,
        )
        return sum_of_squares(sol.ys)

    def of(adjoint):
        return jax.jit(jax.grad(lambda w: loss(w, adjoint)))(W)

    return of(dr.ReversibleAdjoint()), of(dfx.RecursiveCheckpointAdjoint())


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    cases(IDIOMS[2:3], slow=IDIOMS[:2] + IDIOMS[3:]),
    ids=lambda make: make.__name__,
)
def test_idioms(make):
    ours, theirs = gradients(make)
    assert ours != 0
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("hides", (False, True))
def test_variable_of_a_loop(hides):
    """A vector field reads the Python variables of its time, also in the backward pass."""

    def loss(rate, adjoint):
        y, scale = jnp.array(1.0), 1.0
        for k in (1.0, 2.0):
            # Otherwise `scale` is the constant one.
            scale = rate if hides else scale
            field = lambda t, y, args: -k * args[0] * y + k * scale**2  # noqa: B023
            sol = dfx.diffeqsolve(
                dfx.ODETerm(field),
                dr.ALF4(),
                *(0.0, 1.0, None, y, [rate]),
                stepsize_controller=PID,
                adjoint=adjoint,
            )
            y = sol.ys[-1]
            scale = scale + k
        return y

    ours = jax.grad(loss)(jnp.array(0.7), dr.ReversibleAdjoint())
    theirs = jax.grad(loss)(jnp.array(0.7), dfx.RecursiveCheckpointAdjoint())
    assert relative_error(ours, theirs) < 1e-8


class Inner(dfx.AbstractTerm):
    """Passes a part of its `args` to another term."""

    term: dfx.ODETerm

    def vf(self, t, y, args):
        return self.term.vf(t, y, args["inner"])

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1)

    def prod(self, vf, control):
        return self.term.prod(vf, control)


class Decaying(dfx.ODETerm):
    """Reads an attribute of its vector field."""

    def vf(self, t, y, args):
        return -self.vector_field.rate * y


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


def stops_at(t, y, args, *, terms, **kwargs):
    """Reads an attribute of a vector field."""
    return y[0] - 0.9 * terms.term.vector_field.rate


@pytest.mark.parametrize(
    "term, condition",
    (
        (lambda rate: Inner(dfx.ODETerm(lambda t, y, rate: -rate * y)), None),
        (lambda rate: Decaying(Decay(rate)), None),
        (lambda rate: dfx.ODETerm(Decay(rate)), stops_at),
    ),
    ids=("other args", "attribute", "attribute in event"),
)
def test_fields_as_they_are_given(term, condition):
    """Traced vector fields are called with other `args`, and have all attributes."""
    event = None
    if condition is not None:
        event = dfx.Event(condition, optx.Newton(1e-9, 1e-9))

    def loss(rate, adjoint):
        sol = dfx.diffeqsolve(
            term(rate),
            dr.ALF4(),
            *(0.0, 1.0, None, jnp.array([1.0]), {"inner": rate, "other": 1}),
            stepsize_controller=PID,
            adjoint=adjoint,
            event=event,
        )
        return jnp.sum(sol.ys) + sol.ts[-1]

    ours = jax.grad(loss)(jnp.array(0.7), dr.ReversibleAdjoint())
    theirs = jax.grad(loss)(jnp.array(0.7), dfx.RecursiveCheckpointAdjoint())
    assert relative_error(ours, theirs) < 1e-8


@pytest.mark.slow
def test_functions_in_args_of_outputs():
    """Outputs and events may call functions in `args` differently than the field does."""
    saveat = dfx.SaveAt(ts=[0.3, 1.0], fn=lambda t, y, args: args(y[0]) * t)
    event = dfx.Event(lambda t, y, args, **kwargs: args(y[1]) - 50.0)
    ours, theirs = gradients(field_and_args_close_over_the_same, saveat=saveat, event=event)
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.slow
def test_terms_in_events():
    """A condition may call the terms with its own `args`."""

    def condition(t, y, args, *, terms, **kwargs):
        return terms.vf(t, y, lambda y: 3.0 * y)[1] + 4.0

    ours, theirs = gradients(
        field_and_args_close_over_the_same,
        event=dfx.Event(condition, optx.Newton(1e-8, 1e-8)),
    )
    assert relative_error(ours, theirs) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("detach", (False, True), ids=("argument", "stop_gradient"))
def test_norm(detach):
    """The norm of a `PIDController` may close over a traced value."""

    def controller(scale):
        norm = lambda y: jnp.max(jnp.abs(y)) * scale
        return dfx.PIDController(rtol=1e-5, atol=1e-7, norm=norm)

    def loss(w, scale, adjoint):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: jnp.sin(w * y)),
            dr.ALF4(),
            0.0,
            1.0,
            0.1,
            Y0,
            w,
            stepsize_controller=controller(jax.lax.stop_gradient(w) if detach else scale),
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys)

    def of(adjoint):
        return jax.jit(jax.grad(lambda w, scale: loss(w, scale, adjoint)))(W, W)

    assert relative_error(of(dr.ReversibleAdjoint()), of(dfx.DirectAdjoint())) < 1e-10


class Scaled(dfx.AbstractStepSizeController):
    """Scales the error by a function that is no leaf."""

    inner: dfx.PIDController
    scale: Callable = eqx.field(static=True)

    def wrap(self, direction):
        return Scaled(self.inner.wrap(direction), self.scale)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.inner.init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, controller_state):
        y_error = jax.tree.map(self.scale, y_error)
        return self.inner.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, controller_state
        )


@pytest.mark.slow
def test_static_field_of_a_controller():
    def loss(w, scale, adjoint):
        controller = Scaled(PID, lambda x: x * jax.lax.stop_gradient(scale))
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, w: jnp.sin(w * y)),
            *(dr.ALF4(), 0.0, 1.0, 0.1, Y0, w),
            stepsize_controller=controller,
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys), sol.stats["num_steps"]

    def of(adjoint, scale=100.0):
        gradient = jax.grad(lambda w, scale: loss(w, scale, adjoint), has_aux=True)
        return jax.jit(gradient)(W, scale)

    ours, count = of(dr.ReversibleAdjoint())
    assert relative_error(ours, of(dfx.RecursiveCheckpointAdjoint())[0]) < 1e-10
    assert count > of(dr.ReversibleAdjoint(), 1.0)[1]


def test_function_that_cannot_be_seen():
    """A reversible controller may not hide a traced value in a function that is no leaf."""

    class Hidden(dr.StepDensityController):
        scale: Callable = eqx.field(static=True, default=None)

        def adapt_step_size(self, *args):
            accepts, t0, t1, *rest = super().adapt_step_size(*args)
            return accepts, t0, self.scale(t1), *rest

    def loss(w):
        controller = Hidden(lambda t, y, args: 0.1, scale=lambda t: t * w)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y),
            *(dr.ALF4(), 0.0, 1.0, None, Y0),
            stepsize_controller=controller,
            adjoint=dr.ReversibleAdjoint(),
        )
        return sum_of_squares(sol.ys)

    with pytest.raises(NotImplementedError, match="fields of the controller"):
        jax.jit(jax.grad(loss))(W)


class MassMatrix(dfx.AbstractTerm):
    """`M y' = f(y)`."""

    matrix: jax.Array

    def vf(self, t, y, args):
        return jnp.sin(y) - args * y

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return jnp.linalg.solve(self.matrix, vf) * control


@pytest.mark.long
@pytest.mark.parametrize("t1", cases((-1.0,), slow=(1.0,)))
@pytest.mark.parametrize(
    "solver", cases((dr.ALF4(),), slow=(dr.McCallumFoster(dfx.Tsit5()),))
)
def test_product_of_a_term(solver, t1):
    """Solvers use a term's own `prod`."""
    matrix = jnp.array([[2.0, 0.3], [-0.1, 0.5]])

    def loss(inputs, solver, adjoint):
        sol = dfx.diffeqsolve(
            MassMatrix(inputs[0]),
            solver,
            0.0,
            t1,
            0.1 * t1,
            Y0,
            inputs[1],
            stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8),
            adjoint=adjoint,
        )
        return sum_of_squares(sol.ys)

    of = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    ours = of((matrix, W), solver, dr.ReversibleAdjoint())
    theirs = of((matrix, W), dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint())
    assert relative_error(ours, theirs) < 1e-6


def test_product_of_a_term_in_a_splitting():
    class Mass(dfx.ODETerm):
        def prod(self, vf, control):
            return 0.25 * vf * control

    def final(term):
        terms = dfx.ODETerm(lambda t, p, args: p), term
        y0 = jnp.array([1.0]), jnp.array([0.0])
        return dfx.diffeqsolve(terms, dr.BlanesMoan6(), 0.0, 2.0, 0.1, y0).ys

    divided = dfx.ODETerm(lambda t, q, args: -q / 4)
    assert relative_error(final(Mass(lambda t, q, args: -q)), final(divided)) < 1e-14
