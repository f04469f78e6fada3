"""The columns of a table: each value is a mode, and in some modes a number within a cell.

A mode is a category, a number that is repeated so often that it has a probability of its own, a
grid that the number lies on, or missing. A cell is the interval from a number to the next one on
its grid. The density of `number + noise`, with noise in the cell, integrates over the cell to the
probability of the number.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.columns.dates import Dates
from jaxode.tabular.columns.multiples import EPS, LARGEST_MULTIPLE, on_grid, tidy
from jaxode.tabular.columns.periodic import Circle

# Samples of a column are clipped to the training rows. Warn if more than this share is, of at
# least this many draws.
MAX_CLIPPED_SHARE = 0.05
DRAWS_TO_JUDGE = 200
# A given column of categories enters as indicators of its modes. If it has more modes than this,
# each enters as so many random numbers.
DIRECTIONS = 64
OTHER = None  # stands for rare categories among the values that are modes
DISTANCE_FROM_BOUND = 1e-6  # least distance of a number from a bound, in standard deviations


@dataclass(frozen=True)
class Column:
    """The modes of a column and the cells of its numbers."""

    name: str
    kind: str
    """"categorical", "integer", "continuous", "periodic" or "date"."""
    values: tuple[Any, ...]
    """Values that are modes, sorted."""
    grids: tuple[float, ...]
    """The spacings of grids, from coarse to fine. 0 stands for continuous numbers."""
    missing: bool
    low: float = -np.inf
    high: float = np.inf
    seen: tuple[float, float] = (-np.inf, np.inf)
    """The least and the largest number in training. Samples are clipped to them."""
    center: float = 0.0
    scale: float = 1.0
    resolution: float = 0.0
    """The spacing of the decimals that continuous or periodic numbers are rounded to, or 0."""
    text: bool = False
    """Whether the frame holds categories, not numbers."""
    pool: dict[Any, float] = field(default_factory=dict)
    """Rare values, which share the last mode of `values`, and the share of each among them."""
    circle: Circle | None = None
    """The period of a periodic column."""
    dates: Dates | None = None
    """The unit and the start of a date column."""

    @property
    def present(self) -> int:
        """The number of modes, without missing."""
        return len(self.values) + len(self.grids)

    @property
    def modes(self) -> int:
        """The number of modes: values, grids, and missing."""
        return self.present + self.missing

    @property
    def width(self) -> int:
        """The number of features of a given column."""
        if self.kind == "categorical":
            return min(self.modes, DIRECTIONS)
        turns = 0 if self.dates is None else len(self.dates.turns)
        return (1 if self.circle is None else 2) + 2 * turns + self.missing

    def features(self, mode: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The features of a given column, `[rows, width]`."""
        if self.kind == "categorical":
            if self.modes <= DIRECTIONS:
                return np.eye(self.modes)[mode]
            return np.random.default_rng(0).normal(size=(self.modes, DIRECTIONS))[mode]
        is_number, scaled = self.is_number(mode), self.scaled(x)
        if self.circle is not None:
            numbers, angles = [], [scaled]
        else:
            numbers, angles = [scaled], [] if self.dates is None else self.dates.angles(x)
        waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
        features = [np.where(is_number, feature, 0.0) for feature in (*numbers, *waves)]
        return np.stack([*features, *[~is_number] * self.missing], 1)

    def show(self, x: float) -> str:
        """A number as users know it."""
        return f"{x:g}" if self.dates is None else self.dates.show(x)

    def encode(self, values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mode of each value, or -1 if training had none for it, and its number. The number of
        a category is the logarithm of its share of its mode."""
        mode = np.full(len(values), self.modes - 1 if self.missing else -1)
        x = np.zeros(len(values))
        if self.kind == "categorical":
            codes = {value: (i, 0.0) for i, value in enumerate(self.values) if value is not OTHER}
            code_of_new = (-1, 0.0)
            if self.pool:
                pool = len(self.values) - 1
                codes |= {value: (pool, np.log(share)) for value, share in self.pool.items()}
                code_of_new = pool, -np.inf
            for row in np.flatnonzero(~missing):
                mode[row], x[row] = codes.get(values[row], code_of_new)
            return mode, x
        x = self.wrapped(np.where(missing, 0.0, values.astype(float)))
        mode_of_number = np.full(len(x), self.present - 1 if self.grids else -1)
        for i, grid in reversed(list(enumerate(self.grids[:-1]))):
            mode_of_number[on_grid(x, grid)] = len(self.values) + i
        for i, value in enumerate(self.values):
            # Another program may compute or print it with another rounding.
            mode_of_number[np.abs(x - value) <= 4 * EPS * abs(value)] = i
        return np.where(missing, mode, mode_of_number), x

    def is_number(self, mode: np.ndarray) -> np.ndarray:
        """Mark values whose mode is a grid, so that they have a number."""
        return (mode >= len(self.values)) & (mode < self.present)

    def scaled(self, x: Any) -> Any:
        """Numbers of order one."""
        return (x - self.center) / self.scale

    def wrapped(self, x: np.ndarray) -> np.ndarray:
        """Numbers in their period, if they have one."""
        return x if self.circle is None else self.circle.wrapped(x, self.resolution)

    @property
    def bounds_with_noise(self) -> tuple[float, float]:
        """The bounds of scaled numbers plus noise."""
        return self.scaled(self.low), self.scaled(self.high + self.grids[-1])

    def cells(self, mode: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lower ends and widths of scaled cells, and a mask of values without a number."""
        low, width, (first, last) = np.array(x, float), np.zeros(len(x)), self.bounds_with_noise
        for i, grid in enumerate(self.grids):
            on_this = mode == len(self.values) + i
            if grid and on_this.any():
                low[on_this], width[on_this] = self.cell(x[on_this], i)

        def distance(bound):
            return DISTANCE_FROM_BOUND * max(1.0, abs(bound)) if np.isfinite(bound) else 0.0

        # In single precision, too, the upper end of a cell is inside.
        low = np.clip(self.scaled(low), first + distance(first), last - 2 * distance(last))
        width = np.minimum(width / self.scale, last - distance(last) - low)
        return low, width, ~self.is_number(mode)

    def cell(self, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The lower end and the width of the cell in which `x` lies, on grid `i`."""
        low, grid = self.round_down(x, i), self.grids[i]
        if not grid:
            return low, np.zeros_like(low)
        high = self._next(low, i, grid)
        if self.circle is not None and not self.circle.is_divided_by(grid):
            high = np.minimum(high, self.circle.end)
        return low, high - low

    def round_down(self, x: np.ndarray, i: int) -> np.ndarray:
        """The number in whose cell `x` lies, on grid `i`."""
        x, grid = self.wrapped(x), self.grids[i]
        if not grid:
            return x
        multiple = np.floor(x / grid + 1e-9 + 4 * EPS * np.abs(x / grid))
        return self.wrapped(self._next(tidy((multiple + 1) * grid, grid), i, -grid))

    def _next(self, x: np.ndarray, i: int, step: float) -> np.ndarray:
        """The next multiple of `step` that has no other mode than grid `i`."""
        x = tidy(x + step, step)
        # Multiples beyond the largest are equal to the next.
        while (taken := self._is_other(x, i) & (np.abs(x) < LARGEST_MULTIPLE * abs(step))).any():
            x = np.where(taken, tidy(x + step, step), x)
        return x

    def _is_other(self, x: np.ndarray, i: int) -> np.ndarray:
        """Mark numbers that are modes, or lie on a coarser grid than `i`."""
        x = self.wrapped(x)
        other = np.isin(x, np.array(self.values, float))
        for grid in self.grids[:i]:
            other |= on_grid(x, grid)
        return other

    def decode(self, mode: np.ndarray, x: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The values of modes and scaled numbers, with None where they are missing."""
        values, clipped = np.full(len(mode), None, object), 0
        for i, value in enumerate(self.values):
            values[mode == i] = value
        if self.pool:
            pooled = mode == len(self.values) - 1
            shares = list(self.pool.values())
            values[pooled] = draw.choice(np.array([*self.pool], object), pooled.sum(), p=shares)
        for i in range(len(self.grids)):
            on_this = mode == len(self.values) + i
            numbers = self.round_down(x[on_this].astype(float) * self.scale + self.center, i)
            values[on_this] = np.clip(numbers, *self.seen)
            clipped += int(np.count_nonzero(values[on_this] != numbers))
        self._warn_of_clipped(clipped, len(mode))
        return values

    def _warn_of_clipped(self, clipped: int, drawn: int) -> None:
        """Warn if many draws lie beyond the training rows, to which they are clipped."""
        if drawn >= DRAWS_TO_JUDGE and clipped > MAX_CLIPPED_SHARE * drawn:
            warnings.warn(
                f"{arg('n')} {clipped / drawn:.0%} of the rows have a number of column "
                f"{self.name!r} beyond the training rows, to whose ends it is moved: the "
                "density is too wide. Train longer, or on more rows.",
                stacklevel=6,
            )
