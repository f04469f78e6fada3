"""Rows of a frame as arrays: modes, cells, and the features of the given columns."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.caller import arg
from jaxode.density.maps.box import Box
from jaxode.density.table import Rows, Table
from jaxode.tabular import frames
from jaxode.tabular.columns import Column

INSIDE = 1e-6  # how far a number stays from a bound, in standard deviations


class Encoded(NamedTuple):
    """The rows of a frame. Numbers are standardized."""

    modes: np.ndarray
    """`[rows, columns]`, those of all modelled columns; -1 where a value is not known."""
    low: np.ndarray
    """`[rows, numbers]`, the lower ends of cells."""
    width: np.ndarray
    fill: np.ndarray
    """Whether a row has no number there."""
    given: np.ndarray
    """`[rows, features]`."""


class Numbers(NamedTuple):
    """What the flow trains on: cells, and stand-ins where there is no number."""

    x: Any
    width: Any
    fill: Any
    context: Any


@dataclass(frozen=True)
class Encoder:
    """How frames become arrays, and samples a frame."""

    like: Any
    """No rows of the training frame."""
    columns: tuple[Column, ...]
    given: tuple[Column, ...]

    @cached_property
    def discrete(self) -> list[int]:
        """Columns with more than one mode."""
        return [i for i, column in enumerate(self.columns) if column.modes > 1]

    @cached_property
    def numbers(self) -> list[int]:
        """Columns with numbers."""
        return [i for i, column in enumerate(self.columns) if column.grids]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many modes the discrete columns have."""
        return tuple(self.columns[i].modes for i in self.discrete)

    @cached_property
    def box(self) -> Box | None:
        """The bounds of the standardized numbers."""
        columns = [self.columns[i] for i in self.numbers]
        low = [(c.low - c.center) / c.scale for c in columns]
        high = [(c.high + c.grids[-1] - c.center) / c.scale for c in columns]
        if not np.isfinite([low, high]).any():
            return None
        return Box(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))

    def encode(self, frame: Any, name: str = "frame", *, missing: bool = False) -> Encoded:
        """All columns of a frame; with `missing`, values may be missing that never were."""
        n = len(frame)
        modes, numbers = np.zeros((n, len(self.columns)), np.int32), []
        for i, column in enumerate(self.columns):
            modes[:, i], x = self._column(name, frame, column, allow_missing=missing)
            if column.grids:
                numbers.append(self._cells(column, modes[:, i], x))
        parts = [np.stack(p, 1) if p else np.zeros((n, 0)) for p in zip(*numbers, strict=True)]
        low, width, fill = parts or [np.zeros((n, 0))] * 3
        given = self.features(frame, name)
        low, width = low.astype(np.float32), width.astype(np.float32)
        return Encoded(modes, low, width, fill.astype(bool), given)

    def features(self, frame: Any, name: str) -> np.ndarray:
        """The given columns as numbers of order one."""
        parts = [np.zeros((len(frame), 0))]
        for column in self.given:
            mode, x = self._column(name, frame, column)
            if column.kind == "categorical":
                parts.append(np.eye(column.modes)[mode])
            else:
                is_number = column.is_number(mode)
                parts.append(np.where(is_number, (x - column.center) / column.scale, 0.0)[:, None])
                if column.missing:
                    parts.append(~is_number[:, None])
        return np.concatenate(parts, 1, dtype=np.float32)

    def _column(
        self, name: str, frame: Any, column: Column, allow_missing: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        if column.name not in frame.columns:
            raise ValueError(
                f"{arg(name)} must have the column {column.name!r}; got {frame.columns}."
            )
        values, missing, dtype = frames.read(name, frame, column.name)
        if (dtype == "Category") != (column.kind == "categorical" and column.strings):
            raise TypeError(
                f"{arg(name)} column {column.name!r} must have the type it had in training, "
                f"{'categories' if column.strings else 'numbers'}; got {frame[column.name].dtype}."
            )
        if missing.any() and not (column.missing or allow_missing):
            raise ValueError(
                f"{arg(name)} column {column.name!r} had no missing values in training; got one in "
                f"row {np.flatnonzero(missing)[0]}. Leave such rows out, or fill them in."
            )
        mode, x = column.encode(values, missing)
        unknown = (mode < 0) & ~missing
        if unknown.any():
            row = int(np.flatnonzero(unknown)[0])
            cure = "Train with other=, which pools rare categories, " if dtype == "Category" else ""
            raise ValueError(
                f"{arg(name)} column {column.name!r} must hold values that were in training; got "
                f"{values[row]!r} in row {row}. {cure}{'or l' if cure else 'L'}eave such rows out."
            )
        outside = ~missing & ((x < column.low) | (x > column.high))
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"{arg(name)} column {column.name!r} must lie within its bounds, {column.low:g} to "
                f"{column.high:g}; got {values[row]:g} in row {row}."
            )
        return mode, x

    def _cells(self, column: Column, mode: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
        low, width = column.cells(mode, x)
        width = np.minimum(width, column.high + column.grids[-1] - low)
        ends = (
            np.array([column.low, column.high + column.grids[-1]]) - column.center
        ) / column.scale
        low = np.clip((low - column.center) / column.scale, ends[0] + INSIDE, ends[1] - INSIDE)
        return low, width / column.scale, ~column.is_number(mode)

    def context(self, modes: np.ndarray, given: np.ndarray) -> np.ndarray | None:
        """What the flow is conditional on: indicators of the modes, and the features."""
        parts = [np.eye(self.columns[i].modes)[modes[:, i]] for i in self.discrete]
        together = np.concatenate([*parts, given], 1, dtype=np.float32)
        return together if together.shape[1] else None

    def log_units(self, modes: np.ndarray) -> np.ndarray:
        """What to add to log-densities of standardized cells, for the units of the data."""
        total = np.zeros(len(modes))
        for i, column in enumerate(self.columns):
            if column.kind == "continuous" and column.resolution:
                present = modes[:, i] < column.modes - column.missing
                total -= np.where(present, np.log(column.resolution), 0.0)
            elif column.grids and not column.grids[-1]:
                total -= np.where(column.is_number(modes[:, i]), np.log(column.scale), 0.0)
        return total

    def decode(self, modes: np.ndarray, x: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The values of the modelled columns."""
        draw, data = np.random.default_rng(seed), {}
        for i, column in enumerate(self.columns):
            numbers = np.zeros(len(modes))
            if column.grids:
                numbers = x[:, self.numbers.index(i)].astype(float) * column.scale + column.center
            data[column.name] = column.decode(modes[:, i], numbers, draw)
        return data


@dataclass(frozen=True)
class Cells(Table):
    """Rows to train on, with noise in the cells."""

    box: Box | None = None

    @property
    def has_noise(self) -> bool:
        return bool(self.rows.width.any() or self.rows.fill.any())

    def noisy(self, rows: Any, key: PRNGKeyArray) -> Rows:
        return Rows(with_noise(self.box, rows, key)[0], rows.context)


def with_noise(
    box: Box | None, rows: Numbers, key: PRNGKeyArray
) -> tuple[Float[Array, "rows numbers"], Float[Array, " rows"]]:
    """The numbers with noise, and its log-density."""
    cell_key, fill_key = jax.random.split(key)
    x, width, fill = (jnp.asarray(part) for part in (rows.x, rows.width, rows.fill))
    noise = jax.random.uniform(cell_key, x.shape, minval=1e-6)
    in_cell, log_cell = x + width * noise, -jnp.log(jnp.where(width > 0, width, 1.0))
    v = jax.random.normal(fill_key, x.shape)
    stand_in, slope = bounded(box, v)
    log_fill = -0.5 * v**2 - 0.5 * jnp.log(2 * jnp.pi) + slope
    return jnp.where(fill, stand_in, in_cell), jnp.sum(jnp.where(fill, log_fill, log_cell), axis=1)


def bounded(box: Box | None, v: Float[Array, "rows numbers"]) -> tuple[Array, Array]:
    """Numbers within the bounds, and `log |dv/dx|` of each."""
    if box is None:
        return v, jnp.zeros_like(v)
    return jax.vmap(jax.vmap(lambda low, high, v: Box(low, high).forward(v)), (None, None, 0))(
        box.low, box.high, v
    )


def unbounded(box: Box | None, x: Float[Array, "rows numbers"]) -> Array:
    """The inverse of `bounded`."""
    if box is None:
        return x
    each = jax.vmap(lambda low, high, x: Box(low, high).inverse(x)[0])
    return jax.vmap(each, (None, None, 0))(box.low, box.high, x)
