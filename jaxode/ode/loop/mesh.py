"""How the times of the steps move with the two ends of a solve.

The error control is not differentiated: relative to its ends, the mesh is a constant.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._jax.tangents import filled, with_tangent


def on_mesh(t, start, end):
    """The time `t`, which differentiation keeps in place relative to `start` and `end`."""

    def between(primals, dots):
        (t, start, end), (_, *dots) = primals, dots
        start_dot, end_dot = map(filled, dots, (start, end))
        span = end - start
        s = jnp.where(span == 0, 0.0, (t - start) / jnp.where(span == 0, 1.0, span))
        s = jax.lax.stop_gradient(s)  # also in second derivatives
        return (1 - s) * start_dot + s * end_dot

    return with_tangent(t, between, start, end)


class Speeds(NamedTuple):
    """The derivatives of a step's start `t` and size `h`."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]


def speeds_in(problem: Any, t: Float[Array, " rows"], h: Float[Array, " rows"], number: Array):
    """The derivatives of step `number` (from 1) with respect to both ends of the solve.

    Number 0 is the start of the solve, a step that keeps size zero.
    """
    span = problem.t1 - problem.t0
    safe = jnp.where(span == 0, 1.0, span)
    s = jnp.where(span == 0, 0.0, (t - problem.t0) / safe)
    ds = jnp.where((span == 0) & (number == 1), 1.0, h / safe)
    return Speeds(1 - s, -ds), Speeds(s, ds)
