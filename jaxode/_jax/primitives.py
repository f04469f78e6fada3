"""Identities that tell JAX something: copy this on a CPU, differentiate that in reverse mode only.

`equinox.internal` has the guards that are not here: `nondifferentiable`, its counterpart
`nondifferentiable_backward`, and `unvmap_any`. An import that fails says that one is gone.
"""

from typing import TypeVar

import equinox as eqx
import jax
from equinox.internal import nondifferentiable as nondifferentiable
from equinox.internal import nondifferentiable_backward as nondifferentiable_backward
from equinox.internal import unvmap_any as unvmap_any
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

T = TypeVar("T")


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x, **_: x)
    primitive.def_abstract_eval(lambda x, **_: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda _, x, **__: [x])
    return primitive


_apart = _identity("kept_apart")
ad.deflinear2(_apart, lambda bar, _: [bar])
mlir.register_lowering(
    _apart, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False), platform="cpu"
)


def kept_apart(x: Array) -> Array:
    """The array, as a value of its own that XLA folds into nothing, in a program for a CPU."""
    return _apart.bind(x)


_reverse = _identity("reverse_only")
_tangent = _identity("reverse_only_tangent")


def _refuse(*_, message: str):
    raise TypeError(message)


def _reverse_jvp(primals, tangents, *, message: str):
    # The value leaves the guard, so that forward over reverse is not stopped.
    (x,), (dx,) = primals, tangents
    return x, dx if isinstance(dx, ad.Zero) else _tangent.bind(dx, message=message)


ad.primitive_jvps[_reverse] = _reverse_jvp
# A tangent may be recorded and transposed, but not computed.
_tangent.def_impl(_refuse)
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda bar, _, **__: [bar])


def reverse_only(tree: T, message: str) -> T:
    """The same arrays; a `TypeError` with this message if a tangent of them is computed."""
    guard = lambda x: _reverse.bind(x, message=message) if eqx.is_inexact_array(x) else x
    return jax.tree.map(guard, tree)


def first_derivatives_only(tree: T, message: str) -> T:
    """The same arrays; an error with this message if a derivative by them is differentiated."""

    @jax.custom_jvp
    def guard(x):
        return x

    # The value is guarded only where it has a tangent, and so a derivative.
    guard.defjvp(lambda primals, tangents: (nondifferentiable(*primals, msg=message), *tangents))
    return jax.tree.map(lambda x: guard(x) if eqx.is_inexact_array(x) else x, tree)
