"""Does a field have the periods of its base? Otherwise its density over one period is not one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.rules import PERIODIC, Faults
from jaxode._jax.closure import compiled
from jaxode._jax.sharding import axes_of, vary
from jaxode.flows.bases import BaseDensity, Torus
from jaxode.flows.divergence import FieldAt
from jaxode.ode.field import VectorField, of_row
from jaxode.ode.system import System

# The difference one period on that still counts as rounding, relative to the field. Networks in
# float32 reach 1e-5.
LOOSE = 1e-3


def turned(base: BaseDensity, like: Float[Array, "..."]) -> Float[Array, "points *event"] | None:
    """One event, and others some angles of which are one period on. None if there are no angles.

    Turn `j` moves the angles that have the bit `j` in their number, counted from one. So each
    moves, and no two move alike: a field of their difference needs the periods, too.

    Args:
        base: the base of the flow.
        like: samples, whose dtype and devices the events get.
    """
    if not isinstance(base, Torus) or not base.angles:
        return None
    period, angles = np.array(base.period), list(base.angles)
    numbers = np.zeros(len(period), int)
    numbers[angles] = 1 + np.arange(len(angles))
    moves = (numbers[None] >> np.arange(len(angles).bit_length())[:, None]) & 1
    finite = np.isfinite(period)
    start = (np.linspace(0.1, 0.9, len(period)) * np.where(finite, period, 1.0))[None]
    points = np.concatenate([start, start + moves * np.where(finite, period, 0.0)[None]])
    points = jnp.asarray(points.reshape(-1, *base.event_shape), like.dtype)
    return vary(points, axes_of(like))


def off_period(base: Any, dz: Float[Array, "points *event"], span: Any) -> Float[Array, ""]:
    """The largest difference of the field at the events of `turned`, in units of the tolerance.

    `base` is a torus, `span` is the difference of the end times. Not differentiable.
    """
    dz = jax.lax.stop_gradient(dz).reshape(len(dz), -1)
    period = np.array(base.period)
    radius = np.where(np.isfinite(period), period / (2 * math.pi), 1.0)
    still = jnp.asarray(radius, dz.dtype) / jnp.abs(span).astype(dz.dtype)
    scale = jnp.max(jnp.abs(dz), axis=0) + still
    tolerance = LOOSE + 64 * float(jnp.finfo(dz.dtype).eps)  # bfloat16 turns angles by 0.03
    return jnp.max(jnp.abs(dz[1:] - dz[:1]) / (tolerance * scale)[None])


def off_period_of(
    f: VectorField, base: BaseDensity, span: Any, params: PyTree, row: PyTree, like: Any
) -> Float[Array, ""] | None:
    """`off_period` of the field halfway through the `span` of two times, for a context `row`."""
    points = turned(base, like)
    if points is None:
        return None
    t0, t1 = (jnp.asarray(t, like.dtype) for t in span)
    args = jax.lax.stop_gradient(of_row(params, row))
    dz = jax.vmap(FieldAt(f, t0 + (t1 - t0) / 2, args))(points)
    return off_period(base, dz, t1 - t0)


def with_periods(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program `(system, parts, ...)` that fails in all rows if the field lacks the periods."""

    @functools.wraps(program)
    def checked(system: System, parts, *rest):
        off = _of_system(system, parts)
        if off is not None:
            y0 = jnp.where(PERIODIC.holds(off), system.y0, jnp.nan)
            system = system._replace(y0=y0.astype(system.y0.dtype))
        return program(system, parts, *rest)

    return checked


def period_faults(system: System, parts: Any) -> Faults:
    """The fault for which a program `with_periods` may fail."""
    if turned(parts[1], system.y0) is None:
        return {}
    return {PERIODIC.sentence(name="params"): lambda: ~PERIODIC.holds(_compiled(system, parts))}


def _of_system(system: System, parts: Any) -> Float[Array, ""] | None:
    integrands, base = parts
    if system.y0.shape[0] == 0:  # there is no context
        return None
    first = jax.tree.map(lambda leaf: leaf[0], system.row_args)
    span = system.t0, system.t1
    return off_period_of(integrands.f, base, span, system.shared, first, system.y0)


_compiled = compiled(_of_system)
