"""Levels of a density of one number: the distribution function, and its inverse.

The solution of an ODE of one number keeps the order of its starts. So the level of a number is that
of its base sample, or one less that, if the maps around the flow decrease:

    cdf(x) = cdf_base(z(t0)),  quantile(q) = x for z(t0) = icdf_base(q).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import floating, floating_dtype, numbers
from jaxode._checks.caller import arg, caller
from jaxode._checks.rules import Rule, is_known
from jaxode._jax.closure import compiled
from jaxode.density.maps.chain import Chain, from_data
from jaxode.flows.bases import BaseDensity, Torus, level_functions

LEVEL_RULE = Rule(
    "q=...", lambda q: (q > 0) & (q < 1), "levels must lie strictly between 0 and 1",
    "Leave out 0 and 1, which are the ends of the support.",
)  # fmt: skip


def check_one_number(base: BaseDensity) -> None:
    """Raise unless events are one number, and the base knows its levels."""
    event = tuple(base.event_shape)
    if math.prod(event) != 1:
        raise ValueError(
            f"{caller()}: needs events of one number; got events of shape {event}. Take the levels "
            "of each coordinate among many of density.sample."
        )
    if None in level_functions(base):
        raise _no_levels(base)


def check_levels(q: Any) -> tuple[Float[Array, " levels"], tuple[int, ...]]:
    """The levels as a vector, and their shape."""
    q = numbers("q", q)
    if is_known(q):
        LEVEL_RULE.check(np.asarray(q, floating_dtype(q.dtype)))
    levels = floating(q)
    return levels.reshape(-1), levels.shape


def levels_of_each(q: tuple[int, ...], rows: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the levels of one row. Raises unless `q` begins with the shape of the rows."""
    if q[: len(rows)] != rows:
        raise ValueError(
            f"{arg('q')} must begin with the axes of the context, {rows}, if paired=True; got the "
            f"shape {q}. Leave paired= out for the same levels in each row."
        )
    return q[len(rows) :]


def of_each_level(context: PyTree, levels: int) -> PyTree:
    """Repeat each row of the context once for each level."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, levels, axis=0), context)


@compiled
def placed(
    maps: Chain, x: Float[Array, "rows *event"]
) -> tuple[Float[Array, "rows *event"], Bool[Array, " rows"], Bool[Array, " rows"]]:
    """Map each row into the flow; say whether that succeeds, and which rows are large.

    Rows outside of the support, or so far away that the maps overflow, have the level 0, or 1 if
    they are large. A support is an interval, so they lie on one side of a number within.
    """

    def within_reach(x):
        center = maps.forward(jnp.zeros_like(x))[0]
        finite, large = ~jnp.isinf(x), x > center
        return jnp.where(finite, x, center), finite.reshape(()), large.reshape(())

    x, finite, large = jax.vmap(within_reach)(x)
    inside, fits, z, _ = from_data(maps, x)
    return z, inside & fits & finite, large


@compiled
def levels_at(
    maps: Chain, base: BaseDensity, z: Float[Array, "rows *event"]
) -> Float[Array, " rows"]:
    """The level of each row at the base."""
    q = _called(base, 0, z).reshape(len(z))
    return jnp.where(_rising(maps, z), q, 1 - q)


@compiled
def base_quantiles(
    maps: Chain, base: BaseDensity, q: Float[Array, " rows"]
) -> Float[Array, "rows *event"]:
    """The base samples at these levels; NaN for numbers that are no levels."""
    events = jnp.where(LEVEL_RULE.holds(q), q, jnp.nan).reshape(len(q), *base.event_shape)
    return _called(base, 1, jnp.where(_rising(maps, events), events, 1 - events))


def _rising(maps: Chain, like: Float[Array, "rows *event"]) -> Bool[Array, ""]:
    """Whether the maps keep the order of numbers: all their slopes have the sign of this one."""
    zero = jnp.zeros(like.shape[1:], like.dtype)
    _, slope = jax.jvp(lambda z: maps.forward(z)[0], (zero,), (zero + 1,))
    return slope.reshape(()) > 0


def _called(base: BaseDensity, which: int, x: Float[Array, "rows *event"]) -> Array:
    try:
        return level_functions(base)[which](x)
    except NotImplementedError:  # numpyro
        raise _no_levels(base) from None


def _no_levels(base: BaseDensity) -> ValueError:
    if isinstance(base, Torus):
        return ValueError(
            f"{caller()}: needs numbers in order, and angles have none. Draw samples with "
            "density.sample."
        )
    return ValueError(
        f"{caller()}: needs a base with cdf and icdf; got {base!r}. Pass "
        f"jaxode.standard_normal({tuple(base.event_shape)}) to cnf."
    )
