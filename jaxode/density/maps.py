"""Bijections around a flow: from the units and the support of the data to what the flow sees."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._jax.closure import compiled

# Columns whose correlation matrix has a smaller eigenvalue depend on each other linearly.
SINGULAR = 1e-9
LEAST = 1e-30  # the least distance of quartiles, in units and in standard deviations
# Knots of the spline of a column, at most; rows between two of them, on average and at least; and
# rows between the last quantile and the extreme.
KNOTS, BETWEEN, BEYOND = 41, 25, 10


Numbers = Array | np.ndarray  # a fit is in NumPy, until `bind` casts it to the data's dtype


class Map(Protocol):
    """A bijection between an event `x` and numbers `u` of the same shape."""

    def inverse(
        self, x: Float[Array, " *event"], /
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`u`, and `log |det du/dx|`. Not finite outside the support of `x`."""
        ...

    def forward(
        self, u: Float[Array, " *event"], /
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`x`, and `log |det du/dx|`."""
        ...


def contains(support: Map, x: Float[Array, " *event"]) -> Bool[Array, ""]:
    """Whether an event is in the support of a bijection."""
    u, log_det = support.inverse(x)
    return jnp.isfinite(u).all() & jnp.isfinite(log_det)


@compiled
def contained(support: Map, x: Float[Array, "rows *event"]) -> Bool[Array, " rows"]:
    """Which events are in the support of a bijection."""
    return jax.vmap(lambda x: contains(support, x))(x)


class Unfitted(NamedTuple):
    """Data, and how to fit a map to them. `bind` fits it, after the bijection of a support."""

    data: Any
    fit: Callable[[Float[np.ndarray, "rows *event"]], Map]


def constants_like(tree: PyTree, x: Array) -> PyTree:
    """Constant arrays in the dtype of `x`: training must not move the units."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf).astype(x.dtype), tree)


class Affine(eqx.Module):
    """`z = (x - mean) / scale`, coordinate by coordinate."""

    mean: Float[Numbers, "..."]
    scale: Float[Numbers, "..."]

    def inverse(self, x):
        mean, scale = self._spread(x)
        return (x - mean) / scale, -jnp.sum(jnp.log(scale))

    def forward(self, z):
        mean, scale = self._spread(z)
        return mean + scale * z, -jnp.sum(jnp.log(scale))

    def _spread(self, like: Array):
        spread = lambda part: jnp.broadcast_to(part, like.shape)
        return map(spread, constants_like((self.mean, self.scale), like))


def fit_affine(data: Float[np.ndarray, "rows *event"]) -> Affine:
    """From mean and standard deviation."""
    return Affine(data.mean(axis=0), data.std(axis=0))


class Monotone(eqx.Module):
    """A rational quadratic spline for each coordinate, with logarithmic tails.

    Between two knots, with `s` the slope of the chord, `d0` and `d1` the slopes at the knots and
    `u` in [0, 1] the place between them, `z = z0 + (z1 - z0) (s u^2 + d0 u (1 - u)) / q` with
    `q = s + (d0 + d1 - 2 s) u (1 - u)`. Beyond the last one, `z = z1 + log(1 + d1 (x - x1))`: a
    value that is far away is not far away from a normal's.
    """

    x: Float[Numbers, "*event knots"]
    """Increasing. A coordinate with fewer knots repeats its last one."""
    z: Float[Numbers, "*event knots"]
    slope: Float[Numbers, "*event knots"]

    @eqx.filter_jit  # one program outside of transformations, not one for each operation
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
        left = jnp.sum(value[..., None] >= inner, axis=-1, keepdims=True)
        # A repeated last knot is no interval.
        ends = jnp.sum(inner < constants_like(knots[..., -1:], value), axis=-1, keepdims=True)
        left = jnp.minimum(left, ends)
        at = lambda leaf, i: jnp.take_along_axis(leaf, i, axis=-1)[..., 0]
        leaves = constants_like((self.x, self.z, self.slope), value)
        return tuple((at(leaf, left), at(leaf, left + 1)) for leaf in leaves)


def _between(value, low, high):
    """As `jnp.clip`, but at a bound with the whole derivative of the inside."""
    return jnp.where(value < low, low, jnp.where(value > high, high, value))


def _denominator(s, d0, d1, u):
    return s + (d0 + d1 - 2 * s) * u * (1 - u)


def _log_slope(s, d0, d1, u):
    """`log dz/dx` at the place `u` between two knots; in the tails `u` is 0 or 1."""
    top = d1 * u**2 + 2 * s * u * (1 - u) + d0 * (1 - u) ** 2
    return jnp.log(top) + 2 * jnp.log(s / _denominator(s, d0, d1, u))


def fit_normal(data: Float[np.ndarray, "rows *event"]) -> "Chain":
    """Through the extremes and quantiles at equally spaced normal values, after robust scaling.

    The extremes bound the `z` of all rows, however heavy the tails are.
    """
    from statistics import NormalDist  # `import jaxode` does not load it

    standard, rows = NormalDist(), len(data)
    columns = data.reshape(rows, -1)
    low, center, high = np.quantile(columns, (0.25, 0.5, 0.75), axis=0)
    spread, std = high - low, columns.std(axis=0)
    scale = np.where(spread > LEAST * np.maximum(std, 1), spread / 1.349, std)
    extreme = standard.inv_cdf(1 - min(1 / rows, 0.1))
    widest = standard.inv_cdf(1 - min(BEYOND / rows, 0.16))
    z = np.linspace(-widest, widest, min(max(rows // BETWEEN, 5), KNOTS - 2))
    levels = [0.0, *map(standard.cdf, z), 1.0]
    # Quantiles between two rows would lie close to one of tied rows.
    x = np.quantile((columns - center) / scale, levels, axis=0, method="nearest")
    knots = [_knots(column, np.array([-extreme, *z, extreme])) for column in x.T]
    event = data.shape[1:]
    x, z, slope = (np.stack(part).reshape(*event, KNOTS) for part in zip(*knots, strict=True))
    return Chain((Affine(center.reshape(event), scale.reshape(event)), Monotone(x, z, slope)))


def _knots(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
    """Knots of one column: tied quantiles are one, at the mean of their `z`; slopes between them.

    The slope at a knot is the geometric mean of those of its chords, which keeps the spline
    monotone however much they differ.
    """
    group = np.cumsum(np.diff(x, prepend=x[0]) > 1e-6 * np.maximum(np.abs(x), 1))
    count = np.bincount(group)
    x, z = np.bincount(group, x) / count, np.bincount(group, z) / count
    chord = np.diff(z) / np.diff(x)
    slope = np.concatenate([chord[:1], np.sqrt(chord[1:] * chord[:-1]), chord[-1:]])
    fill = (0, KNOTS - len(x))
    return tuple(np.pad(part, fill, mode="edge") for part in (x, z, slope))


class Linear(eqx.Module):
    """`z = matrix x` on flattened events, with the inverse of the matrix beside it."""

    matrix: Float[Numbers, "size size"]
    back: Float[Numbers, "size size"]
    log_det: Float[Numbers, ""]

    def inverse(self, x):
        return _times(self.matrix, x), constants_like(self.log_det, x)

    def forward(self, z):
        return _times(self.back, z), constants_like(self.log_det, z)


def _times(matrix: Numbers, x: Array) -> Array:
    """The product, in full precision on accelerators too: a density has no rounding to spare."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(constants_like(matrix, x), x.reshape(-1), precision=highest).reshape(x.shape)


class Chain(eqx.Module):
    """One map after another, from data to `z`."""

    maps: tuple[Map, ...]

    def inverse(self, x):
        return _through([part.inverse for part in self.maps], x)

    def forward(self, z):
        return _through([part.forward for part in reversed(self.maps)], z)


def _through(steps: list[Callable[..., Any]], x: Array) -> tuple[Array, Array]:
    total = jnp.zeros((), x.dtype)
    for step in steps:
        x, log_det = step(x)
        total = total + log_det
    return x, total


def fit_white(data: Float[np.ndarray, "rows *event"]) -> Chain:
    """Standardize the columns, then multiply by the inverse root of their correlation matrix."""
    variances, directions = principal_axes(data.reshape(len(data), -1))
    involved = dependent_columns(variances, directions)
    if involved:
        raise ValueError(
            "bind(standardize=...): whitening needs columns that do not depend on each other "
            f"linearly, and more rows than columns; got {len(data)} rows, and a singular "
            f"covariance of columns {column_list(involved)}. Leave one of them out."
        )
    root = np.sqrt(variances)
    matrix, back = (directions * part @ directions.T for part in (1 / root, root))
    log_det = -np.sum(np.log(root))
    return Chain((fit_affine(data), Linear(matrix, back, log_det)))


def principal_axes(columns: Float[np.ndarray, "rows n"]) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues and eigenvectors of the correlation matrix."""
    scaled = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    return np.linalg.eigh(scaled.T @ scaled / len(scaled))


def dependent_columns(variances: np.ndarray, directions: np.ndarray) -> list[int]:
    """The columns of a linear dependence, from the eigenvalues of their correlation matrix."""
    if not (variances <= SINGULAR * len(variances)).any():
        return []
    return np.flatnonzero(np.abs(directions[:, 0]) > 0.01).tolist()


def column_list(columns: Sequence[int] | np.ndarray) -> str:
    """Up to ten column numbers, and how many more there are."""
    more = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
    return ", ".join(map(str, columns[:10])) + f"{more} (counting from 0)"
