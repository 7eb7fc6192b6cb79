"""An error for forward-mode differentiation that names the remedy, unlike JAX's own.

JAX begins both modes of differentiation alike, so a function cannot tell which one it is
in. Forward mode evaluates the linear map of tangents, and reverse mode transposes it. Here
that map is an operation that can only be transposed.
"""

import equinox as eqx
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from .validate import forward_mode


def reverse_only(x: PyTree, detached: PyTree) -> tuple[PyTree, PyTree]:
    """Return `x`, differentiable in reverse mode only, and `detached`, not differentiable,
    as a custom gradient differentiates it in another way.

    This applies to the innermost transformation that differentiates any of them. To outer
    ones it is the identity, so that forward mode over reverse mode still works.
    """
    diff, nondiff = eqx.partition((x, detached), eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(diff)
    leaves = _identity_p.bind(*leaves, count=len(jtu.tree_leaves(diff[0])))
    return eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)


# The first `count` arrays are differentiable in reverse mode, the rest not at all.
_identity_p = jex.Primitive("reverse_only")
_identity_p.multiple_results = True
_tangent_p = jex.Primitive("reverse_only_tangent")


def _identity(*xs, count):
    del count
    return list(xs)


def _jvp(primals, tangents, *, count):
    def tangent(i, t):
        if type(t) is ad.Zero:
            return t
        return _tangent_p.bind(t) if i < count else ad.Zero(jnp.asarray(t).aval)

    # The primal output drops the operation, for outer transformations.
    return list(primals), [tangent(i, t) for i, t in enumerate(tangents)]


def _batch(xs, axes, *, count):
    return _identity_p.bind(*xs, count=count), axes


def _refuse(*args):
    raise RuntimeError(forward_mode)


_identity_p.def_impl(_identity)
_identity_p.def_abstract_eval(_identity)
batching.primitive_batchers[_identity_p] = _batch
ad.primitive_jvps[_identity_p] = _jvp
mlir.register_lowering(_identity_p, mlir.lower_fun(_identity, multiple_results=True))
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x: x)
ad.deflinear(_tangent_p, lambda ct: [ct])
# Reverse mode transposes it before any other transformation applies. `jax.jacfwd` maps over
# tangents with `jax.vmap`.
ad.primitive_jvps[_tangent_p] = _refuse
batching.primitive_batchers[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)
