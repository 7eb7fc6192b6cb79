"""The contract of a reversible solver."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax import AbstractSolver, RESULTS
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    Bind,
    BoolScalarLike,
    DenseInfo,
    Params,
    RealScalarLike,
    SolverState,
    Terms,
    VF,
    Y,
)
from .._precision import eps, tiny
from .._tree import larger, tree_add, tree_zeros_like


_SolverState = TypeVar("_SolverState")


class Probe(eqx.Module):
    """What a pull-back through the vector field tells about the flow, near the start of a
    step. All but `control` has the structure of the state.

    - `vf_bar`: a cotangent of the vector field.
    - `pulled`: what it is pulled back to.
    - `control`: the length of the step.
    - `y_bar`: the cotangent of the state there, of a solve that begins there.
    - `outputs`: the cotangents of what was interpolated in the step, summed in magnitude.
    """

    vf_bar: VF
    pulled: Y
    control: RealScalarLike
    y_bar: Y
    outputs: Y


class Cotangent(eqx.Module):
    """The cotangent of everything that a step is a function of.

    - `y`, `solver_state`: as the state and the solver state, with `None` for leaves that
        are not floating-point arrays.
    - `params`: as the differentiated leaves of `(terms, args)`; the sum over all the
        steps walked back so far.
    - `probe`: of the step that was pulled back, if the solver has one without evaluations
        of its own.
    """

    y: Y
    solver_state: SolverState
    params: Params
    probe: Probe | None = None


class Start(eqx.Module):
    """The very state and solver state that a step began with, if that `is_known`, as it is
    where the solve began. If not, then others of the same shapes.

    Reconstructed states are off by rounding, which is as good as any other side of a kink
    of the vector field, or of a quotient that is guarded where it is zero over zero; but
    solves often begin at one.
    """

    is_known: BoolScalarLike
    y: Y
    solver_state: SolverState

    def choose(
        self,
        known: PyTree[Array],
        reconstructed: PyTree[Array],
        where: BoolScalarLike = True,
    ) -> PyTree[Array]:
        """What was made of the known start, if it is one, and else, or not `where`, what
        was reconstructed."""
        pred = jnp.logical_and(self.is_known, where)
        return jtu.tree_map(lambda k, r: jnp.where(pred, k, r), known, reconstructed)


class AbstractReversibleSolver(AbstractSolver[_SolverState], Generic[_SolverState]):
    """A solver whose steps can be undone, for use with
    [`diffrax_reversible.ReversibleAdjoint`][].

    Of what [`diffrax.AbstractSolver`][] asks for, a subclass implements `step` as
    `advance`, and beyond it `inverse_step`; nothing else is needed for exact gradients.
    One that now and then replaces its solver state by something that the old one does not
    follow from says so through `needs_restart` and `restart`; one whose solver state
    depends on the vector field implements `cross_jump`; one that needs more than its state
    to undo a step implements `to_record` and `recall`; one of which the interpolation takes
    evaluations that a step does not implements `extra_dense_info`. A subclass that can
    undo and differentiate a step with the same vector-field evaluations overrides
    `inverse_step_and_pullback`, of which the default reconstructs the start of the step
    with `inverse_step` and then differentiates `advance`.

    Interpolations have to be linear in the `dense_info` that they take, as polynomial ones
    are. A gradient also goes through `init`, which is called again at the end of the walk
    back.
    """

    # How many states `ReversibleAdjoint` holds by default, for the walk back to go on from.
    default_checkpoints: ClassVar[int] = 8

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        """Restart or cross a jump where it is due, and `advance`."""
        solver_state, _, _ = interrupt(
            self,
            terms,
            t0,
            y0,
            args,
            solver_state,
            self.needs_restart(solver_state),
            made_jump,
        )
        return advance_densely(self, terms, t0, t1, y0, args, solver_state)

    @abc.abstractmethod
    def advance(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        """A step, but for restarts.

        Arguments and returns are those of [`diffrax.AbstractSolver.step`][], but for what
        `extra_dense_info` adds to the `dense_info`.
        """

    def extra_dense_info(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
        dense_info: DenseInfo,
    ) -> DenseInfo:
        """What interpolation takes beyond the `dense_info` that `advance` returned: more of
        its entries.

        `ReversibleAdjoint` asks for them only in those steps in which there is something to
        interpolate, which with `SaveAt(dense=True)` or the root finder of an event may be
        any; by default there are none.
        """
        del terms, t0, t1, args, dense_info
        return {}

    @abc.abstractmethod
    def inverse_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[Y, _SolverState]:
        """Undo `advance`.

        **Arguments:**

        - `terms`, `args`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the very floats that the forward step was made from and to.
        - `y1`, `solver_state`: what `advance` returned, that is at `t1`.

        **Returns:**

        The state and the solver state at `t0`, equal to what `advance` was given up to
        rounding.
        """

    def needs_restart(self, solver_state: _SolverState) -> BoolScalarLike:
        """Whether the solver state has to be replaced before the next step.

        That cannot be undone. `ReversibleAdjoint` holds the state and the solver state
        before a restart, or replays the solve up to there.
        """
        del solver_state
        return False

    def restart(
        self,
        terms: Terms,
        t: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> _SolverState:
        """The solver state to go on with after a restart."""
        del terms, t, y, args
        return solver_state

    def cross_jump(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y: Y,
        args: Args,
        solver_state: _SolverState,
    ) -> tuple[_SolverState, BoolScalarLike]:
        """The solver state at `t1`, from that at `t0`, between which there is nothing but a
        discontinuity of the vector field.

        They are a few floats apart, and `y` is the same. With `t0` and `t1` exchanged this
        has to undo itself.

        **Returns:**

        The solver state, and whether it had to change.
        """
        del terms, t0, t1, y, args
        return solver_state, False

    def to_record(self, solver_state: _SolverState) -> PyTree[Array]:
        """Scalars of the solver state that a step forgets, and that undoing it takes.

        They are recorded before every step, where a gradient is asked for, and make its
        memory grow by as much; by default there are none.
        """
        del solver_state

    def recall(self, solver_state: _SolverState, recorded: PyTree[Array]) -> _SolverState:
        """The solver state after a step, with what `to_record` gave before it put into it,
        in the form that `inverse_step` takes."""
        del recorded
        return solver_state

    def error_scales(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        length: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        y_end: Y,
        solver_state_end: _SolverState,
    ) -> PyTree[Array]:
        """What errors of the walk back are measured by, where it comes to a known state.

        **Arguments:**

        - `terms`, `args`: as [`diffrax.AbstractSolver.step`][].
        - `t0`, `t1`: the step that begins there.
        - `length`: of the solve, in time.
        - `y0`, `solver_state`: what is known.
        - `y_end`, `solver_state_end`: what was known where the walk back began. Of the
            solver state there need not be more than its floating-point arrays.

        **Returns:**

        For every floating-point array of `(y0, solver_state)`, in that order, an array of
        its shape: by default the largest of what each entry is there, after one step, which
        is made again, and where the walk back began.
        """
        del length
        y1, _, _, state1, _ = self.advance(terms, t0, t1, y0, args, solver_state)
        known = (y0, solver_state), (y1, state1), (y_end, solver_state_end)
        known = (eqx.filter(k, eqx.is_inexact_array) for k in known)
        return jtu.tree_map(larger, *known)

    def probe(
        self,
        bind: Bind,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
    ) -> Probe | None:
        """How cotangents are pulled back where a step begins.

        Tells gradients that grow where the solution contracts, which are refused. By
        default there is none, and nothing is refused for that.

        **Arguments:**

        - `bind`, `params`: `terms, args = bind(params)`.
        - `t0`, `t1`, `y0`: the step, and the state that it begins with.
        - `cotangent`: at `t0`.
        - `dense_cotangent`: that of what was interpolated in the step.
        """
        del bind, params, t0, t1, y0, cotangent, dense_cotangent

    def inverse_step_and_pullback(
        self,
        bind: Bind,
        params: Params,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        solver_state: _SolverState,
        cotangent: Cotangent,
        dense_cotangent: DenseInfo | None,
        start: Start | None = None,
    ) -> tuple[Y, _SolverState, Cotangent]:
        """Undo `advance` and pull a cotangent back through it.

        **Arguments:**

        - `bind`, `params`: `terms, args = bind(params)`. The gradient is with respect to
            `params`.
        - `t0`, `t1`, `y1`, `solver_state`: as for `inverse_step`.
        - `cotangent`: at `t1`, with the sum of `params` so far.
        - `dense_cotangent`: the cotangent of the `dense_info`, with what is extra of it, or
            `None` where nothing was interpolated.
        - `start`: the start of the step, which may be known. It serves to evaluate the
            vector field there, and not to reconstruct it, as that is a check of the walk.

        **Returns:**

        The state, the solver state, and the cotangent, all at `t0`.
        """
        y0, solver_state0, _, pull = linearise_step(
            self, bind, params, t0, t1, y1, solver_state, start
        )
        return y0, solver_state0, pull(cotangent, dense_cotangent)


def check_flags(solver: Any, *names: str) -> None:
    """Raise an error unless these are known when a solve is compiled."""
    for name in names:
        value = getattr(solver, name)
        if not isinstance(value, bool):
            raise ValueError(
                f"`{type(solver).__name__}({name}={value})` must be `True` or `False`, "
                "known when the solve is compiled."
            )


def advance_densely(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    solver_state: SolverState,
    reads: BoolScalarLike = True,
) -> tuple[Y, Y | None, DenseInfo, SolverState, RESULTS]:
    """`advance`, with what is extra of its `dense_info`: zeros unless it is read."""
    y1, y_error, dense_info, solver_state, result = solver.advance(
        terms, t0, t1, y0, args, solver_state
    )

    def evaluate():
        return solver.extra_dense_info(terms, t0, t1, args, dense_info)

    def zeros():
        shapes = jax.eval_shape(evaluate)
        return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if isinstance(reads, bool):
        extra = evaluate() if reads else zeros()
    else:
        extra = lax.cond(eqxi.unvmap_any(reads), evaluate, zeros)
    return y1, y_error, {**dense_info, **extra}, solver_state, result


def interrupt(
    solver: AbstractReversibleSolver,
    terms: Terms,
    t: RealScalarLike,
    y: Y,
    args: Args,
    solver_state: SolverState,
    restarts: BoolScalarLike,
    made_jump: BoolScalarLike,
) -> tuple[SolverState, BoolScalarLike, BoolScalarLike]:
    """What comes between two steps.

    **Returns:**

    The solver state to go on with, whether there was a restart, and whether the solver
    state crossed a jump, which a restart takes the place of. Python `False` where that is
    known.
    """

    def choose(pred, new):
        return jtu.tree_map(lambda n, o: jnp.where(pred, n, o), new, solver_state)

    def restart():
        return choose(restarts, solver.restart(terms, t, y, args, solver_state))

    def cross():
        new, changed = solver.cross_jump(terms, before_jump(t), t, y, args, solver_state)
        changed = jnp.logical_and(crosses, changed)
        return choose(changed, new), changed

    # In a batch they are evaluated only in steps in which some element needs it. Logical
    # operations also strip tangents, which JAX gives to Booleans too.
    crosses = made_jump
    if made_jump is not False:
        crosses = jnp.logical_and(made_jump, jnp.logical_not(restarts))
        solver_state, crosses = lax.cond(
            eqxi.unvmap_any(crosses), cross, lambda: (solver_state, crosses)
        )
    if restarts is not False:
        restarts = jnp.logical_or(restarts, False)
        solver_state = lax.cond(eqxi.unvmap_any(restarts), restart, lambda: solver_state)
    return solver_state, restarts, crosses


def before_jump(t: RealScalarLike) -> RealScalarLike:
    """A time on the other side of the jump that a step begins after, at `t`.

    Diffrax' steps end and begin one float to either side of a jump, which are two floats,
    and may be four units of `eps |t|` apart just above a power of two. At zero, which
    floats are closest to, as many of the smallest normal ones are meant: XLA flushes others
    to zero.
    """
    t = jnp.asarray(t)
    ulps = jnp.maximum(eps(t) * jnp.abs(t), tiny(t))
    return t - lax.stop_gradient(4 * ulps)


def linearise_step(
    solver: AbstractReversibleSolver,
    bind: Bind,
    params: Params,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y1: Y,
    solver_state: SolverState,
    start: Start | None = None,
    step_times: Callable[[Params], tuple[RealScalarLike, RealScalarLike]] | None = None,
) -> tuple[Y, SolverState, DenseInfo, Callable[[Cotangent, DenseInfo | None], Cotangent]]:
    """Undo a step, make it again, and return what it interpolated with and its pull-back.

    It is made again from its `start`, if that is known. If `t0` and `t1` depend on
    `params`, then `step_times` says how. Costs an inverse step, a step, and the memory of
    all the stages of a step.
    """
    terms, args = bind(params)
    y0, solver_state0 = solver.inverse_step(terms, t0, t1, y1, args, solver_state)
    origin = y0, solver_state0
    if start is not None:
        origin = start.choose((start.y, start.solver_state), origin)
    diff_state, nondiff_state = eqx.partition(origin[1], eqx.is_inexact_array)

    def step(y: Y, diff_state: PyTree, params: Params):
        terms, args = bind(params)
        state = eqx.combine(diff_state, nondiff_state)
        times = (t0, t1) if step_times is None else step_times(params)
        y, _, dense_info, state, _ = advance_densely(solver, terms, *times, y, args, state)
        return y, eqx.filter(state, eqx.is_inexact_array), dense_info

    outputs, pull_step = eqx.filter_vjp(step, origin[0], diff_state, params)
    _, _, dense_info = outputs

    def pull(cotangent: Cotangent, dense_cotangent: DenseInfo | None) -> Cotangent:
        if dense_cotangent is None:
            dense_cotangent = tree_zeros_like(dense_info)
        y, state, params = pull_step((cotangent.y, cotangent.solver_state, dense_cotangent))
        return Cotangent(y, state, tree_add(cotangent.params, params))

    return y0, solver_state0, dense_info, pull
