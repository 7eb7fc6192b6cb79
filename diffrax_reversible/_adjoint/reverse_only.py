"""A worded error where JAX's own would not name the remedy: forward-mode differentiation.

JAX begins both modes of differentiation alike, so that a function cannot tell which one it
is in. What tells them apart is whether the tangents are computed, or the linear map that
makes them is transposed. Here that map is an operation that can only be transposed.
"""

import equinox as eqx
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from .validate import forward_mode


def reverse_only(x: PyTree, detached: PyTree) -> tuple[PyTree, PyTree]:
    """`x`, which can be differentiated in reverse mode only, and `detached`, which cannot
    be, as a custom gradient differentiates it in another way.

    Of several nested transformations that is the innermost that differentiates any of
    these. As identity in the others, forward mode over reverse mode is not affected.
    """
    diff, nondiff = eqx.partition((x, detached), eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(diff)
    leaves = _identity_p.bind(*leaves, count=len(jtu.tree_leaves(diff[0])))
    return eqx.combine(jtu.tree_unflatten(structure, leaves), nondiff)


# Of `count` arrays that can be differentiated in reverse mode, and others that cannot be.
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

    # No longer in the primal output, for the transformations around this one.
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
batching.defvectorized(_tangent_p)
ad.deflinear(_tangent_p, lambda ct: [ct])
# In reverse mode it has been transposed before anything else can see it.
ad.primitive_jvps[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)
