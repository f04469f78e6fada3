"""The density of a table, conditional on some of its columns."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from jaxode._checks.arguments import integer, non_negative
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode.density.bind import Density
from jaxode.tabular import categorical, frames
from jaxode.tabular.categorical import Categories
from jaxode.tabular.columns import Column
from jaxode.tabular.encoding import Encoded, Encoder, Numbers, with_noise
from jaxode.tabular.impute import impute

NODES, FINE, FURTHEST = 25, 257, 4.5  # of a predictive distribution, in the base of the flow
DRAWS = 8  # of the noise, in the log-probability of a row


@dataclass(frozen=True)
class Table:
    """The distribution of the modelled columns of a frame, given others. Made by `tabular.fit`.

    Frames are of pandas, polars or pyarrow; samples are of the kind and types of the training
    frame. For one numeric column given others: `cdf`, `quantile`, `interval`, `crps`, `mean`.
    """

    encoder: Encoder
    categories: Categories | None
    """The probabilities of categories, of missing values, and of numbers that are repeated."""
    density: Density | None
    """That of standardized numbers plus noise in their cells, conditional on `context`."""
    moments: tuple[np.ndarray, np.ndarray] | None

    @property
    def kinds(self) -> dict[str, str]:
        """ "categorical", "integer" or "continuous", by column; those of given columns, too."""
        return {c.name: c.kind for c in (*self.encoder.columns, *self.encoder.given)}

    @public("Table.log_prob")
    def log_prob(
        self, frame: Any, *, draws: int = DRAWS, key: PRNGKeyArray | None = None
    ) -> Float[np.ndarray, " rows"]:
        """The log-probability of each row, in nats, given its given columns.

        A density per unit of continuous columns; a probability of all else. Integers and decimals
        are integrated over their cells, and what has no number over its stand-in: by the mean over
        `draws` of the noise. It is at most the log-probability on average, and close to it.

        Args:
            frame: all modelled and given columns.
            draws: of the noise, for each row.
            key: draws it. The same noise at each call by default.

        Returns:
            `[rows]`. Minus infinity for an integer of a column of few integers that never had it.

        Raises:
            TypeError, ValueError: for a column that is not as in training, or an unseen category.
        """
        rows = self.encoder.encode(frames.as_frame("frame", frame))
        total = self._log_modes(rows) + self.encoder.log_units(rows.modes)
        if self.density is not None:
            draws = integer("draws", draws)
            noise_key = jax.random.key(0) if key is None else check_key(key)
            total = total + self._log_numbers(self.density, rows, draws, noise_key)
        return np.where((rows.modes < 0).any(axis=1), -np.inf, total)

    def _log_modes(self, rows: Encoded) -> np.ndarray:
        if self.categories is None:
            return np.zeros(len(rows.modes))
        modes = rows.modes[:, self.encoder.discrete]
        return np.asarray(categorical.log_probs(self.categories, modes, rows.given), float)

    def _log_numbers(
        self, density: Density, rows: Encoded, draws: int, key: PRNGKeyArray
    ) -> np.ndarray:
        if not (rows.width.any() or rows.fill.any()):
            draws = 1
        numbers = Numbers(
            rows.low, rows.width, rows.fill, self.encoder.context(rows.modes, rows.given)
        )
        numbers = jax.tree.map(lambda leaf: np.repeat(leaf, draws, axis=0), numbers)
        x, log_noise = with_noise(self.encoder.box, numbers, key)
        weights = density.log_prob(x, context=numbers.context) - log_noise
        if self._single:  # without a number there is nothing that the flow could say
            weights = jnp.where(jnp.asarray(numbers.fill[:, 0]), 0.0, weights)
        weights = jax.nn.logsumexp(weights.reshape(-1, draws), axis=1) - math.log(draws)
        return np.asarray(weights, float)

    @public("Table.sample")
    def sample(self, key: PRNGKeyArray, n: int = 1, given: Any = None) -> Any:
        """Draw rows: a frame like that of training.

        Args:
            key: draws them.
            n: how many; with given columns, how many for each row of `given`.
            given: a frame with the given columns, if there are any.

        Returns:
            `n` rows, or `n` for each row of `given`, one row after the other, with those columns.
        """
        n = integer("n", n, 0)
        names = [column.name for column in self.encoder.given]
        if (given is None) == bool(names):
            raise ValueError(
                f"{arg('given')} must be a frame with the given columns {names}, and is left out "
                f"where there are none; got {type(given).__name__}."
            )
        check_key(key)
        if given is None:
            features, count = np.zeros((n, 0), np.float32), n
        else:
            given = frames.as_frame("given", given)
            features = np.repeat(self.encoder.features(given, "given"), n, axis=0)
            count = len(features)
        modes, x, seed = self._draw(key, features)
        data = self.encoder.decode(modes, x, seed)
        rows = np.repeat(np.arange(count // max(n, 1)), n)
        if given is not None:
            for name in names:
                data[name] = np.array(given[name].to_list(), object)[rows]
        like = self.encoder.like
        return frames.make(like, {name: data[name] for name in like.columns})

    def _draw(self, key: PRNGKeyArray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        mode_key, number_key, seed_key = jax.random.split(key, 3)
        count, encoder = len(given), self.encoder
        modes, x = np.zeros((count, len(encoder.columns)), np.int32), np.zeros((count, 0))
        if self.categories is not None and count:
            known = np.full((count, len(encoder.discrete)), -1, np.int32)
            allowed = np.ones((count, sum(encoder.sizes)), np.float32)
            keys = jax.random.split(mode_key, count)
            drawn, _ = categorical.draws(self.categories, keys, given, known, allowed)
            modes[:, encoder.discrete] = drawn
        if self.density is not None and count:
            context = encoder.context(modes, given)
            x = np.asarray(self.density.sample(number_key, (count,), context=context))
        return modes, x, int(jax.random.bits(seed_key))

    @public("Table.impute")
    def impute(self, key: PRNGKeyArray, frame: Any, n: int = 1) -> Any:
        """Fill in missing values: draws from the model, conditional on the rest of the row.

        Of 32 proposals for each row, one is drawn by its importance weight. Values must be missing
        at random: that one is missing says nothing about it. Given columns stay as they are.

        Args:
            key: draws them.
            frame: all modelled and given columns.
            n: how many times, for each row.

        Returns:
            A frame of `n` copies of each row, one row after the other, without missing values.
        """
        frame, n = frames.as_frame("frame", frame), integer("n", n)
        rows = self.encoder.encode(frame, missing=True)
        rows = jax.tree.map(lambda leaf: np.repeat(leaf, n, axis=0), rows)
        modes, x, seed = impute(self, check_key(key), rows)
        drawn = self.encoder.decode(modes, x, seed)
        copies, data = np.repeat(np.arange(len(frame)), n), {}
        for name in frame.columns:
            values = np.array(frame[name].to_list(), object)[copies]
            if name in drawn:
                missing = frames.read("frame", frame, name).missing[copies]
                values[missing] = drawn[name][missing]
            data[name] = values
        return frames.make(frame, data)

    @property
    def _density(self) -> Density:
        assert self.density is not None  # of a column with grids
        return self.density

    @cached_property
    def _single(self) -> bool:
        return len(self.encoder.columns) == 1

    def _target(self) -> Column:
        column = self.encoder.columns[0]
        if not self._single or column.kind == "categorical":
            raise ValueError(
                f"{arg('frame')} predictions need one modelled column of numbers; got "
                f"{ {c.name: c.kind for c in self.encoder.columns} }. Train with given= all others."
            )
        return column

    @public("Table.cdf")
    def cdf(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The probability of at most the value in each row, given the others: the PIT value.

        Of a value that is not missing. For integers it counts the value itself.
        """
        column, frame = self._target(), frames.as_frame("frame", frame)
        y, given = self._values(frame), self.encoder.features(frame, "frame")
        shares = self._shares(given)
        total = np.zeros(len(y))
        for i, value in enumerate(column.values):
            total += np.where(value <= y, shares[:, i], 0.0)
        for i, grid in enumerate(column.grids):
            end = column.round_down(y, i)
            end = column.cells(np.full(len(y), len(column.values) + i), end)[1] + end if grid else y
            context = self._context_of(len(column.values) + i, given)
            z = jnp.asarray((end - column.center) / column.scale, jnp.float32)
            total += shares[:, len(column.values) + i] * self._flow_cdf(z, context)
        return np.clip(total, 0.0, 1.0)

    @public("Table.quantile")
    def quantile(self, q: Any, frame: Any) -> Float[np.ndarray, "..."]:
        """The quantiles of the modelled column at levels `q`, `[rows]` or `[rows, levels]`."""
        levels = np.asarray(q, float)
        if levels.ndim > 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(
                f"{arg('q')} must be levels between 0 and 1, a number or a list; got {q}."
            )
        column, frame = self._target(), frames.as_frame("frame", frame)
        given = self.encoder.features(frame, "frame")
        flat = levels.reshape(-1)
        if not column.values and len(column.grids) == 1:
            context = self._context_of(0, given)
            z = self._density.quantile(jnp.asarray(flat, jnp.float32), context=context)
            y = np.asarray(z, float).reshape(-1, len(flat)) * column.scale + column.center
            y = np.broadcast_to(y, (len(given), len(flat)))
            y = np.clip(column.round_down(y, 0), column.low, column.high)
        else:
            values, weights = self._points(given)
            below = np.cumsum(weights, axis=1)
            at = [np.minimum((below < level).sum(axis=1), values.shape[1] - 1) for level in flat]
            y = np.stack([np.take_along_axis(values, i[:, None], 1)[:, 0] for i in at], 1)
        return y.reshape(len(given), *levels.shape)

    @public("Table.interval")
    def interval(self, level: float, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """The central prediction interval: `(low, high)`, each `[rows]`, such as of level 0.9."""
        if not 0 < non_negative("level", level) < 1:
            raise ValueError(f"{arg('level')} must be between 0 and 1; got {level}.")
        ends = self.quantile([(1 - level) / 2, (1 + level) / 2], frame)
        return ends[:, 0], ends[:, 1]

    @public("Table.mean")
    def mean(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The expected value of the modelled column in each row."""
        self._target()
        values, weights = self._points(
            self.encoder.features(frames.as_frame("frame", frame), "frame")
        )
        return np.sum(values * weights, axis=1)

    @public("Table.crps")
    def crps(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """The continuous ranked probability score of each row, in units of the column; low is good.

        `E|Y - y| - E|Y - Y'| / 2` (Gneiting and Raftery 2007).
        """
        self._target()
        frame = frames.as_frame("frame", frame)
        y = self._values(frame)
        values, weights = self._points(self.encoder.features(frame, "frame"))
        below = np.cumsum(weights, axis=1) - weights / 2
        spread = np.sum(weights * values * (2 * below - 1), axis=1)
        return np.sum(weights * np.abs(values - y[:, None]), axis=1) - spread

    def _values(self, frame: Any) -> np.ndarray:
        column = self._target()
        if column.name not in frame.columns:
            raise ValueError(
                f"{arg('frame')} must have the column {column.name!r}; got {frame.columns}."
            )
        values, missing, _ = frames.read("frame", frame, column.name)
        if missing.any():
            raise ValueError(
                f"{arg('frame')} column {column.name!r} must have a value in each row; got a "
                f"missing one in row {np.flatnonzero(missing)[0]}. Leave the row out."
            )
        return values.astype(float)

    def _shares(self, given: np.ndarray) -> np.ndarray:
        """The probability of each mode that is not missing, `[rows, modes]`."""
        column = self._target()
        count = column.modes - column.missing
        if self.categories is None:
            return np.ones((len(given), 1))
        nothing = np.zeros(column.modes, np.float32)
        logits = _logits(self.categories, nothing, given)
        shares = np.exp(np.asarray(logits, float))[:, :count]
        return shares / shares.sum(axis=1, keepdims=True)

    def _context_of(self, mode: int, given: np.ndarray) -> np.ndarray | None:
        return self.encoder.context(np.full((len(given), 1), mode), given)

    def _flow_cdf(self, z: Any, context: np.ndarray | None) -> np.ndarray:
        return np.asarray(self._density.cdf(z[:, None], context=context), float).reshape(len(z))

    def _points(self, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sorted values and weights that stand for the distribution of each row."""
        column, shares = self._target(), self._shares(given)
        values, weights = [], []
        for i, value in enumerate(column.values):
            values.append(np.full((len(given), 1), value))
            weights.append(shares[:, i : i + 1])
        import scipy.interpolate  # as JAX does
        import scipy.special

        nodes, fine = (np.linspace(-FURTHEST, FURTHEST, n) for n in (NODES, FINE))
        levels, density = scipy.special.ndtr(nodes), np.exp(-0.5 * fine**2)
        for i in range(len(column.grids)):
            context = self._context_of(len(column.values) + i, given)
            z = self._density.quantile(jnp.asarray(levels, jnp.float32), context=context)
            z = np.broadcast_to(np.asarray(z, float).reshape(-1, NODES), (len(given), NODES))
            z = scipy.interpolate.PchipInterpolator(nodes, z, axis=1)(fine)
            y = column.round_down(z * column.scale + column.center, i)
            values.append(np.clip(y, column.low, column.high))
            mine = shares[:, len(column.values) + i : len(column.values) + i + 1]
            weights.append(mine * density / density.sum())
        values, weights = np.concatenate(values, 1), np.concatenate(weights, 1)
        order = np.argsort(values, axis=1)
        return np.take_along_axis(values, order, 1), np.take_along_axis(weights, order, 1)


_logits: Callable[..., Any] = jax.jit(
    lambda network, one_hot, given: jax.vmap(lambda row: network.logits(one_hot, row))(given)
)
