"""Identity functions that instruct JAX: copy on a CPU, or differentiate only in reverse mode.

`equinox.internal` has the other guards: `nondifferentiable`, its counterpart
`nondifferentiable_backward`, and `unvmap_any`. The import fails if one is gone.
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
    primitive.multiple_results = True
    primitive.def_impl(lambda *x, **_: [*x])
    primitive.def_abstract_eval(lambda *x, **_: [*x])
    batching.primitive_batchers[primitive] = lambda x, axes, **params: (
        primitive.bind(*x, **params),
        axes,
    )
    mlir.register_lowering(primitive, lambda _, *x, **__: [*x])
    return primitive


_apart = _identity("kept_apart")
ad.deflinear2(_apart, lambda bars, _: bars)
_barrier = mlir.lower_fun(lambda x: [jax.lax.optimization_barrier(x)], multiple_results=True)
mlir.register_lowering(_apart, _barrier, platform="cpu")


def kept_apart(x: Array) -> Array:
    """The array, as a separate value that XLA does not fold in a program for a CPU."""
    return _apart.bind(x)[0]


_reverse = _identity("reverse_only")
_tangent = _identity("reverse_only_tangent")


def _refuse(*_, message: str, **__):
    raise TypeError(message)


def _reverse_jvp(primals, tangents, *, message: str):
    # The values leave the guard, so forward over reverse still works.
    moved = [tangent for tangent in tangents if not isinstance(tangent, ad.Zero)]
    # Bound with the values: otherwise `vmap` would reach the code after the guard before a tangent
    # that it does not change.
    guarded = iter(_tangent.bind(*moved, *primals, message=message, count=len(moved)))
    return [*primals], [x if isinstance(x, ad.Zero) else next(guarded) for x in tangents]


def _tangent_transpose(bars, *inputs, message: str, count: int):
    del message
    return [*bars, *[None] * (len(inputs) - count)]


ad.primitive_jvps[_reverse] = _reverse_jvp
# A tangent may be recorded and transposed, but not computed.
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda *inputs, count, **_: inputs[:count])
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)
ad.primitive_transposes[_tangent] = _tangent_transpose


def reverse_only(tree: T, message: str) -> T:
    """The same arrays. Computing a tangent of them raises a `TypeError` with this message."""
    guarded, others = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(guarded)
    return eqx.combine(structure.unflatten(_reverse.bind(*leaves, message=message)), others)


def first_derivatives_only(tree: T, message: str) -> T:
    """The same arrays. Differentiating a derivative by them raises an error with this message."""

    @jax.custom_jvp
    def guard(x):
        return x

    # The value is guarded only where it has a tangent, and so a derivative.
    guard.defjvp(lambda primals, tangents: (nondifferentiable(*primals, msg=message), *tangents))
    return jax.tree.map(lambda x: guard(x) if eqx.is_inexact_array(x) else x, tree)
