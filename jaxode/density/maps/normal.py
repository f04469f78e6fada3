"""A monotone spline of each column, which makes it normal."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.density.maps.affine import Affine
from jaxode.density.maps.base import Map, Numbers, constants_like
from jaxode.density.maps.chain import Chain

LEAST_SPREAD = 1e-30  # the least distance of quartiles, in units and in standard deviations
MAX_KNOTS = 41  # of the spline of a column
ROWS_PER_KNOT = 25  # at least, on average
ROWS_BEYOND_KNOTS = 10  # between the last quantile and the extreme, on either side


class Monotone(Map):
    """A rational quadratic spline for each coordinate, with logarithmic tails.

    Between two knots, with `s` the slope of the chord, `d0` and `d1` the slopes at the knots and
    `u` in [0, 1] the place between them, `z = z0 + (z1 - z0) (s u^2 + d0 u (1 - u)) / q` with
    `q = s + (d0 + d1 - 2 s) u (1 - u)`. Beyond the last one, `z = z1 + log(1 + d1 (x - x1))`, so a
    value that is far away has a `z` that a normal may have.
    """

    x: Float[Numbers, "*event knots"]
    """Increasing. A coordinate with fewer knots repeats its last one."""
    z: Float[Numbers, "*event knots"]
    slope: Float[Numbers, "*event knots"]

    @eqx.filter_jit  # or each operation outside of transformations is a program
    def inverse(self, x):
        (x0, x1), (z0, z1), (d0, d1) = self._around(x, self.x)
        inner = _between(x, x0, x1)
        s, u = (z1 - z0) / (x1 - x0), (inner - x0) / (x1 - x0)
        inside = z0 + (z1 - z0) * (s * u**2 + d0 * u * (1 - u)) / _denominator(s, d0, d1, u)
        beyond = (x - inner) * jnp.where(x < x1, d0, d1)
        sign = jnp.where(beyond < 0, -1.0, 1.0)  # `jnp.sign` is zero at a knot
        tail = jnp.log1p(sign * beyond)
        z = inside + sign * tail
        return z, jnp.sum(_log_slope(s, d0, d1, u) - tail)

    @eqx.filter_jit
    def forward(self, z):
        (x0, x1), (z0, z1), (d0, d1) = self._around(z, self.z)
        inner = _between(z, z0, z1)
        s, v = (z1 - z0) / (x1 - x0), (inner - z0) / (z1 - z0)
        # The root `u` of the quadratic equation, in sums of positive terms.
        p = (d0 * (1 - v) - d1 * v) / s
        q = jnp.sqrt(p**2 + 4 * v * (1 - v))
        low, high = 2 * v / (2 * v + p + q), (q - p) / (q - p + 2 * (1 - v))
        u = jnp.where(p > 0, low, high)
        sign = jnp.where(z < inner, -1.0, 1.0)
        tail = sign * (z - inner)
        beyond = sign * jnp.expm1(tail)
        x = x0 + u * (x1 - x0) + beyond / jnp.where(z < z1, d0, d1)
        return x, jnp.sum(_log_slope(s, d0, d1, u) - tail)

    def _around(self, value: Array, knots: Numbers):
        """The knots on both sides of each value: their `x`, `z` and slope."""
        inner = constants_like(knots[..., 1:-1], value)
        index = jnp.sum(value[..., None] >= inner, axis=-1, keepdims=True)
        # A repeated last knot is no interval.
        last_interval = jnp.sum(
            inner < constants_like(knots[..., -1:], value), axis=-1, keepdims=True
        )
        index = jnp.minimum(index, last_interval)

        def at(leaf, i):
            return jnp.take_along_axis(leaf, i, axis=-1)[..., 0]

        leaves = constants_like((self.x, self.z, self.slope), value)
        return tuple((at(leaf, index), at(leaf, index + 1)) for leaf in leaves)


def _between(value, low, high):
    """Clip like `jnp.clip`, but keep the whole derivative at a bound."""
    return jnp.where(value < low, low, jnp.where(value > high, high, value))


def _denominator(s, d0, d1, u):
    return s + (d0 + d1 - 2 * s) * u * (1 - u)


def _log_slope(s, d0, d1, u):
    """`log dz/dx` at the place `u` between two knots; in the tails `u` is 0 or 1."""
    top = d1 * u**2 + 2 * s * u * (1 - u) + d0 * (1 - u) ** 2
    return jnp.log(top) + 2 * jnp.log(s / _denominator(s, d0, d1, u))


def fit(data: Float[np.ndarray, "rows *event"]) -> Chain:
    """Fit splines through the extremes, and quantiles at equally spaced normal values.

    Columns are first scaled by their quartiles. The extremes bound the `z` of all rows, however
    heavy the tails are.
    """
    from statistics import NormalDist  # `import jaxode` does not load it

    standard, rows = NormalDist(), len(data)
    columns = data.reshape(rows, -1)
    low, center, high = np.quantile(columns, (0.25, 0.5, 0.75), axis=0)
    spread, std = high - low, columns.std(axis=0)
    scale = np.where(spread > LEAST_SPREAD * np.maximum(std, 1), spread / 1.349, std)
    extreme = standard.inv_cdf(1 - min(1 / rows, 0.1))
    widest = standard.inv_cdf(1 - min(ROWS_BEYOND_KNOTS / rows, 0.16))
    z = np.linspace(-widest, widest, min(max(rows // ROWS_PER_KNOT, 5), MAX_KNOTS - 2))
    levels = [0.0, *map(standard.cdf, z), 1.0]
    # Quantiles between two rows would lie close to one of tied rows.
    x = np.quantile((columns - center) / scale, levels, axis=0, method="nearest")
    knots = [_knots(column, np.array([-extreme, *z, extreme])) for column in x.T]
    event = data.shape[1:]
    x, z, slope = (np.stack(part).reshape(*event, MAX_KNOTS) for part in zip(*knots, strict=True))
    return Chain((Affine(center.reshape(event), scale.reshape(event)), Monotone(x, z, slope)))


def _knots(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
    """Knots of one column and their slopes. Tied quantiles are one knot, at the mean of their `z`.

    The slope at a knot is the geometric mean of those of its chords, which keeps the spline
    monotone however much they differ.
    """
    group = np.cumsum(np.diff(x, prepend=x[0]) > 1e-6 * np.maximum(np.abs(x), 1))
    count = np.bincount(group)
    x, z = np.bincount(group, x) / count, np.bincount(group, z) / count
    chord = np.diff(z) / np.diff(x)
    slope = np.concatenate([chord[:1], np.sqrt(chord[1:] * chord[:-1]), chord[-1:]])
    fill = (0, MAX_KNOTS - len(x))
    return tuple(np.pad(part, fill, mode="edge") for part in (x, z, slope))
