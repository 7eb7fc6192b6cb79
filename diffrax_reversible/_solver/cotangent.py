"""Cotangents of the inputs of a step."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import BoolScalarLike, Params, RealScalarLike, SolverState, VF, Y


class Probe(eqx.Module):
    """A pull-back through the vector field near the start of a step, from which the adjoint
    estimates growth. All fields except `control` have the structure of the state.

    - `vf_bar`: a cotangent of the vector field.
    - `pulled`: its pull-back to the state.
    - `control`: the length of the step.
    - `y_bar`: the cotangent of the state there, for a solve that begins there.
    - `outputs`: the sum of the magnitudes of the cotangents of the interpolation data of
        the step.
    - `first`, `second`: the cotangents, exactly at the start of the step, of the state, as
        in `y_bar`, which may be estimated, and of the second approximation that the solver
        carries, in the units of `y_bar`.
    """

    vf_bar: VF
    pulled: Y
    control: RealScalarLike
    y_bar: Y
    outputs: Y
    first: Y
    second: Y

    def where(self, pred: BoolScalarLike) -> "Probe":
        """This one where `pred`, and zero otherwise, except the `control`."""
        zero = jtu.tree_map(lambda x: jnp.where(pred, x, 0), self)
        return dataclasses.replace(zero, control=self.control)


class Cotangent(eqx.Module):
    """The cotangent of all inputs of a step.

    - `y`, `solver_state`: cotangents of the state and the solver state, with `None` for
        leaves that are not floating-point arrays.
    - `params`: the cotangent of the differentiated leaves of `(terms, args)`, summed over
        all steps undone so far.
    - `probe`: the probe of the step, if the solver obtains one without extra evaluations.
    """

    y: Y
    solver_state: SolverState
    params: Params
    probe: Probe | None = None

    def where(self, pred: BoolScalarLike) -> "Cotangent":
        """This one where `pred`, and zero otherwise, except that of `params`."""
        states = self.y, self.solver_state
        y, state = jtu.tree_map(lambda x: jnp.where(pred, x, 0), states)
        return dataclasses.replace(self, y=y, solver_state=state)
