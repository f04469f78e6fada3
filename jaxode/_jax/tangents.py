"""Identity functions with a tangent of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxode._jax.sharding import axes_of

T = TypeVar("T")


def filled(dot: Array | None, like: Array) -> Array:
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

    What is the same on all devices is left alone: its cotangent is that of all of them.
    """

    def cut(x):
        if not eqx.is_inexact_array(x) or axes_of(needed) - axes_of(x):
            return x
        return jnp.where(needed, x, jax.lax.stop_gradient(x))

    return jax.tree.map(cut, tree)


@eqx.filter_custom_jvp
def with_tangent(x: T, tangent: Callable[..., Any], *inputs: Any) -> T:
    """`x`, whose tangent is `tangent((x, *inputs), (x_dot, *input_dots))`.

    Tangents that JAX knows to be zero are None, given and returned. `tangent` must not close over
    arrays. Second derivatives are those of what it computes.
    """
    del tangent, inputs
    return x


@with_tangent.def_jvp
def _with_tangent_jvp(primals, tangents):
    (x, tangent, *inputs), (x_dot, _, *dots) = primals, tangents
    return with_tangent(*primals), tangent((x, *inputs), (x_dot, *dots))


def moving(
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
