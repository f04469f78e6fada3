"""Does a field have the periods of its base? If not, its density over a period is not one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode._checks.rules import PERIODIC, Faults
from jaxode._jax.closure import compiled
from jaxode._jax.sharding import axes_of, vary
from jaxode.divergence import FieldAt
from jaxode.flows.bases import BaseDensity, Torus
from jaxode.ode.field import VectorField, of_row
from jaxode.ode.system import System

# The difference one period on that still counts as rounding, relative to the field. Networks in
# float32 reach 1e-5.
ROUNDING_PART = 1e-3
# Parts of the span at which fields are compared: a field may be zero, or symmetric, in its middle.
PARTS_OF_SPAN = 0.13, 0.47, 0.83
MOST_TURNS = 4  # at each of these parts of the span
# Where wrapped angles jump, in periods, looked for at each of these parts of the span:
# `x % period` jumps at 0, `arctan2(sin(x), cos(x))` at 1/2.
CUTS_OF_ANGLES = 0.0, 0.5, 0.0
# How far from a cut the field is compared with itself on its other side. In single precision, a
# smooth field differs less than the tolerance if its slope is below 80 over the span.
ROUNDINGS_FROM_CUT = 8


class Turns(NamedTuple):
    """Events at which a field is compared with itself, at several times.

    At each time: one event, the same with angles whole periods on, and two events on both sides of
    a cut.
    """

    u: Float[Array, " points"]
    """Parts of the span."""
    z: Float[Array, "points *event"]


def turns_of(base: BaseDensity, like: Float[Array, "..."]) -> Turns | None:
    """Where to compare a field with itself, whole periods on and across a cut. None if the base has
    no angles.

    Up to `MOST_TURNS` angles turn one after the other. If there are more, all turn at once, each by
    a different number of periods, and by new numbers in the next turn, so that no simple sum of
    angles stays the same.

    Args:
        base: the base of the flow.
        like: samples, whose dtype and devices the events get.
    """
    if not isinstance(base, Torus) or not base.angles:
        return None
    period, count = np.array(base.period), len(base.angles)
    finite = np.where(np.isfinite(period), period, 0.0)
    rng = np.random.default_rng(0)
    moves = np.zeros((len(PARTS_OF_SPAN), 1 + min(count, MOST_TURNS), len(period)))
    for of_time in moves[:, 1:]:
        few, many = np.eye(count), lambda: rng.permutation(count) + 1
        turns = few if count <= MOST_TURNS else [many() for _ in of_time]
        of_time[:, list(base.angles)] = turns
    # Each time starts at another angle.
    part = (np.linspace(0.1, 0.9, len(period)) + np.array(PARTS_OF_SPAN)[:, None]) % 1
    start = part * np.where(np.isfinite(period), period, 1.0)
    turned = start[:, None] + moves * finite
    z = np.concatenate([turned, _beside_cuts(base, start, finite, like)], axis=1)
    u = np.repeat(PARTS_OF_SPAN, z.shape[1])
    z = z.reshape(-1, *base.event_shape)
    return vary(Turns(*(jnp.asarray(x, like.dtype) for x in (u, z))), axes_of(like))


def _beside_cuts(base: Torus, start: Any, period: Any, like: Any) -> Any:
    """Events with all angles before and behind a cut, `[times, 2, size]`.

    In 16 bits a single rounding is already too far, so both are the same event.
    """
    eps = float(jnp.finfo(like.dtype).eps)
    distance = ROUNDINGS_FROM_CUT * eps if eps < 1e-5 else 0.0
    z = np.repeat(start[:, None], 2, axis=1)
    places = np.array(CUTS_OF_ANGLES)[:, None] + distance * np.array([-1.0, 1.0])
    angles = list(base.angles)
    z[:, :, angles] = places[:, :, None] * period[angles]
    return z


def off_period(base: Any, dz: Float[Array, "points *event"], span: Any) -> Float[Array, ""]:
    """The largest difference of the field at `turns_of` the base, in units of the tolerance.

    `base` is a torus, `span` is the difference of the end times. Not differentiable.
    """
    dz = jax.lax.stop_gradient(dz).reshape(len(PARTS_OF_SPAN), -1, len(base.period))
    still = jnp.asarray(base.radius, dz.dtype) / jnp.abs(span).astype(dz.dtype)
    scale = jnp.max(jnp.abs(dz), axis=1, keepdims=True) + still[None, None]
    tolerance = ROUNDING_PART + 64 * float(jnp.finfo(dz.dtype).eps)  # bfloat16 turns angles by 0.03
    difference = jnp.concatenate([dz[:, 1:-2] - dz[:, :1], dz[:, -1:] - dz[:, -2:-1]], axis=1)
    return jnp.max(jnp.abs(difference) / (tolerance * scale))


def off_period_of(
    f: VectorField, base: BaseDensity, span: Any, params: PyTree, row: PyTree, like: Any
) -> Float[Array, ""] | None:
    """`off_period` of the field between two times, for a context `row`."""
    turns = turns_of(base, like)
    if turns is None:
        return None
    t0, t1 = (jnp.asarray(t, like.dtype) for t in span)
    args = jax.lax.stop_gradient(of_row(params, row))
    dz = jax.vmap(lambda u, z: FieldAt(f, t0 + u * (t1 - t0), args)(z))(*turns)
    return off_period(base, dz, t1 - t0)


def with_periods(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program of a flow, which fails in all rows if the field lacks the periods."""

    @functools.wraps(program)
    def checked(system: System, integrands_and_base, *arguments):
        off = _of_system(system, integrands_and_base)
        if off is not None:
            y0 = jnp.where(PERIODIC.holds(off), system.y0, jnp.nan)
            system = system._replace(y0=y0.astype(system.y0.dtype))
        return program(system, integrands_and_base, *arguments)

    return checked


def period_faults(system: System, integrands_and_base: Any) -> Faults:
    """The fault for which a program `with_periods` may fail."""
    if turns_of(integrands_and_base[1], system.y0) is None:
        return {}
    return {
        PERIODIC.sentence(name="params"): lambda: (
            ~PERIODIC.holds(_compiled(system, integrands_and_base))
        )
    }


def _of_system(system: System, integrands_and_base: Any) -> Float[Array, ""] | None:
    integrands, base = integrands_and_base
    if system.y0.shape[0] == 0:  # there is no context
        return None
    first = jax.tree.map(lambda leaf: leaf[0], system.row_args)
    span = system.t0, system.t1
    return off_period_of(integrands.f, base, span, system.shared, first, system.y0)


_compiled = compiled(_of_system)
