"""What one step of every reversible solver has to satisfy, without a loop over steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dr
from diffrax_reversible._precision import as_floats
from diffrax_reversible._solver import chain_again
from diffrax_reversible._solver.capabilities import cross_jump, recall, to_record
from diffrax_reversible._solver.cotangent import Cotangent
from diffrax_reversible._solver.interrupted_solver import (
    advance_densely,
    before_jump,
    CanRestart,
    needs_restart,
)
from diffrax_reversible._solver.pullback import (
    backward_step_and_pullback,
    HasPullbackFromStart,
    pull_through_step,
    StepStart,
)
from diffrax_reversible._tree import tree_zeros_like

from .chains import Ruth, TwoStreams
from .conftest import pytest_make_parametrize_id
from .problems import (
    as_terms,
    as_vector,
    BITWISE,
    cases,
    COMPENSATED,
    harmonic,
    InverseOnly,
    Network,
    network_args,
    NYSTROM,
    PAIR,
    PAIR_Y0,
    relative_error,
    SOLVERS as ALF,
    SPLITTINGS,
    Y0,
)


T0, T1 = jnp.array(0.2), jnp.array(0.5)


class Spec(NamedTuple):
    """A solver and its problem.

    - `free`: the part of the solver state that need not follow from the state.
    """

    solver: dr.AbstractReversibleSolver
    field: Any
    y0: Any
    free: Callable[[Any], Any] = lambda solver_state: []


def spec(solver):
    solver = dr.as_reversible(solver)
    if isinstance(solver, dr.AbstractALF):
        return Spec(solver, Network(), Y0, lambda s: s.v)
    if isinstance(solver, dr.McCallumFoster):
        return Spec(solver, Network(), Y0, lambda s: s.copy)
    if isinstance(solver, InverseOnly):
        return Spec(solver, Network(), Y0, lambda s: s[0])
    if isinstance(getattr(solver, "solver", None), dfx.LeapfrogMidpoint):
        return Spec(solver, Network(), Y0, lambda s: s[1])
    if getattr(solver, "nystrom", False):
        return Spec(solver, (harmonic, PAIR[1]), PAIR_Y0)
    if isinstance(solver.term_structure, tuple):
        return Spec(solver, PAIR, PAIR_Y0)
    return Spec(solver, Network(), Y0)


SOLVERS = (
    *(*ALF, COMPENSATED, BITWISE),
    *(*SPLITTINGS, *NYSTROM),
    *(dr.BlanesMoan4(compensated=True), dr.BlanesMoan4(bitwise=True)),
    *(dr.McCallumFoster(dfx.Heun()), dr.McCallumFoster(dfx.Tsit5(), coupling=0.9)),
    *(dfx.ReversibleHeun(), dfx.LeapfrogMidpoint(), dfx.SemiImplicitEuler()),
    *(dr.ImplicitMidpoint(), dr.Gauss4(), dr.Gauss6()),
    # User-defined.
    *(InverseOnly(), TwoStreams(), Ruth()),
)


SPECS = {pytest_make_parametrize_id(solver): spec(solver) for solver in SOLVERS}
every_solver = pytest.mark.parametrize("name", SPECS)
# One solver of each implementation, chosen for fast compilation.
ONE_OF_EACH = (
    *("ALF4()", "ALF4(compensated=True)", "ALF4(bitwise=True)"),
    *("StormerVerlet()", "BlanesMoan4()", "McCallumFoster(Heun())"),
    *("ReversibleHeun()", "LeapfrogMidpoint()", "SemiImplicitEuler()"),
    *("ImplicitMidpoint()", "InverseOnly()", "TwoStreams()"),
)
assert set(ONE_OF_EACH) <= set(SPECS)
one_of_each = pytest.mark.parametrize(
    "name", cases(ONE_OF_EACH, more=[name for name in SPECS if name not in ONE_OF_EACH])
)


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(eqx.filter(tree, eqx.is_inexact_array))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )


def off(tree, reference):
    """The largest difference, ignoring integers."""
    leaves = [
        jax.tree.leaves(eqx.filter(t, eqx.is_inexact_array)) for t in (tree, reference)
    ]
    differences = [jnp.max(jnp.abs(x - y)) for x, y in zip(*leaves, strict=True)]
    return max(map(float, differences), default=0.0)


class Step(NamedTuple):
    """A step and its end. The free part of its initial solver state is perturbed."""

    terms: Any
    args: Any
    state: Any
    y1: Any
    dense_info: Any
    state1: Any


@functools.cache
def make_step(name):
    spec = SPECS[name]
    solver, terms, args = spec.solver, as_terms(spec.field), network_args()
    state = solver.init(terms, T0, T1, spec.y0, args)
    free = spec.free(state)
    deviating = jax.tree.map(lambda x, d: x + 0.1 * d, free, random_like(free, 9))
    state = eqx.tree_at(spec.free, state, deviating)
    y1, _, dense_info, state1, result = eqx.filter_jit(advance_densely)(
        solver, terms, T0, T1, spec.y0, args, state
    )
    assert result == dfx.RESULTS.successful
    state1 = recall(solver, state1, to_record(solver, state))
    return Step(terms, args, state, y1, dense_info, state1)


@every_solver
def test_a_step_is_undone(name):
    (solver, _, y0, _), step = SPECS[name], make_step(name)
    assert off(step.y1, y0) > 1e-2
    undone = eqx.filter_jit(solver.backward_step)(
        step.terms, T0, T1, step.y1, step.args, step.state1
    )
    assert off(undone, (y0, step.state)) < 1e-14


@one_of_each
def test_integer_times(name):
    """They are as good as floats where a solver is called step by step, as in Diffrax's
    documentation."""
    solver, field, y0, _ = SPECS[name]
    terms, args = as_terms(field), network_args()

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def there_and_back(t0, t1):
        state = solver.init(terms, t0, t1, y0, args)
        step = terms, t0, t1, y0, args, state
        y1, error, dense_info, state1, _ = solver.step(*step, made_jump=False)
        state1 = recall(solver, state1, to_record(solver, state))
        start, _ = solver.backward_step(terms, t0, t1, y1, args, state1)
        return y1, error, dense_info, start

    assert off(there_and_back(0, 0.25), there_and_back(0.0, 0.25)) < 1e-14
    assert off(there_and_back(0, 1), there_and_back(0.0, 1.0)) < 1e-13


def test_times_of_several_dtypes():
    """Integers take the dtype of the floats beside them."""
    integer, single = jnp.array(0, jnp.int32), jnp.array(0.5, jnp.float32)
    assert [t.dtype for t in as_floats(integer, single)] == 2 * [jnp.float32]
    assert [t.dtype for t in as_floats(0, np.int64(1))] == 2 * [jnp.float64]


@one_of_each
def test_pullback(name):
    """The pull-back equals JAX's, which differences confirm, for cotangents of the end of
    the step, of its `dense_info`, and of all later steps."""
    (solver, _, y0, _), step = SPECS[name], make_step(name)
    real = lambda tree: eqx.filter(tree, eqx.is_inexact_array)
    params, static = eqx.partition((step.terms, step.args), eqx.is_inexact_array)

    def combine(params):
        return eqx.combine(params, static)

    cotangent = Cotangent(
        random_like(y0, 0), random_like(step.state, 1), random_like(params, 2)
    )
    dense_cotangent = random_like(step.dense_info, 3)

    def pull(dense_cotangent):
        return backward_step_and_pullback(
            *(solver, combine, params, T0, T1, step.y1, step.state1),
            *(cotangent, dense_cotangent),
        )

    def advance(y, state, params):
        terms, args = combine(params)
        state = eqx.combine(state, step.state)
        y, _, info, state, _ = advance_densely(solver, terms, T0, T1, y, args, state)
        return y, real(state), info

    @eqx.filter_jit
    def both():
        fused = pull(dense_cotangent), pull(None)
        _, jax_pull = eqx.filter_vjp(advance, y0, real(step.state), params)
        jax_pulls = [
            jax_pull((cotangent.y, cotangent.solver_state, dense))
            for dense in (dense_cotangent, tree_zeros_like(dense_cotangent))
        ]
        return fused, jax_pulls

    fused, (jax_pull, without_dense) = both()
    for (y, state, pulled, _), want in zip(fused, (jax_pull, without_dense), strict=True):
        assert off((y, state), (y0, step.state)) < 1e-14
        want_params = jax.tree.map(jnp.add, want[2], cotangent.params)
        want = (want[0], want[1], want_params)
        got = pulled.y, pulled.solver_state, pulled.params
        assert relative_error(got, want) < 1e-13
    start = y0, real(step.state), params
    direction = random_like(start, 4)

    @jax.jit
    def projected(h):
        y, state, info = advance(*jax.tree.map(lambda x, d: x + h * d, start, direction))
        pairs = ((y, state), (cotangent.y, cotangent.solver_state)), (info, dense_cotangent)
        return sum(
            jnp.vdot(x, bar)
            for pair in pairs
            for x, bar in zip(*map(jax.tree.leaves, pair), strict=True)
        )

    difference = (projected(1e-6) - projected(-1e-6)) / 2e-6
    derivative = as_vector(jax_pull) @ as_vector(direction)
    assert abs(derivative - difference) < 1e-7 * max(abs(difference), 1.0)


@pytest.mark.parametrize("most_bytes", (0, 1 << 18), ids=("computed", "stored"))
@one_of_each
def test_pullback_from_start(name, most_bytes, monkeypatch):
    """From a known start, the pull-back equals JAX's there, whatever the end; and the
    error of the end is returned."""
    monkeypatch.setattr(chain_again, "_most_bytes", most_bytes)
    (solver, _, y0, _), step = SPECS[name], make_step(name)
    if not isinstance(solver, HasPullbackFromStart):
        pytest.skip("differentiates a step that is made again")
    real = lambda tree: eqx.filter(tree, eqx.is_inexact_array)
    params, static = eqx.partition((step.terms, step.args), eqx.is_inexact_array)
    combine = lambda params: eqx.combine(params, static)
    cotangent = Cotangent(
        random_like(y0, 0), random_like(step.state, 1), random_like(params, 2)
    )
    error = jax.tree.map(lambda x: 0.1 * x, random_like(y0, 5))

    def advance(y, state, params):
        terms, args = combine(params)
        state = eqx.combine(state, step.state)
        y, _, _, state, _ = advance_densely(solver, terms, T0, T1, y, args, state)
        return y, real(state)

    @eqx.filter_jit
    def both(needs):
        end = jax.tree.map(jnp.add, step.y1, error), step.state1
        start = StepStart(needs, lambda: (y0, step.state), end)
        here = solver, combine, params, T0, T1, *end, cotangent, None, start
        _, pull = eqx.filter_vjp(advance, y0, real(step.state), params)
        return backward_step_and_pullback(*here), pull(
            (cotangent.y, cotangent.solver_state)
        )

    (y, state, pulled, errors), want = both(jnp.array(True))
    assert off((y, state), (y0, step.state)) < 1e-14
    want = *want[:2], jax.tree.map(jnp.add, want[2], cotangent.params)
    got = pulled.y, pulled.solver_state, pulled.params
    assert relative_error(got, want) < 1e-13
    assert relative_error(errors[0], error) < 1e-12
    (*undone, _, errors), _ = both(jnp.array(False))
    assert off(undone, [y0, step.state]) > 1e-3 and not np.any(as_vector(errors))


@one_of_each
def test_pullback_of_times(name):
    """The pull-back to the ends of the step equals differences."""
    (solver, _, y0, _), step = SPECS[name], make_step(name)
    cotangent = random_like(y0, 0), random_like(step.state, 1)
    dense_cotangent = random_like(step.dense_info, 3)
    zeros = Cotangent(*cotangent, jnp.zeros(2))

    def combine(times):
        del times
        return step.terms, step.args

    @jax.jit
    def pull(times):
        pulled, _ = pull_through_step(
            *(solver, combine, times, T0, T1, (y0, step.state), zeros, dense_cotangent),
            step_times=lambda times: (times[0], times[1]),
        )
        return pulled.params

    @jax.jit
    def projected(times):
        y, _, info, state, _ = advance_densely(
            solver, step.terms, *times, y0, step.args, step.state
        )
        outputs = jax.tree.leaves(eqx.filter((y, state, info), eqx.is_inexact_array))
        bars = jax.tree.leaves((*cotangent, dense_cotangent))
        return sum(jnp.vdot(x, bar) for x, bar in zip(outputs, bars, strict=True))

    times = jnp.stack([T0, T1])
    got, h = pull(times), 1e-6
    for derivative, e in zip(got, np.eye(2), strict=True):
        difference = (projected(times + h * e) - projected(times - h * e)) / (2 * h)
        assert abs(derivative - difference) < 1e-7 * max(abs(difference), 1.0)


@every_solver
def test_a_step_of_no_length(name):
    """A step of zero length changes nothing."""
    solver, field, y0, _ = SPECS[name]
    terms, args = as_terms(field), network_args()
    state = solver.init(terms, T0, T0, y0, args)
    y1, _, _, state1, _ = eqx.filter_jit(advance_densely)(
        solver, terms, T0, T0, y0, args, state
    )
    assert off((y1, state1), (y0, state)) < 1e-14


@every_solver
def test_a_jump_undoes_itself(name):
    solver, field, _, _ = SPECS[name]
    step = make_step(name)
    if isinstance(solver, InverseOnly) or "ReversibleHeun" in name:
        with pytest.raises(NotImplementedError, match="at a jump of the vector field"):
            cross_jump(solver, step.terms, T0, T1, step.y1, step.args, step.state1)
        return
    fields = field if isinstance(field, tuple) else (field,)

    def jumping(field):
        return lambda t, y, args: jnp.where(t < T1, -1, 1) * field(t, y, args)

    terms = tuple(dfx.ODETerm(jumping(field)) for field in fields)
    terms = terms if isinstance(field, tuple) else terms[0]
    before, after = before_jump(T1), T1

    def cross(t0, t1, state):
        return cross_jump(solver, terms, t0, t1, step.y1, step.args, state)[0]

    crossed = cross(after, before, step.state1)
    assert off(cross(before, after, crossed), step.state1) < 1e-14
    if isinstance(solver, dr.AbstractALF):
        assert off(crossed.v, step.state1.v) > 1e-2


@every_solver
def test_a_restart_clears(name):
    solver, _, _, free = SPECS[name]
    step = make_step(name)
    if needs_restart(solver, step.state1) is False:
        return
    assert isinstance(solver, CanRestart)
    restarted = solver.restart(step.terms, T1, step.y1, step.args, step.state1)
    assert not needs_restart(solver, restarted)
    state = solver.init(step.terms, T1, T1 + 1, step.y1, step.args)
    assert off(free(step.state1), free(state)) > 1e-4
    assert off(free(restarted), free(state)) < 1e-14
