"""The distribution of one modelled number given the other columns.

It is a mixture of atoms, which are repeated numbers, and of a density for each grid. A density of
one number has exact levels and quantiles, one solve each. So the quantile of atoms and one grid
takes the levels at the atoms, and then one quantile of the density; `several_grids.py` searches for
that of several grids. Means and scores are sums over points of the curve of level and value, which
are dense where it is steep and where it is flat.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._checks.arguments import floating_dtype
from jaxode._checks.caller import arg
from jaxode._checks.errors import SolveError, first_row
from jaxode.density.density import Density
from jaxode.tabular import frames
from jaxode.tabular.categorical import Autoregressive
from jaxode.tabular.columns.column import Column
from jaxode.tabular.encoding import Encoder, read
from jaxode.tabular.predictions import several_grids
from jaxode.tabular.predictions.curves import (
    CURVE_DEVIATIONS,
    POINTS_PER_ROUND,
    points_between,
    refined,
)
from jaxode.tabular.predictions.several_grids import GridMixture

CURVE_NODES = 33  # quantiles of a curve before refinement
CURVE_ROUNDS = 3  # rounds of refinement of a curve
MIN_GRID_SHARE = 1e-6  # probability below which a grid does not count
LOWEST_LEVEL = 1e-30  # least level to solve for: single precision holds it
TAIL_ROUNDING = 0.01  # relative change of a tail that rounding its level may cause
INFINITE_FROM = 1e30  # scaled numbers beyond this count as infinite
ROWS_OF_PREDICTION = 1000  # rows that are predicted together
ROWS_MULTIPLE = 64  # refine multiples of this many rows, so that few sizes compile


class Grid(NamedTuple):
    """The density of the numbers on a grid, in some rows."""

    index: int
    rows: np.ndarray
    """`[rows]`: the places of the rows in the frame."""
    share: np.ndarray
    """`[rows]`: the probability of the grid."""
    context: Any

    def take(self, rows: np.ndarray) -> "Grid":
        """The grid in the chosen ones of these rows."""
        context = None if self.context is None else self.context[rows]
        return Grid(self.index, self.rows[rows], self.share[rows], context)


class Predictive:
    """The distributions of a column in the rows of a frame."""

    def __init__(
        self,
        encoder: Encoder,
        categories: Autoregressive | None,
        density: Density | None,
        frame: Any,
    ):
        self.column, self.encoder, self.density = _target(encoder), encoder, density
        self.frame = frames.as_frame("frame", frame)
        self.features = encoder.features(self.frame)
        self.atoms = np.array(self.column.values, float)
        shares = np.ones((len(self.features), self.column.present))
        if categories is not None:
            shares = np.exp(np.asarray(_log_shares(categories, self.features), float))
            if (wrong := ~np.isfinite(shares).all(axis=1)).any():
                raise self._failure(int(np.argmax(wrong)))
        shares = shares[:, : self.column.present]
        self.shares = shares / shares.sum(axis=1, keepdims=True)

    def values(self) -> np.ndarray:
        """The value of each row."""
        name = self.column.name
        values, missing, text = read("frame", self.frame, self.column)
        if text:
            raise TypeError(f"{arg('frame')} column {name!r} must hold numbers, as in training.")
        first_row(
            missing,
            lambda row: (
                f"{arg('frame')} column {name!r} must have a value in each row; got a missing one "
                f"in row {row}. Leave the row out."
            ),
        )
        return values.astype(float)

    def in_units_of_data(self, y: np.ndarray) -> np.ndarray:
        """Numbers in the units of the data, or dates."""
        return y if self.column.dates is None else self.column.dates.moments(y)

    def refuse_dates(self) -> None:
        """Raise for a column of dates, which have no unit to add or to measure in."""
        if self.column.dates is not None:
            raise ValueError(
                f"{arg('frame')} means and scores need a column of numbers; got the dates "
                f"{self.column.name!r}. Take quantile(0.5, frame) or cdf(frame)."
            )

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """The probability of at most `y`."""
        return self._cdf(slice(0, None), y[:, None])[:, 0]

    def quantile(self, levels: np.ndarray, name: str = "q") -> np.ndarray:
        """The least numbers that reach these levels of the argument `name`, `[rows, levels]`."""
        if not levels.size:
            return np.zeros((len(self.features), 0))
        if self.column.grids:
            _check_tails(name, levels)
        # Errors of solves may swap quantiles at levels that are hardly apart.
        order = np.argsort(levels)
        y = self._in_chunks(lambda chunk: self._quantiles(chunk, levels[order]))
        return np.maximum.accumulate(y, axis=1)[:, np.argsort(order)]

    def integrate(self, f: Callable[..., np.ndarray], *rows: np.ndarray) -> np.ndarray:
        """Call `f` with sorted values, their weights, and these arrays `[rows, ...]`, in chunks."""
        return self._in_chunks(lambda chunk: f(*self._points(chunk), *[x[chunk] for x in rows]))

    def _in_chunks(self, f: Callable[[slice], np.ndarray]) -> np.ndarray:
        """Call `f` with chunks of rows, and join its results."""
        starts = range(0, max(len(self.features), 1), ROWS_OF_PREDICTION)
        return np.concatenate([f(slice(start, start + ROWS_OF_PREDICTION)) for start in starts])

    def _grids(self, chunk: slice) -> list[Grid]:
        """The grids with a probability that counts in these rows."""
        first, features = len(self.atoms), self.features[chunk]
        shares = self.shares[chunk, first:].T
        indices = [i for i, share in enumerate(shares) if share.max(initial=0) > MIN_GRID_SHARE]
        modes = [np.full((len(features), 1), first + i) for i in indices]
        rows = np.arange(len(self.features))[chunk]
        return [
            Grid(i, rows, shares[i], self.encoder.context(mode, features))
            for i, mode in zip(indices, modes, strict=True)
        ]

    def _cdf(self, chunk: slice, y: np.ndarray) -> np.ndarray:
        """The probability of at most `y`, `[rows, numbers]`."""
        grids = self._grids(chunk)
        mixture = self._mixture(chunk, grids)
        mixture = mixture._replace(atoms=mixture.atoms[:, None], shares=mixture.shares[..., None])
        scaled = mixture.ends_of_cells(y)
        levels = [self._levels(grid, x) for grid, x in zip(grids, scaled, strict=True)]
        return np.clip(mixture.level(y, np.array(levels).reshape(-1, *y.shape)), 0.0, 1.0)

    def _quantiles(self, chunk: slice, levels: np.ndarray) -> np.ndarray:
        """The quantiles of the rows of a chunk, `[rows, levels]`. Levels are sorted."""
        grids = self._grids(chunk)
        if len(grids) > 1:
            return self._searched(chunk, grids, levels)
        if grids and not len(self.atoms):
            return self._numbers(grids[0], levels)
        probability = self.shares[chunk, : len(self.atoms)]
        at_most = self._cdf(chunk, np.broadcast_to(self.atoms, probability.shape))
        below = at_most - probability
        next_atom = np.sum(at_most[:, None] < levels[:, None], axis=2)
        bounds = np.concatenate([[-np.inf], self.atoms, [np.inf]])
        low, high = bounds[next_atom], bounds[next_atom + 1]
        if not grids:  # rounding may keep the sum of all atoms below a level
            return np.where(np.isfinite(high), high, low)
        # The next atom is the quantile if all numbers below it do not reach the level.
        below = np.concatenate([below, np.full((len(below), 1), np.inf)], axis=1)
        is_atom = np.take_along_axis(below, next_atom, 1) < levels
        # Else take the atoms below out of the level: what is left is a level of the density.
        atoms_below = np.cumsum(np.pad(probability, ((0, 0), (1, 0))), axis=1)
        level_of_number = levels - np.take_along_axis(atoms_below, next_atom, 1)
        level_of_number /= np.maximum(grids[0].share, MIN_GRID_SHARE)[:, None]
        y = self._numbers(grids[0], np.where(is_atom, 0.5, level_of_number))
        return np.where(is_atom, high, np.clip(y, low, high))

    def _searched(self, chunk: slice, grids: list[Grid], levels: np.ndarray) -> np.ndarray:
        """Search between the least and the largest quantile of the atoms and each grid."""
        unit = self.column.grids[-1]
        spread_levels = several_grids.wide_enough(levels)
        x = np.stack([self._solved_quantiles(grid, _clipped(spread_levels)) for grid in grids])
        rows, count = x.shape[1], len(levels)
        quantiles = [self._rounded(grid, x[i, :, :count]) for i, grid in enumerate(grids)]
        quantiles += [np.full((rows, count), atom) for atom in self.atoms]
        low, high = np.min(quantiles, axis=0) - unit, np.max(quantiles, axis=0)
        lines = several_grids.Lines.of_quantiles(x, spread_levels)
        lines = several_grids.Lines(*(leaf[..., :count].reshape(len(grids), -1) for leaf in lines))
        row = np.repeat(np.arange(rows), count)

        def solve(numbers: np.ndarray, x: np.ndarray) -> np.ndarray:
            return np.stack([
                self._levels(grid.take(row[numbers]), x_of_grid[:, None])[:, 0]
                for grid, x_of_grid in zip(grids, x, strict=True)
            ])  # fmt: skip

        mixture, interval = (
            self._mixture(chunk, grids).take(row),
            (low.reshape(-1), high.reshape(-1)),
        )
        y = several_grids.quantiles(mixture, np.tile(levels, rows), lines, interval, solve)
        return y.reshape(rows, count)

    def _mixture(self, chunk: slice, grids: list[Grid]) -> GridMixture:
        """The probabilities of atoms and grids in each row."""
        shares, first = self.shares[chunk], len(self.atoms)
        indices = [grid.index for grid in grids]
        return GridMixture(self.column, shares[:, :first], shares[:, first:].T[indices], indices)

    def _numbers(self, grid: Grid, levels: np.ndarray) -> np.ndarray:
        """The numbers on a grid at levels, of all rows or `[rows, levels]` of each."""
        return self._rounded(grid, self._solved_quantiles(grid, _clipped(levels)))

    def _rounded(self, grid: Grid, x: np.ndarray) -> np.ndarray:
        """The numbers in whose cells these scaled ones lie."""
        column = self.column
        y = column.round_down(x * column.scale + column.center, grid.index)
        return np.clip(y, column.low, column.high)

    def _solved_quantiles(self, grid: Grid, levels: np.ndarray) -> np.ndarray:
        """Scaled numbers `[rows, levels]`."""
        density, rows = self.density, len(grid.share)
        assert density is not None
        q, paired = jnp.asarray(levels), levels.ndim > 1
        x = self._solved(lambda c: density.quantile(q, context=c, paired=paired), grid)
        return np.broadcast_to(x, (rows, levels.shape[-1]))

    def _levels(self, grid: Grid, x: np.ndarray) -> np.ndarray:
        """The levels of scaled numbers `[rows, numbers]` in the density of a grid."""
        x = np.where(np.abs(x) < INFINITE_FROM, x, np.copysign(np.inf, x))
        density, numbers = self.density, jnp.asarray(x)[..., None]
        assert density is not None
        context = None if grid.context is None else grid.context[:, None]
        grid = grid._replace(context=context)
        return self._solved(lambda c: density.cdf(numbers, context=c), grid)

    def _solved(self, solve: Callable[[Any], Any], grid: Grid) -> np.ndarray:
        """Solve in a context. If that fails, name the row of the frame."""
        try:
            solution = np.asarray(solve(grid.context), float)
        except SolveError:
            if not self.encoder.given:
                raise
            solution = np.asarray(jax.jit(solve)(grid.context), float)  # with NaN where it fails
        failed = np.isnan(solution)
        if failed.any():
            raise self._failure(int(grid.rows[np.argwhere(failed)[0, 0]]))
        return solution

    def _failure(self, row: int) -> SolveError:
        """Name the row, and the given number that is furthest from those of training."""
        distances = [(0.0, "")]  # of categories
        for column in self.encoder.given:
            if column.kind != "categorical":
                values, missing, _ = read("frame", self.frame, column)
                distance = 0.0 if missing[row] else abs(float(column.scaled(values[row])))
                distances.append(
                    (distance, f", column {column.name!r} has {column.show(values[row])}")
                )
        return SolveError(
            f"{arg('frame')} must have given columns in which the distribution can be computed; "
            f"it fails in row {row}{max(distances)[1]}. Leave the row out, or correct it."
        )

    def _points(self, chunk: slice) -> tuple[np.ndarray, np.ndarray]:
        """Sorted values and weights that stand for the distribution of each row."""
        shares = self.shares[chunk]
        values = [np.broadcast_to(self.atoms, (len(shares), len(self.atoms)))]
        weights = [shares[:, : len(self.atoms)]]
        for grid in self._grids(chunk):
            x, weight = points_between(*self._curve(grid))
            values.append(self._rounded(grid, x))
            weights.append(grid.share[:, None] * weight)
        values, weights = np.concatenate(values, 1), np.concatenate(weights, 1)
        order = np.argsort(values, axis=1)
        return np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1)

    def _curve(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """Levels and scaled numbers, `[rows, points]` in order."""
        from scipy.special import ndtr  # as JAX does

        q = ndtr(np.linspace(-CURVE_DEVIATIONS, CURVE_DEVIATIONS, CURVE_NODES))
        # Errors of solves may swap quantiles of a narrow peak.
        x = np.maximum.accumulate(self._solved_quantiles(grid, q), axis=1)
        q = np.broadcast_to(q, x.shape)
        for i in range(CURVE_ROUNDS):
            more, coarse = refined(q, x)
            rows = np.flatnonzero(coarse | (i == 0))
            if not len(rows):
                break
            # Pad with repeats: few batch sizes compile.
            rows = np.resize(rows, min(len(x), -(-len(rows) // ROWS_MULTIPLE) * ROWS_MULTIPLE))
            # The other rows repeat their last points, which have no weight.
            new_x, new_q = (np.repeat(leaf[:, -1:], POINTS_PER_ROUND, axis=1) for leaf in (x, q))
            new_x[rows] = _stored(more[rows])
            new_q[rows] = self._levels(grid.take(rows), new_x[rows])
            q, x = np.concatenate([q, new_q], 1), np.concatenate([x, new_x], 1)
            order = np.argsort(x, axis=1)
            x, q = (np.take_along_axis(leaf, order, 1) for leaf in (x, q))
            q = np.maximum.accumulate(q, axis=1)
        return q, x


def _check_tails(name: str, levels: np.ndarray) -> None:
    """Raise for levels so close to 1 that the precision of the density rounds them too far."""
    wrong = np.abs(_stored(levels) - levels) > TAIL_ROUNDING * np.minimum(levels, 1 - levels)
    first_row(
        wrong,
        lambda i: (
            f"{arg(name)} must be of levels that {floating_dtype(float)} tells apart from 1; got "
            f"{levels[i]:.17g}. Take one further from 1."
        ),
    )


def _eps() -> float:
    """The spacing of the density's floats above 1."""
    return float(jnp.finfo(floating_dtype(float)).eps)


def _clipped(levels: np.ndarray) -> np.ndarray:
    """Levels clipped to those that the density tells apart from 0 and 1."""
    return np.clip(levels, LOWEST_LEVEL, 1 - _eps() / 2)


def _stored(x: np.ndarray) -> np.ndarray:
    """Numbers in the precision of the density."""
    return x.astype(floating_dtype(x.dtype)).astype(float)


def _target(encoder: Encoder) -> Column:
    """The one modelled column. Raises unless it holds numbers on a line."""
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
    lambda network, features: jax.vmap(
        lambda row: network.logits(jnp.zeros(sum(network.sizes)), row)
    )(features)
)
