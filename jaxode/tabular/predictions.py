"""The distribution of one modelled number given the other columns, as points with weights."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._checks.caller import arg
from jaxode.density.bind import Density
from jaxode.tabular import frames
from jaxode.tabular.categorical import Categories
from jaxode.tabular.columns import Column
from jaxode.tabular.encoding import Encoder

# Quantiles of a row that are solved for, points between them, and how far out, in the base.
NODES, FINE, FURTHEST = 21, 1025, 4.5
LEAST = 1e-6  # probability of a grid that counts
ROWS = 1000  # at a time


class Predictive:
    """The distributions of a column in the rows of a frame."""

    def __init__(
        self, encoder: Encoder, categories: Categories | None, density: Density | None, frame: Any
    ):
        self.column, self.encoder, self.density = _target(encoder), encoder, density
        self.frame = frames.as_frame("frame", frame)
        self.given = encoder.features(self.frame)
        shares = np.ones((len(self.given), self.column.present))
        if categories is not None:
            shares = np.exp(np.asarray(_log_shares(categories, self.given), float))
        shares = shares[:, : self.column.present]
        self.shares = shares / shares.sum(axis=1, keepdims=True)

    def values(self) -> np.ndarray:
        """The value of each row."""
        name = self.column.name
        values, missing, text = frames.read("frame", self.frame, name)
        if text:
            raise TypeError(f"{arg('frame')} column {name!r} must hold numbers, as in training.")
        for row in np.flatnonzero(missing):
            raise ValueError(
                f"{arg('frame')} column {name!r} must have a value in each row; got a missing one "
                f"in row {row}. Leave the row out."
            )
        return values.astype(float)

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """The probability of at most `y`."""
        column = self.column
        atoms = np.array(column.values, float)
        total = np.sum(self.shares[:, : len(atoms)] * (atoms <= y[:, None]), axis=1)
        for i, grid, density, context in self._grids(slice(None)):
            end = sum(column.cell(y, i)) if grid else y
            level = density.cdf(jnp.asarray(column.scaled(end))[:, None], context=context)
            total += self.shares[:, len(atoms) + i] * np.asarray(level, float)
        return np.clip(total, 0.0, 1.0)

    def each(self, f: Callable[..., np.ndarray], *rows: np.ndarray) -> np.ndarray:
        """A function of sorted values, their weights, and rows."""
        parts = [slice(start, start + ROWS) for start in range(0, max(len(self.given), 1), ROWS)]
        return np.concatenate([f(*self._points(part), *[x[part] for x in rows]) for part in parts])

    def _grids(self, part: slice) -> Iterator[tuple[int, float, Density, Any]]:
        """The grids that count, with the density, and its contexts for some rows."""
        first, given = len(self.column.values), self.given[part]
        for i, grid in enumerate(self.column.grids):
            assert self.density is not None
            if self.shares[part, first + i].max(initial=0) > LEAST:
                modes = np.full((len(given), 1), first + i)
                yield i, grid, self.density, self.encoder.context(modes, given)

    def _points(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Sorted values and weights that stand for the distribution of each row."""
        import scipy.interpolate  # as JAX does
        import scipy.special

        column, shares = self.column, self.shares[part]
        atoms = np.array(column.values, float)
        values = [np.broadcast_to(atoms, (len(shares), len(atoms)))]
        weights = [shares[:, : len(atoms)]]
        nodes, fine = (np.linspace(-FURTHEST, FURTHEST, n) for n in (NODES, FINE))
        levels, bell = jnp.asarray(scipy.special.ndtr(nodes)), np.exp(-0.5 * fine**2)
        for i, _, density, context in self._grids(part):
            z = np.asarray(density.quantile(levels, context=context), float).reshape(-1, NODES)
            z = scipy.interpolate.PchipInterpolator(nodes, z, axis=1)(fine)
            y = column.round_down(z * column.scale + column.center, i)
            y = np.broadcast_to(np.clip(y, column.low, column.high), (len(shares), FINE))
            values.append(y)
            weights.append(shares[:, [len(atoms) + i]] * bell / bell.sum())
        values, weights = np.concatenate(values, 1), np.concatenate(weights, 1)
        order = np.argsort(values, axis=1)
        return np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The expected value of each row."""
    return np.sum(values * weights, axis=1)


def quantiles(levels: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of points: the first value of each row up to which the weights reach a level."""

    def of_points(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights, axis=1)
        at = [np.sum(below < level, axis=1) for level in levels]
        at = np.minimum(np.stack(at, 1), values.shape[1] - 1)
        return np.take_along_axis(values, at, 1)

    return of_points


def crps(values: np.ndarray, weights: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`E|Y - y| - E|Y - Y'| / 2` of each row."""
    below = np.cumsum(weights, axis=1) - weights / 2
    spread = np.sum(weights * values * (2 * below - 1), axis=1)
    return np.sum(weights * np.abs(values - y[:, None]), axis=1) - spread


def _target(encoder: Encoder) -> Column:
    column = encoder.columns[0]
    if len(encoder.columns) > 1 or column.kind == "categorical":
        kinds = {column.name: column.kind for column in encoder.columns}
        raise ValueError(
            f"{arg('frame')} predictions need one modelled column, of numbers; got {kinds}. Train "
            "with given= all others."
        )
    if column.circle is not None:
        raise ValueError(
            f"{arg('frame')} predictions need an ordered column; {column.name!r} is periodic. Draw "
            "samples of it."
        )
    return column


_log_shares: Callable[..., Any] = jax.jit(
    lambda network, given: jax.vmap(lambda row: network.logits(jnp.zeros(network.bias.shape), row))(
        given
    )
)
