"""The mesh of a solve: its pieces between breakpoints, and how it moves with its two ends.

The error control is not differentiated: the mesh is a constant of differentiation, except that its
first and last piece stretch with the start and the end of the solve.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxode._jax.tangents import filled, with_tangent


class Piece(NamedTuple):
    """A stretch of a solve without a jump of the vector field, or the jump itself."""

    start: Float[Array, " rows"]
    end: Float[Array, " rows"]
    first: Bool[Array, " rows"] | bool
    """Whether it starts with the solve."""
    last: Bool[Array, " rows"] | bool
    """Whether it ends with the solve."""
    jump: Bool[Array, " rows"] | bool
    """Whether it is no longer than the gap around a breakpoint."""


def piece_at(breakpoints: Float[Array, " points"] | None, t, start, end) -> Piece:
    """The piece that a step from the time `t` lies in.

    A breakpoint is a gap a few roundings of the time wide. One step ends where the gap begins, one
    crosses it, and one starts where it ends. So each stage sees the field on its own side,
    whichever side the breakpoint itself belongs to.
    """
    if breakpoints is None:
        return Piece(start, end, first=True, last=True, jump=False)
    start, end = jnp.broadcast_to(start, t.shape), jnp.broadcast_to(end, t.shape)
    t, low, high = jax.lax.stop_gradient((t, start, end))
    eps, largest = jnp.finfo(t.dtype).eps, jnp.maximum(jnp.abs(low), jnp.abs(high))[None]
    points = jnp.broadcast_to(breakpoints[:, None], (len(breakpoints), *t.shape))
    # Beside zero a time needs a size, and padding at infinity an end.
    size, far = jnp.clip(jnp.abs(points), eps * largest, largest), jnp.abs(t)[None]
    # The last stage of a step is up to one and a half roundings, of the times that it goes between,
    # away from the end of its piece: a step from far away ends sooner.
    gap, wide = 2 * eps * size, 2 * eps * jnp.where(far > 2 * size, far, size)
    sides = lambda gap: jnp.concatenate([points - gap, points + gap])
    sign = jnp.sign(high - low)
    beyond = lambda a, b, gap: sign[None] * (a - b) > jnp.concatenate([gap, gap]) / 2
    inside = beyond(sides(gap), low[None], gap) & beyond(high[None], sides(gap), gap)
    to_come = beyond(sides(wide), t[None], wide)
    ahead, behind = inside & to_come, inside & ~to_come
    first, last = ~behind.any(axis=0), ~ahead.any(axis=0)
    before = sign * jnp.max(sign[None] * sides(gap), axis=0, where=behind, initial=-jnp.inf)
    after = sign * jnp.min(sign[None] * sides(wide), axis=0, where=ahead, initial=jnp.inf)
    start, end = jnp.where(first, start, before), jnp.where(last, end, after)
    jump = jnp.not_equal(*jnp.split(to_come, 2)).any(axis=0)  # between the sides
    return Piece(start, end, first, last, jump)


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


def speeds_in(piece: Piece, t: Float[Array, " rows"], h: Float[Array, " rows"], number: Array):
    """The derivatives of step `number` (from 1) with respect to both ends of the solve.

    Number 0 is the start of the solve, a step that keeps size zero.
    """
    span = piece.end - piece.start
    safe = jnp.where(span == 0, 1.0, span)
    s = jnp.where(span == 0, 0.0, (t - piece.start) / safe)
    ds = jnp.where((span == 0) & (number == 1), 1.0, h / safe)
    first, last = (jnp.asarray(end, s.dtype) for end in (piece.first, piece.last))
    return Speeds(first * (1 - s), -first * ds), Speeds(last * s, last * ds)
