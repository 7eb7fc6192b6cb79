"""The compiled memory of a gradient is a few states, for any number of steps."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dr

from .problems import as_terms, cases, COMPENSATED, FAMILIES, families, PID, SOLVERS


# Measure the program that users get.
pytestmark = pytest.mark.optimised


def field(t, y, scale):
    return jnp.tanh(scale * jnp.roll(y, 1)) - jnp.cos(t) * y


# The most steps on record, twice, as a replay writes to a copy.
ROWS = 2 << 14


def temporary_bytes(
    solver,
    controller,
    size,
    max_steps,
    adjoint=None,
    saveat=None,
    splits=False,
    dtype=jnp.float64,
):
    adjoint = dr.ReversibleAdjoint(checkpoints=0) if adjoint is None else adjoint
    saveat = dfx.SaveAt(t1=True) if saveat is None else saveat

    def loss(y0, scale):
        sol = dfx.diffeqsolve(
            as_terms((field, field) if splits else field),
            solver,
            *jnp.array([0.0, 1.0, 0.1], dtype),
            (y0, y0) if splits else y0,
            scale,
            saveat=saveat,
            adjoint=adjoint,
            stepsize_controller=controller,
            max_steps=max_steps,
        )
        return sum(map(jnp.sum, jax.tree.leaves(sol.ys)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    y0 = jax.ShapeDtypeStruct((size,), dtype)
    scale = jax.ShapeDtypeStruct((), dtype)
    return gradient.lower(y0, scale).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("solver", cases(SOLVERS[1:2], slow=SOLVERS[2:]), ids=repr)
@pytest.mark.parametrize(
    "controller, size",
    cases(((PID, 10),), slow=((PID, 100_000), (dfx.ConstantStepSize(), 10))),
)
@pytest.mark.parametrize(
    "few, many, growth",
    cases(((1_001_000, 2_001_000, 1_000),), more=((20_000, 1_001_000, 9 * ROWS + 200),)),
)
def test_growth_with_steps(solver, controller, size, few, many, growth):
    """A step on record takes a time and a restart flag. Beyond, memory does not grow."""
    before, after = (temporary_bytes(solver, controller, size, n) for n in (few, many))
    assert 0 <= after - before <= growth


@families
def test_growth_of_families(family):
    """Memory grows by one time for each step on record, two for `LeapfrogMidpoint`, and by
    a few states."""
    solver, field, _, controller, _ = FAMILIES[family]
    kwargs = dict(splits=isinstance(field, tuple))
    small, many, large = (
        temporary_bytes(solver, controller, size, n, **kwargs)
        for size, n in ((10, 1_000), (10, 1_001_000), (100_010, 1_000))
    )
    numbers = 2 if family == "LeapfrogMidpoint" else 1
    assert 0 <= many - small <= (8 * numbers + 1) * ROWS + 200
    states = (large - small) / 8e5
    # A step keeps all stages of `Tsit5`; JAX 0.4 keeps some of them twice.
    assert states < (40 if family == "coupling" else 20)


@pytest.mark.slow
def test_growth_with_jumps():
    """Jumps take one more time for each step on record."""
    jumps = dfx.ClipStepSizeController(PID, jump_ts=jnp.array([0.3]))
    few, many = (temporary_bytes(SOLVERS[1], jumps, 10, n) for n in (1_000, 1_001_000))
    assert 0 <= many - few <= 17 * ROWS + 200


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    cases(SOLVERS[1:2], slow=(SOLVERS[0], *SOLVERS[2:])),
    ids=repr,
)
@pytest.mark.parametrize("controller", cases((PID,), slow=(dfx.ConstantStepSize(),)))
def test_states(solver, controller):
    """Memory is a few states, whatever the number of sub-steps."""
    size = 1_000_000
    used = temporary_bytes(solver, controller, size, 100) / (8 * size)
    # `y`, `v` and their cotangents, the start, the end, and the update by a step. With
    # restarts, some of these three times, for three positions of the backward pass, which
    # may begin once more; a known state; the deviation, and the scales of its entries in
    # half the memory; the growth, in a quarter of the memory; and both ends of a step that
    # the backward pass divides.
    most = 9 if isinstance(solver, dr.ALF2) else 26
    recent = jax.__version_info__ >= (0, 10)
    assert used < most + (0.2 if recent else 2.2)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="XLA made four copies of the state more"
)
@pytest.mark.parametrize(
    "controller, states", cases((), slow=((PID, 10), (dfx.ConstantStepSize(), 7)))
)
def test_compensated(controller, states):
    """Compensation takes so many more states."""
    size = 1_000_000
    plain, compensated = (
        temporary_bytes(solver, controller, size, 100) / (8 * size)
        for solver in (SOLVERS[1], COMPENSATED)
    )
    assert 0 < compensated - plain < states + 0.2


@pytest.mark.slow
def test_checkpoints():
    """Each checkpoint takes two states, and half of one for the scales of the entries."""
    size = 100_000

    def states(checkpoints):
        adjoint = dr.ReversibleAdjoint(checkpoints)
        return temporary_bytes(SOLVERS[1], PID, size, 100, adjoint) / (8 * size)

    assert states(30) - states(10) < 2.6 * 20


@pytest.mark.more
@pytest.mark.parametrize("size, batch", cases(((64, 128),), slow=((4096, 1),)))
@pytest.mark.parametrize("max_steps", cases((256,), slow=(4096, 1_000_000)))
def test_no_more_than_the_default_adjoint(size, batch, max_steps):
    """Both adjoints have their default number of checkpoints."""

    def used(solver, adjoint):
        def total(y0, scale):
            def one(y0):
                times = 0.0, 1.0, jnp.asarray(0.1, y0.dtype)
                kwargs = dict(stepsize_controller=PID, adjoint=adjoint, max_steps=max_steps)
                terms = dfx.ODETerm(field)
                return dfx.diffeqsolve(terms, solver, *times, y0, scale, **kwargs).ys

            return jnp.sum(jax.vmap(one)(y0))

        y0 = jax.ShapeDtypeStruct((batch, size), jnp.float64)
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
        scale = jax.ShapeDtypeStruct((), jnp.float64)
        compiled = gradient.lower(y0, scale).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = used(dr.ALF4(), dr.ReversibleAdjoint())
    assert ours <= used(dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint())


@pytest.mark.slow
def test_saved_outputs():
    """Memory is proportional to the number of outputs, not to the steps between."""
    size = 100_000

    def states(count):
        saveat = dfx.SaveAt(ts=jnp.linspace(0, 1, count))
        return temporary_bytes(SOLVERS[1], PID, size, 100, saveat=saveat) / (8 * size)

    # The outputs themselves and their cotangents.
    assert states(40) - states(10) < 2.1 * 30


@pytest.mark.slow
@pytest.mark.parametrize("t1", cases((True,), slow=(False,)))
def test_saved_outputs_of_a_batch(t1):
    """In a batch of gradients, each output takes no more memory than with the default
    adjoint, and no more than itself and its cotangent."""
    size, batch = 16, 8

    def each(solver, adjoint):
        def of(count):
            saveat = dfx.SaveAt(ts=jnp.linspace(0, 1, count), t1=t1)

            def loss(y0):
                terms, times = dfx.ODETerm(lambda t, y, args: jnp.sin(y)), (0.0, 1.0, 0.1)
                kwargs = dict(saveat=saveat, adjoint=adjoint, stepsize_controller=PID)
                return jnp.sum(dfx.diffeqsolve(terms, solver, *times, y0, **kwargs).ys ** 2)

            y0 = jax.ShapeDtypeStruct((batch, size), jnp.float64)
            compiled = jax.jit(jax.vmap(jax.grad(loss))).lower(y0).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        return (of(3_000) - of(1_000)) / 2_000

    ours = each(dr.ALF4(), dr.ReversibleAdjoint())
    assert ours <= 1.01 * each(dfx.Tsit5(), dfx.RecursiveCheckpointAdjoint())
    assert ours < 2.1 * 8 * size * batch


@pytest.mark.slow
def test_default_adjoint_needs_more():
    """The measurement would show a stored trajectory."""
    ours, default = (
        temporary_bytes(SOLVERS[1], PID, 100_000, 100, adjoint)
        for adjoint in (dr.ReversibleAdjoint(0), dfx.RecursiveCheckpointAdjoint())
    )
    assert default > 2 * ours


@pytest.mark.parametrize(
    "solver, states",
    cases(((dr.ALF4(), 5), (dr.ALF6(), 8)), slow=((dr.ALF2(), 4), (dr.ALF8(), 7))),
)
def test_dense_output(solver, states):
    """Dense output takes as many states per step as documented."""

    def solve(y0):
        saveat = dfx.SaveAt(dense=True)
        terms = dfx.ODETerm(field)
        args = (terms, solver, 0.0, 1.0, 0.1, y0, 1.0)
        return dfx.diffeqsolve(*args, saveat=saveat, max_steps=7).interpolation.infos

    infos = jax.eval_shape(solve, jax.ShapeDtypeStruct((10,), jnp.float64))
    assert sum(info.size for info in jax.tree.leaves(infos)) == states * 7 * 10


@pytest.mark.more
def test_dense_output_along_many_times():
    """The times that the controller steps to are not compared with every row at once."""

    def bytes_of(count):
        @jax.jit
        def gradient(ts):
            def loss(ts):
                sol = dfx.diffeqsolve(
                    dfx.ODETerm(field),
                    dr.ALF4(),
                    *(ts[0], ts[-1], None, jnp.ones(2), 1.0),
                    saveat=dfx.SaveAt(dense=True),
                    stepsize_controller=dfx.StepTo(ts),
                    adjoint=dr.ReversibleAdjoint(),
                )
                return jnp.sum(sol.evaluate(0.5))

            return jax.grad(loss)(ts)

        ts = jax.ShapeDtypeStruct((count,), jnp.float64)
        return gradient.lower(ts).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(1000) < 1.2 * bytes_of(10)


@pytest.mark.parametrize(
    "splits, solver",
    cases((), long=((True, dr.BlanesMoan6()),), slow=((False, dr.ALF4()),)),
)
def test_room_for_restarts(splits, solver):
    """By default there is room for eight restarts of two states each; with a symplectic
    solver, for none."""
    none, default = with_and_without(solver, 10_000, splits=splits)
    if splits:
        assert default == none
    else:
        # JAX 0.4 puts two of these states in memory that is no longer needed.
        assert default - none >= (2 * 8 - 2) * 80_000


def with_and_without(solver, size, **kwargs):
    """The temporary bytes without checkpoints, and by default."""
    adjoints = dr.ReversibleAdjoint(checkpoints=0), dr.ReversibleAdjoint()
    args = solver, dfx.ConstantStepSize(), size, 100
    return [temporary_bytes(*args, adjoint=adjoint, **kwargs) for adjoint in adjoints]


@pytest.mark.more
def test_room_in_single_precision():
    """With a symplectic solver, as many of eight states are held as fit into a megabyte:
    two arrays of the state and one of the solver state."""
    kwargs = dict(splits=True, dtype=jnp.float32)
    for size, count in ((5_000, 8), (30_000, 2), (100_000, 0)):
        none, default = with_and_without(dr.StormerVerlet(), size, **kwargs)
        state, more = 3 * 4 * size, default - none
        assert count * state <= more, size
        # Besides them, copies of a few states are held in order to undo steps again.
        assert count == 8 or more < 8 * state, size
        assert count > 0 or more == 0, size


@pytest.mark.parametrize(
    "size, max_steps, count", ((3, 4096, 31), (3, 256, 8), (200, 4096, 8)), ids=str
)
def test_default_number_of_checkpoints(size, max_steps, count):
    """More of small states, as many as take half the memory of the default adjoint's
    checkpoints: 90 of them for 4,096 steps, and 22 for 256, each of two states and eight
    numbers. A known state of `ALF4` has about four states and eight numbers."""

    def program(checkpoints):
        def loss(y0):
            adjoint = dr.ReversibleAdjoint(checkpoints)
            args = dfx.ODETerm(lambda t, y, args: -y), dr.ALF4(), 0.0, 1.0, 0.1, y0
            return jnp.sum(dfx.diffeqsolve(*args, adjoint=adjoint, max_steps=max_steps).ys)

        return jax.jit(jax.grad(loss)).lower(jnp.ones(size)).as_text()

    assert program(None) == program(count) != program(count + 1)


def _deep(t, y, weights, activation=jnp.tanh):
    del t
    for weight in weights:
        y = activation(y @ weight)
    return y


def _loss(solver, checkpoints, field=_deep, saveat=None):
    """A loss of the outputs of a deep field, at the end by default, given `y0` and the
    weights."""
    splits = isinstance(solver, dr.BlanesMoan6)
    fields = ((lambda t, p, args: p), field) if splits else field

    def loss(y0, weights):
        sol = dfx.diffeqsolve(
            as_terms(fields),
            *(solver, 0.0, 1.0, 0.1),
            (y0, y0) if splits else y0,
            weights,
            saveat=saveat or dfx.SaveAt(t1=True),
            adjoint=dr.ReversibleAdjoint(checkpoints),
        )
        return sum(map(jnp.sum, jax.tree.leaves(sol.ys)))

    return loss


@pytest.mark.long
@pytest.mark.parametrize(
    "solver, activation",
    cases(
        # Steps from a kink are made again from their start.
        ((dr.BlanesMoan6(), jax.nn.relu),),
        more=((dr.ALF4(), jax.nn.relu), (dr.BlanesMoan6(), jnp.tanh)),
        slow=((dr.ALF4(), jnp.tanh), (dr.ALF6(), jnp.tanh), (dr.ALF8(), jax.nn.relu)),
    ),
)
def test_one_evaluation(solver, activation):
    """Memory holds the activations of one evaluation of a deep field, for any number of
    stages."""
    batch, width, layers = 512, 64, 20
    field = ft.partial(_deep, activation=activation)

    def one(y0, weights):
        return jnp.sum(field(0.0, y0, weights))

    y0 = jax.ShapeDtypeStruct((batch, width), jnp.float64)
    weights = [jax.ShapeDtypeStruct((width, width), jnp.float64)] * layers
    ours, floor = (
        jax.jit(jax.grad(fn, argnums=(0, 1)))
        .lower(y0, weights)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for fn in (_loss(solver, 0, field), one)
    )
    states = (ours - floor) / (8 * batch * width)
    # The activations of another evaluation would take `layers` more states.
    assert states < layers


@pytest.mark.parametrize(
    "solver, argnums",
    cases(
        (),
        long=((dr.BlanesMoan6(), (0, 1)),),
        # Growth is detected, and may not matter if the start is not differentiated.
        more=((dr.ALF6(), (0, 1)), (dr.ALF4(), 1)),
        slow=((dr.ALF4(), (0, 1)),),
    ),
)
def test_many_parameters(solver, argnums):
    """Their cotangent is summed in the array that is returned, and in a second one between
    known states. The evaluation at the start takes no copy."""
    size = 512
    y0 = jax.ShapeDtypeStruct((size,), jnp.float64)
    weights = [jax.ShapeDtypeStruct((size, size), jnp.float64)] * 2
    gradient = jax.jit(jax.grad(_loss(solver, checkpoints=8), argnums=argnums))
    memory = gradient.lower(y0, weights).compile().memory_analysis()
    # The second sum has two arrays, one of which also serves the current evaluation.
    assert memory.temp_size_in_bytes < 2.5 * 8 * size**2


@pytest.mark.long
def test_functions_of_outputs():
    """They hold no activations of the field beyond those that the outputs themselves do."""
    batch, width, layers = 512, 64, 20
    y0 = jax.ShapeDtypeStruct((batch, width), jnp.float64)
    weights = [jax.ShapeDtypeStruct((width, width), jnp.float64)] * layers

    def bytes_of(**fn):
        loss = _loss(dr.ALF4(), 0, saveat=dfx.SaveAt(ts=[0.25, 0.55], **fn))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(y0, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    more = bytes_of(fn=lambda t, y, args: jnp.sin(y)) - bytes_of()
    # Those of one more evaluation would take `layers` states.
    assert more < layers * 8 * batch * width
