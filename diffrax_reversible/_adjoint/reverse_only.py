"""A worded error where JAX's own would not name the remedy: forward-mode differentiation.

JAX begins both modes of differentiation alike, so that a function cannot tell which one it
is in. What tells them apart is whether the tangents are computed, or the linear map that
makes them is transposed. Here that map is an operation that can only be transposed.
"""

import equinox as eqx
import jax.extend.core as jex
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from .validate import forward_mode


def reverse_only(x: PyTree) -> PyTree:
    """`x`, which can be differentiated in reverse mode only.

    Of several nested transformations that is the innermost. As identity in the others,
    forward mode over reverse mode is not affected.
    """
    diff, nondiff = eqx.partition(x, eqx.is_inexact_array)
    return eqx.combine(jtu.tree_map(_identity_p.bind, diff), nondiff)


_identity_p = jex.Primitive("reverse_only")
_tangent_p = jex.Primitive("reverse_only_tangent")


def _jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    # No longer in the primal output, for the transformations around this one.
    return x, t if type(t) is ad.Zero else _tangent_p.bind(t)


def _refuse(*args):
    raise RuntimeError(forward_mode)


_identity_p.def_impl(lambda x: x)
_tangent_p.def_impl(_refuse)
for _p in (_identity_p, _tangent_p):
    _p.def_abstract_eval(lambda x: x)
    batching.defvectorized(_p)
ad.primitive_jvps[_identity_p] = _jvp
ad.deflinear(_tangent_p, lambda ct: [ct])
# In reverse mode it has been transposed before anything else can see it.
ad.primitive_jvps[_tangent_p] = _refuse
mlir.register_lowering(_identity_p, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(_tangent_p, _refuse)
