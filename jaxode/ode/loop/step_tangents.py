"""Derivatives of the step times by the two ends of a solve.

The error control is not differentiated: relative to its ends, the mesh is a constant. Where an
event may end the solve, at a time that nobody knows before, all times but the ends stay in place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._jax.tangents import instantiate_zeros, with_tangent


def with_end_tangents(t, start, end, in_place: bool):
    """The time `t`, inside of the solve or at its start, with its derivatives by both ends."""

    def between(primals, dots):
        (t, start, end), (_, *dots) = primals, dots
        start_dot, end_dot = map(instantiate_zeros, dots, (start, end))
        if in_place:
            return jnp.where(t == start, start_dot, 0)
        span = end - start
        s = jnp.where(span == 0, 0.0, (t - start) / jnp.where(span == 0, 1.0, span))
        s = jax.lax.stop_gradient(s)  # also in second derivatives
        return (1 - s) * start_dot + s * end_dot

    return with_tangent(t, between, start, end)


class StepTangents(NamedTuple):
    """The derivatives of a step's start `t` and size `h`."""

    t: Float[Array, " rows"]
    h: Float[Array, " rows"]


def step_tangents(
    problem: Any, t: Float[Array, " rows"], h: Float[Array, " rows"], number: Array, in_place: bool
):
    """The derivatives of step `number` (from 1) with respect to both ends of the solve.

    Number 0 is the start of the solve, a step that keeps size zero.
    """
    start, end = problem.t0, problem.t1
    span = end - start
    safe = jnp.where(span == 0, 1.0, span)
    s = jnp.where(span == 0, 0.0, (t - start) / safe)
    ds = jnp.where((span == 0) & (number == 1), 1.0, h / safe)
    by_start, by_end = StepTangents(1 - s, -ds), StepTangents(s, ds)
    if not in_place:
        return by_start, by_end
    rounding = 4 * jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(t), jnp.abs(end))
    at_start, moves = t == start, (h != 0) | (span == 0) & (number == 1)
    to_end = jnp.abs(end - t - h) <= rounding

    def one(flag):
        return flag.astype(t.dtype)

    by_start = StepTangents(one(at_start), -one(at_start & moves))
    return by_start, StepTangents(one((t == end) & (span != 0)), one(to_end & moves))
