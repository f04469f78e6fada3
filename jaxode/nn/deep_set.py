"""The network for sets of `jaxode.nn`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import floating, integer
from jaxode._checks.caller import public
from jaxode._checks.samples import check_key
from jaxode.nn.base import Dense, draws
from jaxode.nn.mixer import rows
from jaxode.nn.residual import saturated

LEAST_SPREAD_OF_POINTS = 1e-4  # standard deviation that is told from zero, in standardized units
FARTHEST = 1e16  # points are clipped to it: sums of its square are finite in float32


class DeepSet(eqx.Module):
    """A vector for a set of points, whatever their order and number, for `jaxode.bind(embed=...)`.

    With the mean `m` of its points, and `s^2` their variance plus 1e-8, `h = f(x, (x - m) / s)` of
    each point, and means over points, it is `g(mean(k(h, mean(h))), m, log(s), n)`, of layers with
    `silu`. So each point is seen relative to its set. Spreads below 1e-4, in units of
    `standardize_context`, look alike. Points with a NaN are missing: fill up sets of unequal
    number with NaN. A series with gaps is a set of points `(time, *values)`. An infinite number
    makes the vector NaN.

    `embed(points)` maps one set `[points, size]` to `[features]`.

    Args:
        size: numbers of a point.
        features: numbers of the vector.
        width: of the layers.
        key: draws the initial weights.

    Raises:
        ValueError: for a wrong argument; when called, for points of another size.

    References: Zaheer et al. (2017), arXiv:1703.06114.
    """

    point: tuple[Dense, Dense]
    others: tuple[Dense, Dense]
    moments: Dense
    whole: tuple[Dense, Dense]

    @public("")
    def __init__(self, size: int, features: int, width: int = 128, *, key: PRNGKeyArray):
        size, features = integer("size", size), integer("features", features)
        width = integer("width", width)
        square = width, width
        shapes = (width, 2 * size), *[square] * 4, (features, width), (width, 2 * size + 2)
        *layers, self.moments = map(Dense, draws(check_key(key), shapes))
        self.point, self.others, self.whole = zip(layers[::2], layers[1::2], strict=True)

    def __call__(self, points: Float[Array, "points size"]) -> Float[Array, " features"]:
        size = self.point[0].weight.shape[1] // 2
        if jnp.ndim(points) != 2 or jnp.shape(points)[1] != size:
            raise ValueError(
                f"DeepSet(size={size}): a set must have shape (points, {size}); got "
                f"{jnp.shape(points)}. Sets of numbers are x[..., None], with size=1. If this is a "
                f"row of one set, pass context_shape=(points, {size}) to bind."
            )
        points = floating(points)
        present = ~jnp.isnan(points).any(axis=1)
        count = jnp.sum(present).astype(points.dtype)

        def mean(h):
            total = jnp.sum(jnp.where(present[:, None], h, 0.0), axis=0)
            return total / jnp.maximum(count, 1.0)

        act: Any = jax.nn.silu
        # Replace missing points before any product, or the gradient would be NaN.
        x = jnp.where(present[:, None], points, 0.0)
        x = jnp.where(jnp.isinf(x), jnp.nan, jnp.clip(x, -FARTHEST, FARTHEST))
        center = mean(x)
        away = x - center[None]
        variance = mean(jnp.square(away)) + LEAST_SPREAD_OF_POINTS**2
        with_moments = jnp.concatenate([x, away * jax.lax.rsqrt(variance)[None]], axis=1)
        h = saturated(rows(self.point[1], act(rows(self.point[0], with_moments))))
        beside = self.others[0](mean(act(h)))[None]
        h = h + rows(self.others[1], act(h + beside))
        of_count = jnp.stack([jnp.log1p(count), jax.lax.rsqrt(1 + count)])
        moments = jnp.concatenate([center, jnp.log(variance) / 2, of_count])
        return self.whole[1](act(self.whole[0](mean(act(h))) + saturated(self.moments(moments))))
