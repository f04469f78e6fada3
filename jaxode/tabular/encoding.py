"""Rows of a frame as arrays: modes, cells, and the features of the given columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row
from jaxode._jax.closure import compiled
from jaxode.density.maps.box import Box
from jaxode.density.noise import in_unit
from jaxode.tabular import frames
from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.periodic import TURN
from jaxode.training.sources import Rows


class Encoded(NamedTuple):
    """The rows of a frame. Numbers are scaled to order one."""

    modes: np.ndarray
    """`[rows, columns]`: the modes of modelled columns; -1 for a value that was not in training."""
    low: np.ndarray
    """`[rows, numbers]`: the lower ends of the cells of numbers."""
    width: np.ndarray
    """`[rows, numbers]`: the widths of these cells."""
    fill: np.ndarray
    """`[rows, numbers]`: the mask of values without a number."""
    features: np.ndarray
    """`[rows, features]`: the given columns, as numbers of order one."""
    log_scale: np.ndarray
    """`[rows]`: add it to a log-density to have it in the units of the data. It also has the share
    of a pooled category."""


class Domain(NamedTuple):
    """The bounds of scaled numbers, and the mask of angles."""

    box: Box | None
    angle: Bool[np.ndarray, " numbers"]


class Cells(NamedTuple):
    """Rows of numbers for the flow, as the cells that they lie in."""

    x: Any
    """`[rows, numbers]`: the lower ends."""
    width: Any
    fill: Any
    """`[rows, numbers]`: the mask of values without a number, which noise stands in for."""
    context: Any


def read(name: str, frame: Any, column: Column) -> frames.Values:
    """The values of a column, with dates as numbers."""
    if column.dates is None:
        return frames.read(name, frame, column.name)
    return column.dates.values(name, frame, column.name)


@dataclass(frozen=True)
class Encoder:
    """Encode frames as arrays, and decode samples to a frame."""

    like: Any
    """The training frame without its rows."""
    columns: tuple[Column, ...]
    given: tuple[Column, ...]

    @cached_property
    def discrete(self) -> list[int]:
        """Places of the modelled columns with more than one mode."""
        return [i for i, column in enumerate(self.columns) if column.modes > 1]

    @cached_property
    def numbers(self) -> list[int]:
        """Places of the modelled columns with numbers."""
        return [i for i, column in enumerate(self.columns) if column.grids]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of modes of each discrete column."""
        return tuple(self.columns[i].modes for i in self.discrete)

    @property
    def domain(self) -> Domain:
        """The domain of the scaled numbers."""
        circles = [self.columns[i].circle for i in self.numbers]
        return Domain(self.box, np.array([circle is not None for circle in circles], bool))

    @cached_property
    def box(self) -> Box | None:
        """The bounds of the scaled numbers, or None if there are none."""
        bounds = np.array([self.columns[i].bounds_with_noise for i in self.numbers])
        if not np.isfinite(bounds).any():
            return None
        return Box(jnp.asarray(bounds[:, 0]), jnp.asarray(bounds[:, 1]))

    def encode(self, frame: Any, name: str = "frame", *, missing: bool = False) -> Encoded:
        """Encode all columns of a frame. With `missing`, values of any column may be missing."""
        n = len(frame)
        modes, cells, log_scale = np.zeros((n, len(self.columns)), int), [], np.zeros(n)
        for i, column in enumerate(self.columns):
            mode, x = self._read(name, frame, column, missing)
            modes[:, i] = mode
            if column.grids:
                cells.append(column.cells(mode, x))
            if column.pool:
                log_scale += x
            elif column.resolution:
                log_scale -= np.log(column.resolution) * (mode < column.present)
            elif column.grids and not column.grids[-1]:
                log_scale -= np.log(column.scale) * column.is_number(mode)
        low, width, fill = np.array(cells, float).reshape(len(cells), 3, n).transpose(1, 2, 0)
        features = self.features(frame, name)
        return Encoded(modes, low, width, fill.astype(bool), features, log_scale)

    def possible(self, rows: Encoded) -> np.ndarray:
        """Mark rows whose density is not zero: training had all of their values."""
        return (rows.modes >= 0).all(axis=1) & (rows.log_scale > -np.inf)

    def features(self, frame: Any, name: str = "frame") -> np.ndarray:
        """The given columns as numbers of order one."""
        features = [np.zeros((len(frame), 0))]
        for column in self.given:
            features.append(column.features(*self._read(name, frame, column)))
        return np.concatenate(features, 1)

    def _read(
        self, name: str, frame: Any, column: Column, allow_missing: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The mode and the number of each value. Raises for values that training does not allow."""
        values, missing, text = read(name, frame, column)
        where = f"{arg(name)} column {column.name!r}"
        if text != column.text and not missing.all():
            raise TypeError(
                f"{where} must have the type it had in training, "
                f"{'categories' if column.text else 'numbers'}; got {frame[column.name].dtype}."
            )
        mode, x = column.encode(values, missing)

        def shown(row: int) -> str:
            if missing[row]:
                return "a missing one"
            if column.dates is not None:
                return str(frame[column.name].to_list()[row])
            return repr(values[row : row + 1].tolist()[0])

        def message(rule: str, row: int, cure: str) -> str:
            return f"{where} {rule}; got {shown(row)} in row {row}.{cure}"

        for rule, is_wrong, cure in _rules(column, mode, x, missing, allow_missing):
            first_row(is_wrong, lambda row, rule=rule, cure=cure: message(rule, row, cure))
        return mode, x

    def context(self, modes: np.ndarray, features: np.ndarray) -> np.ndarray | None:
        """The context of the flow: indicators of the modes, and features; None if empty."""
        indicators = [np.eye(self.columns[i].modes)[modes[:, i]] for i in self.discrete]
        context = np.concatenate([*indicators, features], 1)
        return context if context.shape[1] else None

    def as_cells(self, rows: Encoded) -> Cells:
        """The cells of rows, with their contexts."""
        return Cells(rows.low, rows.width, rows.fill, self.context(rows.modes, rows.features))

    def missing(self, modes: np.ndarray) -> np.ndarray:
        """Which values are missing."""
        present = np.array([column.present for column in self.columns])
        return (modes < 0) | (modes >= present)

    def decode(
        self, modes: np.ndarray, x: np.ndarray, seed: int, drawn: Any = True
    ) -> dict[str, np.ndarray]:
        """The values of the modelled columns, by name.

        Args:
            modes: `[rows, columns]`.
            x: scaled numbers, `[rows, numbers]`.
            seed: draws the values of pooled categories.
            drawn: the mask `[rows, columns]` of the values to decode. The others are None.
        """
        drawn = np.broadcast_to(drawn, modes.shape)
        draw = np.random.default_rng(seed)
        numbers = {i: x[:, j] for j, i in enumerate(self.numbers)}
        data = {}
        for i, column in enumerate(self.columns):
            is_drawn, values = drawn[:, i], np.full(len(modes), None, object)
            column_x = numbers.get(i, modes[:, i])
            values[is_drawn] = column.decode(modes[is_drawn, i], column_x[is_drawn], draw)
            data[column.name] = values if column.dates is None else column.dates.objects(values)
        return data


def _rules(
    column: Column, mode: np.ndarray, x: np.ndarray, missing: np.ndarray, allow_missing: bool
) -> Iterator[tuple[str, np.ndarray, str]]:
    """The rules for the values of a column, the rows that break each, and what to do there."""
    is_new, is_broken = (mode < 0) & ~missing, ~missing & (x != np.round(x))
    if not (column.missing or allow_missing):
        yield "had no missing values in training", missing, " Leave it out, or fill it in."
    if column.kind == "categorical":
        cure = " Train with other=, which pools rare ones, or leave the row out."
        yield "must hold categories that were in training", is_new, cure
        return
    if column.dates is not None and column.grids[-1:] != (0.0,):
        unit = column.dates.name_of_unit
        yield f"must hold whole {unit}, as in training", is_broken, f" Round it down to {unit}."
    if column.kind == "integer" and column.grids and column.grids[-1]:
        cure = f" Train with kinds={{{column.name!r}: 'continuous'}}, or round it."
        yield "must hold whole numbers, as in training", is_broken, cure
    bounds = f"{column.show(column.low)} to {column.show(column.high)}"
    is_outside = ~missing & ((x < column.low) | (x > column.high))
    cure = " Train with wider bounds, or leave the row out."
    yield f"must lie within its bounds, {bounds}", is_outside, cure
    if allow_missing:
        cure = " Make it missing, or leave the row out."
        yield "must hold numbers that were in training", is_new, cure


@dataclass(frozen=True)
class CellNoise:
    """Noise in the cells of rows, for training."""

    domain: Domain
    exists: bool

    @classmethod
    def from_cells(cls, domain: Domain, rows: Cells) -> "CellNoise":
        """Noise of training rows, if they have cells with a width, or stand-ins."""
        return cls(domain, bool(rows.width.any() or rows.fill.any()))

    def add(self, rows: Cells, key: PRNGKeyArray) -> Rows:
        return Rows(with_noise(self.domain, rows, key)[0], rows.context)

    def log_density(self, rows: Cells, noisy: Rows) -> float:
        return 0.0  # validations leave it out, since it does not depend on parameters


def with_noise(
    domain: Domain, rows: Cells, key: PRNGKeyArray
) -> tuple[Float[Array, "rows numbers"], Float[Array, " rows"]]:
    """The numbers with noise, and its log-density."""
    return _with_noise(*_split_domain(domain), rows.x, rows.width, rows.fill, key)


def _split_domain(domain: Domain) -> tuple[Box | None, tuple[bool, ...]]:
    """Split into arrays, which may change, and static values, for which a program is compiled."""
    return domain.box, tuple(domain.angle.tolist())


@compiled
def _with_noise(box, are_angles, x, width, fill, key):
    """One program, since shapes vary between calls, and each operation would compile by itself."""
    cell_key, fill_key = jax.random.split(key)
    x, width, fill = jnp.asarray(x), jnp.asarray(width), jnp.asarray(fill)
    in_cell = x + width * in_unit(cell_key, x, 1e-6)
    log_cell = -jnp.log(jnp.where(width > 0, width, 1.0))
    v = jax.random.normal(fill_key, x.shape)
    stand_in, slope = _into_domain(box, are_angles, v)
    log_fill = -0.5 * v**2 - 0.5 * jnp.log(2 * jnp.pi) + slope
    return jnp.where(fill, stand_in, in_cell), jnp.sum(jnp.where(fill, log_fill, log_cell), axis=1)


def into_domain(domain: Domain, v: Float[Array, "rows numbers"]) -> tuple[Array, Array]:
    """Numbers within the domain, and `log |dv/dx|` of each. Of normal `v`, angles are uniform."""
    return _into_domain(*_split_domain(domain), v)


@compiled
def _into_domain(box, are_angles, v):
    angle = np.array(are_angles)
    x, slope = (v, jnp.zeros_like(v)) if box is None else _by_number(box, Box.forward, v)
    if not angle.any():
        return x, slope
    angle_slope = -jnp.log(TURN) - jax.scipy.stats.norm.logpdf(v)
    angles = TURN * jax.scipy.special.ndtr(v)
    return jnp.where(angle[None], angles, x), jnp.where(angle[None], angle_slope, slope)


def out_of_domain(domain: Domain, x: Float[Array, "rows numbers"]) -> Array:
    """The inverse of `into_domain`, for all representatives of an angle."""
    return _out_of_domain(*_split_domain(domain), x)


@compiled
def _out_of_domain(box, are_angles, x):
    angle = np.array(are_angles)
    v = x if box is None else _by_number(box, Box.inverse, x)[0]
    if not angle.any():
        return v
    level = jnp.clip(x / TURN - jnp.floor(x / TURN), 1e-6, 1 - 1e-6)
    return jnp.where(angle[None], jax.scipy.special.ndtri(level), v)


def _by_number(box: Box, method: Any, x: Array) -> tuple[Array, Array]:
    """Apply a method of `Box` to each number of each row by itself."""
    map_numbers = jax.vmap(lambda low, high, x: method(Box(low, high), x))
    return jax.vmap(map_numbers, (None, None, 0))(box.low, box.high, x)
