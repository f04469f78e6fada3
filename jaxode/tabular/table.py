"""The density of a table, conditional on some of its columns."""

import math
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from jaxode._checks.arguments import integer, non_negative, numbers
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode._jax.precision import single_precision
from jaxode.density.density import Density
from jaxode.tabular import categorical, frames
from jaxode.tabular.categorical import Autoregressive
from jaxode.tabular.encoding import Encoded, Encoder, with_noise
from jaxode.tabular.impute import impute
from jaxode.tabular.predictions import curves
from jaxode.tabular.predictions.predictive import Predictive

NOISE_DRAWS = 8  # draws of the noise for the log-probability of a row
ROWS_OF_LOG_PROB = 10_000  # rows that are computed together


@dataclass(frozen=True)
class Table:
    """The distribution of the modelled columns of a frame, given others. Made by `tabular.fit`.

    Frames are of pandas, polars or pyarrow; samples are of the kind and types of the training
    frame. For one numeric column given others: `cdf`, `quantile`, `interval`, `crps`, `mean`.
    """

    encoder: Encoder
    categories: Autoregressive | None
    """The probabilities of categories, of missing values, and of numbers that are repeated."""
    density: Density | None
    """The density of standardized numbers with noise in their cells, given `context`."""
    moments: tuple[np.ndarray, np.ndarray] | None
    """The mean and the covariance of the numbers, which propose missing ones."""

    @property
    def kinds(self) -> dict[str, str | tuple[str, float]]:
        """ "categorical", "integer", "continuous", "date" or ("periodic", period), by column; those
        of given columns, too. Numbers of few values, modelled as such, are "categorical".
        """

        def kind_of(column):
            return column.kind if column.grids or column.dates else "categorical"

        kinds = {c.name: kind_of(c) for c in self.encoder.columns}
        kinds |= {c.name: c.kind for c in self.encoder.given}
        columns = (*self.encoder.columns, *self.encoder.given)
        return kinds | {c.name: ("periodic", c.circle.period) for c in columns if c.circle}

    @public("Table.log_prob", single_precision)
    def log_prob(
        self, frame: Any, *, draws: int = NOISE_DRAWS, key: PRNGKeyArray | None = None
    ) -> Float[np.ndarray, " rows"]:
        """The log-probability of each row, in nats, given its given columns.

        A density per unit of continuous columns and periodic decimals; a probability of all else,
        such as of a date among those of its unit.
        Integers and decimals are integrated over their cells, and what has no number over its
        stand-in: by the mean over `draws` of the noise. It is at most the log-probability on
        average, and close to it.

        Args:
            frame: all modelled and given columns; others are left alone.
            draws: of the noise, for each row.
            key: draws it. The same noise at each call by default.

        Returns:
            `[rows]`. Minus infinity for a number of a column of few numbers that never had it, and
            for an unseen category of a column with rare ones that were pooled.

        Raises:
            TypeError, ValueError: for a column that is not as in training, or an unseen category.
        """
        rows = self.encoder.encode(frames.as_frame("frame", frame))
        draws = integer("draws", draws)
        noise_key = jax.random.key(0) if key is None else check_key(key)
        log_probs = [np.zeros(0)]
        for start in range(0, len(rows.modes), ROWS_OF_LOG_PROB):
            chunk = jax.tree.map(lambda leaf, i=start: leaf[i : i + ROWS_OF_LOG_PROB], rows)
            log_probs.append(self._log_prob(chunk, draws, noise_key))
        return np.concatenate(log_probs)

    def _log_prob(self, rows: Encoded, draws: int, key: PRNGKeyArray) -> np.ndarray:
        total = rows.log_scale
        if self.categories is not None:
            modes = rows.modes[:, self.encoder.discrete]
            total = total + np.asarray(categorical.log_probs(self.categories, modes, rows.features))
        if self.density is not None:
            total = total + self._log_numbers(self.density, rows, draws, key)
        return np.where(self.encoder.possible(rows), total, -np.inf)

    def _log_numbers(
        self, density: Density, rows: Encoded, draws: int, key: PRNGKeyArray
    ) -> np.ndarray:
        if not (rows.width.any() or rows.fill.any()):
            draws = 1
        cells = self.encoder.as_cells(rows)
        # The noise of a row depends on its values, not on its place.
        keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(_seeds(rows))
        cells = jax.tree.map(lambda leaf: np.repeat(leaf, draws, axis=0), cells)
        by_row = jax.tree.map(lambda leaf: leaf.reshape(-1, draws, leaf.shape[1]), cells)
        noisy = jax.vmap(lambda cell, key: with_noise(self.encoder.domain, cell, key))
        x, log_noise = noisy(by_row._replace(context=None), keys)
        x, log_noise = x.reshape(cells.x.shape), log_noise.reshape(-1)
        weights = np.asarray(density.log_prob(x, context=cells.context) - log_noise, float)
        if len(self.encoder.columns) == 1:  # then noise stands in for the only number
            weights = np.where(cells.fill[:, 0], 0.0, weights)
        return np.logaddexp.reduce(weights.reshape(-1, draws), axis=1) - math.log(draws)

    @public("Table.sample", single_precision)
    def sample(self, key: PRNGKeyArray, n: int = 1, given: Any = None) -> Any:
        """Draw rows: a frame like that of training.

        Numbers beyond the range of the training rows are moved to its ends, with a warning if that
        is done in more than 5% of the rows. Quantiles and means are those of the density itself.

        Args:
            key: draws them.
            n: how many; with given columns, how many for each row of `given`.
            given: a frame with the given columns, if there are any.

        Returns:
            `n` rows, or `n` for each row of `given`, one row after the other, with those columns.
        """
        check_key(key)
        n = integer("n", n, 0)
        names = [column.name for column in self.encoder.given]
        if (given is None) == bool(names):
            raise ValueError(
                f"{arg('given')} must be a frame with the given columns {names}, and is left out "
                f"where there are none; got {type(given).__name__}."
            )
        features = np.zeros((1, 0))
        if given is not None:
            given = frames.as_frame("given", given)
            features = self.encoder.features(given, "given")
        rows = np.repeat(np.arange(len(features)), n)
        data = self.encoder.decode(*self._draw(key, features[rows]))
        if given is not None:
            for name in names:
                data[name] = np.array(given[name].to_list(), object)[rows]
        like = self.encoder.like
        return frames.make(like, {name: data[name] for name in like.columns})

    def _draw(self, key: PRNGKeyArray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Modes, scaled numbers, and a seed for `Encoder.decode`, for each row of features."""
        mode_key, number_key, seed_key = jax.random.split(key, 3)
        count, encoder = len(features), self.encoder
        modes, x = np.zeros((count, len(encoder.columns)), int), np.zeros((count, 0))
        if self.categories is not None and count:
            unknown = np.full((count, len(encoder.discrete)), -1)
            keys = jax.random.split(mode_key, count)
            allowed = np.ones(sum(encoder.sizes), bool)
            drawn, _ = categorical.sampled_modes(self.categories, keys, features, unknown, allowed)
            modes[:, encoder.discrete] = drawn
        if self.density is not None:
            x = np.zeros((count, len(encoder.numbers)))
            if count:
                context = encoder.context(modes, features)
                x = np.asarray(self.density.sample(number_key, (count,), context=context))
        return modes, x, int(jax.random.bits(seed_key))

    @public("Table.impute", single_precision)
    def impute(self, key: PRNGKeyArray, frame: Any, n: int = 1) -> Any:
        """Fill in missing values: draws from the model, conditional on the rest of the row.

        The copies of a row are drawn from 32 proposals, or `4 n` if that is more, by their
        importance weights. Values must be missing at random: that one is missing says nothing about
        it. Given columns stay as they are.

        Args:
            key: draws them.
            frame: all modelled and given columns.
            n: how many times, for each row.

        Returns:
            A frame of `n` copies of each row, one row after the other, without missing values;
            of pandas, with the index of the rows.

        Warns:
            UserWarning: of rows with a density of zero whatever is filled in.
        """
        frame, n = frames.as_frame("frame", frame), integer("n", n)
        rows = self.encoder.encode(frame, missing=True)
        missing = self.encoder.missing(rows.modes)
        incomplete = np.flatnonzero(missing.any(axis=1))
        rows = jax.tree.map(lambda leaf: leaf[incomplete], rows)
        modes, x, impossible = impute(self, check_key(key), rows, n)
        if impossible.any():
            warnings.warn(
                f"{arg('frame')} must have rows that are possible in the model; got a density of "
                f"zero, whatever is filled in, in {impossible.sum()} rows, such as row "
                f"{incomplete[np.argmax(impossible)]}. What is missing there is drawn without the "
                "numbers that are known. Leave the row out, or correct it.",
                stacklevel=3,
            )
        seed, is_drawn = int(jax.random.bits(key)), np.repeat(missing[incomplete], n, axis=0)
        drawn = self.encoder.decode(modes, x, seed, is_drawn)
        copies = np.repeat(np.arange(len(frame)), n)
        data = {name: np.array(frame[name].to_list(), object)[copies] for name in frame.columns}
        is_incomplete = np.isin(copies, incomplete)
        for i, column in enumerate(self.encoder.columns):
            is_missing = missing[copies, i]
            data[column.name][is_missing] = drawn[column.name][is_missing[is_incomplete]]
        return frames.make(frame, data, copies, self.encoder.like)

    def _predictive(self, frame: Any) -> Predictive:
        return Predictive(self.encoder, self.categories, self.density, frame)

    @public("Table.cdf", single_precision)
    def cdf(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The probability of at most the value in each row, given the others: the PIT value.

        Of a value that is not missing. For integers it counts the value itself. Right to about
        1e-4, the error of a solve.
        """
        predictive = self._predictive(frame)
        return predictive.cdf(predictive.values())

    @public("Table.quantile", single_precision)
    def quantile(self, q: Any, frame: Any) -> np.ndarray:
        """The least numbers that reach levels `q`: the inverse of `cdf`, `[rows]` or
        `[rows, levels]`. Dates are `datetime64` of NumPy, in wall-clock time.

        Raises:
            ValueError: for levels outside (0, 1), and those that single precision does not tell
                apart from 1.
            SolveError: naming the row, if its given numbers are too far from those of training.
        """
        levels = numbers("q", q)
        if levels.ndim > 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(
                f"{arg('q')} must be levels between 0 and 1, a number or a list; got {q}."
            )
        levels = np.asarray(levels, float)
        predictive = self._predictive(frame)
        y = predictive.in_units_of_data(predictive.quantile(levels.reshape(-1)))
        return y.reshape(len(y), *levels.shape)

    @public("Table.interval", single_precision)
    def interval(self, level: float, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """The central prediction interval: `(low, high)`, each `[rows]`, such as of level 0.9.

        Dates are `datetime64` of NumPy, in wall-clock time.
        """
        if not 0 < non_negative("level", level) < 1:
            raise ValueError(
                f"{arg('level')} must be between 0 and 1; got {level}. For 90%, pass 0.9."
            )
        levels = np.array([(1 - level) / 2, (1 + level) / 2])
        predictive = self._predictive(frame)
        low, high = predictive.in_units_of_data(predictive.quantile(levels, "level")).T
        return low, high

    @public("Table.mean", single_precision)
    def mean(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The expected value of the modelled column in each row.

        It leaves out the outermost 3.4e-6 of the probability on each side, beyond 4.5 deviations of
        the base: a mean that hangs on such tails is another.
        """
        predictive = self._predictive(frame)
        predictive.refuse_dates()
        return predictive.integrate(curves.mean)

    @public("Table.crps", single_precision)
    def crps(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The continuous ranked probability score of each row, in units of the column; low is good.

        `E|Y - y| - E|Y - Y'| / 2` (Gneiting and Raftery 2007). Of the same part of the probability
        as `mean`.
        """
        predictive = self._predictive(frame)
        predictive.refuse_dates()
        return predictive.integrate(curves.crps, predictive.values())


def _seeds(rows: Encoded) -> np.ndarray:
    """A hash of the values of each row."""
    leaves = (rows.modes, rows.low, rows.fill, rows.features)
    table = np.concatenate([np.asarray(leaf, float) for leaf in leaves], 1) + 0.0  # no -0.0
    return np.array([zlib.crc32(row.tobytes()) for row in table], np.uint32)
