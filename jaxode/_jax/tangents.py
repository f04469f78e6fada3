"""Identity functions with a tangent of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

from jaxode._jax.sharding import axes_of

T = TypeVar("T")


def instantiate_zeros(dot: Array | None, like: Array) -> Array:
    """The tangent or cotangent. Zero if JAX knows that it is zero."""
    return jnp.zeros_like(like) if dot is None else dot


def along(f: Callable[[Array], Array], t: Float[Array, "*times"]) -> tuple[Array, Array]:
    """`f(t)`, and its derivative if all of `t` moves by one, in the mode that `f` has.

    Raises what JAX raises if `f` has neither a forward mode nor a transposable reverse mode.
    """
    ones = jnp.ones_like(t)
    try:
        value, pull = jax.vjp(f, t)
        return value, jax.linear_transpose(pull, value)((ones,))[0]
    except (TypeError, ValueError, NotImplementedError):
        # Mapped, because JAX would otherwise notice only in the compiler that `f` has none.
        value, push = jax.linearize(f, t)
        return value, jax.vmap(push)(ones[None])[0]


def undifferentiated_unless(needed: Bool[Array, ""], tree: T) -> T:
    """The tree, through which no cotangent passes unless it is needed: zero times NaN is NaN.

    Arrays that are the same on all devices pass unchanged: their cotangents come from all of them.
    """

    def cut(x):
        if not eqx.is_inexact_array(x) or axes_of(needed) - axes_of(x):
            return x
        return jnp.where(needed, x, jax.lax.stop_gradient(x))

    return jax.tree.map(cut, tree)


def nan_everywhere_unless(ok: Bool[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, or NaN, as are its derivatives. A cotangent of zero stays: nothing depends on it."""
    return _nan_unless.bind(x, jnp.broadcast_to(ok, x.shape))


_nan_unless = Primitive("nan_everywhere_unless")


@_nan_unless.def_impl
@jax.jit
def _values_or_nan(x, ok):
    return jnp.where(ok, x, jnp.nan)


def _jvp_or_nan(primals, tangents):
    (x, ok), (dot, _) = primals, tangents
    still = isinstance(dot, ad.Zero)
    return _nan_unless.bind(x, ok), dot if still else _nan_unless.bind(dot, ok)


def _transposed(bar, x, ok):
    if isinstance(bar, ad.Zero):
        return ad.Zero(x.aval), None
    return jnp.where(ok | (bar == 0), bar, jnp.nan), None


def _batched_or_nan(values, axes):
    size = next(x.shape[i] for x, i in zip(values, axes, strict=True) if i is not None)

    def front(x, i):
        return jnp.broadcast_to(x, (size, *x.shape)) if i is None else jnp.moveaxis(x, i, 0)

    return _nan_unless.bind(*map(front, values, axes)), 0


_nan_unless.def_abstract_eval(lambda x, ok: x)
ad.primitive_jvps[_nan_unless] = _jvp_or_nan
ad.primitive_transposes[_nan_unless] = _transposed
batching.primitive_batchers[_nan_unless] = _batched_or_nan
mlir.register_lowering(_nan_unless, mlir.lower_fun(_values_or_nan, multiple_results=False))


def with_tangent(x: T, tangent: Callable[..., Any], *inputs: Any) -> T:
    """`x`, whose tangent is `tangent((x, *inputs), (x_dot, *input_dots))`.

    Tangents that JAX knows to be zero are None, given and returned. `tangent` must not close over
    arrays. Second derivatives are those of what it computes. It also holds in a `scan` that is
    differentiated twice, where JAX forgets the rule of a `jax.custom_jvp`.
    """
    leaves, structure = jax.tree.flatten(x)
    arrays, static = eqx.partition(inputs, eqx.is_array)
    input_leaves, input_structure = jax.tree.flatten(arrays)
    count = len(leaves)

    def of_leaves(primals, dots):
        inputs = eqx.combine(jax.tree.unflatten(input_structure, primals[count:]), static)
        trees = [
            (jax.tree.unflatten(structure, values[:count]), *input_values)
            for values, input_values in (
                (primals, inputs),
                (dots, jax.tree.unflatten(input_structure, dots[count:])),
            )
        ]
        # Among the leaves, None is a tangent of zero; elsewhere it is a part of the structure.
        return structure.flatten_up_to(tangent(*trees))

    return jax.tree.unflatten(
        structure, _moved.bind(*leaves, *input_leaves, rule=of_leaves, count=count)
    )


_moved = Primitive("with_tangent")
_moved.multiple_results = True


@_moved.def_impl
def _values(*leaves, rule, count):
    del rule
    return list(leaves[:count])


def _jvp(primals, tangents, *, rule, count):
    def is_none(dot):
        return isinstance(dot, ad.Zero) or dot.dtype == jax.dtypes.float0

    out = _moved.bind(*primals, rule=rule, count=count)
    dots = rule(list(primals), [None if is_none(dot) else dot for dot in tangents])

    def zero(x, dot):
        return ad.Zero(jax.typeof(x).to_tangent_aval()) if dot is None else dot

    return out, list(map(zero, out, dots))


def _batched(leaves, axes, *, rule, count):
    size = next(x.shape[i] for x, i in zip(leaves, axes, strict=True) if i is not None)

    def to_front(x, axis):
        return x if axis is None else jnp.moveaxis(x, axis, 0)

    leaves = list(map(to_front, leaves, axes))
    axes = [None if axis is None else 0 for axis in axes]

    def spread(x, axis):
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x

    leaves[:count] = map(spread, leaves[:count], axes[:count])
    axes[:count] = [0] * count

    def of_each(primals, dots):
        of_dots = [axis if dot is not None else None for axis, dot in zip(axes, dots, strict=True)]
        return jax.vmap(rule, (axes, of_dots))(primals, dots)

    return _moved.bind(*leaves, rule=of_each, count=count), [0] * count


_moved.def_abstract_eval(lambda *leaves, rule, count: list(leaves[:count]))
ad.primitive_jvps[_moved] = _jvp
batching.primitive_batchers[_moved] = _batched
mlir.register_lowering(_moved, lambda _, *leaves, rule, count: list(leaves[:count]))


def with_time_tangent(
    x: Float[Array, "..."], t: Float[Array, "..."], slope: Callable[..., Array], *inputs: Any
) -> Float[Array, "..."]:
    """`x`, which moves along `slope(x, t, *inputs)` if `t` moves."""

    def tangent(primals, dots):
        (x, *_), (x_dot, t_dot, *_) = primals, dots
        if t_dot is None:
            return x_dot
        along = t_dot.reshape(*t_dot.shape, *(1,) * (x.ndim - t_dot.ndim)).astype(x.dtype)
        moved = along * slope(*primals)
        return moved if x_dot is None else x_dot + moved

    return with_tangent(x, tangent, t, *inputs)
