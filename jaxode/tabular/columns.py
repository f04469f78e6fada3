"""The columns of a table: each value is a mode, and in some modes a number within a cell.

A mode is a category, a number that is repeated so often that it has a probability of its own, a
grid that the number lies on, or missing. A cell is what lies between a number and the next one on
its grid. A density of `number + noise`, with noise in the cell, integrates over it to the
probability of the number.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

# A repeated number is a mode if this part of the rows have it, and so many times as many as its
# neighbours, the next numbers that are as round; and if there are few, all are.
OFTEN, PEAK, NEAR, FEW_VALUES = 0.02, 4.0, 10, 20
# A coarser grid may be a mode if this part of the rows lie on it. At most so many are, each of
# which gains so many nats in all.
ON_GRID, GRIDS, COST = 0.05, 3, 10.0
RATIOS = (1000, 500, 250, 200, 100, 50, 25, 20, 10, 5, 2)
DECIMALS = 6
OTHER = "other categories"  # the mode of rare ones


@dataclass(frozen=True)
class Column:
    """How the values of a column are told apart."""

    name: str
    kind: str
    """"categorical", "integer" or "continuous"."""
    values: tuple[Any, ...]
    """Values that are modes, sorted."""
    grids: tuple[float, ...]
    """Distances of the numbers on each grid, from coarse to fine; 0 where there is no grid."""
    missing: bool
    low: float = -np.inf
    high: float = np.inf
    seen: tuple[float, float] = (-np.inf, np.inf)
    """The least and the largest number in training, between which samples stay."""
    center: float = 0.0
    scale: float = 1.0
    resolution: float = 0.0
    """The distance of the decimals that continuous numbers are rounded to, or 0."""
    strings: bool = False
    """Whether the frame holds categories, not numbers."""
    pool: tuple[tuple[Any, ...], tuple[float, ...]] = ((), ())
    """Rare values that share the last of the `values`, and their shares."""

    @property
    def modes(self) -> int:
        """The number of modes: values, grids, and missing."""
        return len(self.values) + len(self.grids) + self.missing

    def encode(self, values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mode of each value, and its number, zero where it has none. Unknown values: -1."""
        mode = np.full(len(values), -1)
        if self.kind == "categorical":
            order = {value: i for i, value in enumerate(self.values)}
            unknown = len(self.values) - 1 if self.pool[0] else -1
            known = ~missing
            mode[known] = [order.get(value, unknown) for value in values[known]]
            x = np.zeros(len(values))
        else:
            x = np.where(missing, 0.0, values.astype(float))
            for i, grid in reversed(list(enumerate(self.grids))):
                on_it = on_grid(x, grid) | (i == len(self.grids) - 1)
                mode[on_it] = len(self.values) + i
            for i, value in enumerate(self.values):
                mode[x == value] = i
        mode[missing] = self.modes - 1 if self.missing else -1
        return mode, x

    def is_number(self, mode: np.ndarray) -> np.ndarray:
        """Whether there is a number in this mode."""
        return (mode >= len(self.values)) & (mode < len(self.values) + len(self.grids))

    def cells(self, mode: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lower end and the width of the cell of each number."""
        low, width = np.array(x, float), np.zeros(len(x))
        for i, grid in enumerate(self.grids):
            here = mode == len(self.values) + i
            if grid and here.any():
                low[here] = self.round_down(x[here], i)
                width[here] = self._next(low[here], i, grid) - low[here]
        return low, width

    def round_down(self, x: np.ndarray, i: int) -> np.ndarray:
        """The number in whose cell `x` lies, on grid `i`."""
        grid = self.grids[i]
        if not grid:
            return x
        return self._next(tidy((np.floor(x / grid + 1e-9) + 1) * grid, grid), i, -grid)

    def _next(self, x: np.ndarray, i: int, step: float) -> np.ndarray:
        """The next number that is of no other mode."""
        x = tidy(x + step, step)
        while (taken := self._is_other(x, i)).any():
            x = np.where(taken, tidy(x + step, step), x)
        return x

    def _is_other(self, x: np.ndarray, i: int) -> np.ndarray:
        other = np.isin(x, np.array(self.values, float))
        for grid in self.grids[:i]:
            other |= on_grid(x, grid)
        return other

    def decode(self, mode: np.ndarray, x: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The values, with None where they are missing."""
        values = np.full(len(mode), None, object)
        for i, value in enumerate(self.values):
            here = np.flatnonzero(mode == i)
            values[here] = [value] * len(here)
            if self.pool[0] and i == len(self.values) - 1:
                chosen = draw.choice(len(self.pool[0]), len(here), p=self.pool[1])
                values[here] = [self.pool[0][j] for j in chosen]
        for i in range(len(self.grids)):
            here = mode == len(self.values) + i
            numbers = self.round_down(x[here], i)
            values[here] = np.clip(numbers, *self.seen)
        return values


def on_grid(x: np.ndarray, grid: float) -> np.ndarray:
    """Which numbers are multiples of the distance, up to rounding."""
    if not grid:
        return np.ones(np.shape(x), bool)
    multiple = x / grid
    return np.abs(multiple - np.round(multiple)) <= 1e-9 * np.maximum(1.0, np.abs(multiple))


def tidy(x: np.ndarray, grid: float) -> np.ndarray:
    """Multiples of the distance as a decimal would be read."""
    multiple = np.round(x / grid)
    return multiple / round(1 / abs(grid)) * np.sign(grid) if abs(grid) < 1 else multiple * grid


def categorical(
    name: str, values: np.ndarray, missing: np.ndarray, other: int | None, strings: bool
) -> Column:
    """A column of categories; those with fewer than `other` rows share a mode."""
    present = values[~missing]
    levels, counts = np.unique(present.astype(str), return_counts=True)
    as_given = {str(value): value for value in present}
    rare = counts < (other or 0)
    common = tuple(as_given[level] for level in levels[~rare])
    pool = ((), ())
    if rare.any():
        pool = (
            tuple(as_given[level] for level in levels[rare]),
            tuple(counts[rare] / counts[rare].sum()),
        )
        common += (OTHER,)
    return Column(name, "categorical", common, (), bool(missing.any()), strings=strings, pool=pool)


def numeric(
    name: str, kind: str, values: np.ndarray, missing: np.ndarray, low: float, high: float
) -> Column:
    """A column of numbers, with the values that are repeated and the grids that they lie on."""
    x = values[~missing].astype(float)
    levels, counts = np.unique(x, return_counts=True)
    finest = 1.0 if kind == "integer" else _resolution(levels, len(x))
    often = counts >= max(OFTEN * len(x), 3)
    some, resolution = bool(missing.any()), finest if kind == "continuous" else 0.0
    if finest and len(levels) <= FEW_VALUES and len(x) > 5 * len(levels):
        return Column(
            name, kind, tuple(map(float, levels)), (), some, low, high, resolution=resolution
        )
    atoms, grids = _repeated(levels, counts, often, finest), (finest,)
    if finest:
        rest = ~np.isin(levels, atoms)
        grids = _grids(levels[rest], counts[rest], finest)
    seen = float(levels[0]), float(levels[-1])
    inner = x[~np.isin(x, atoms)]
    inner = inner if len(inner) else x
    center, scale = float(np.median(inner)), float(inner.std()) or 1.0
    return Column(name, kind, atoms, grids, some, low, high, seen, center, scale, resolution)


def _resolution(levels: np.ndarray, count: int) -> float:
    """The distance of decimals that the numbers are rounded to, or 0 if they do not repeat."""
    if len(levels) > 0.98 * count:
        return 0.0
    for digits in range(DECIMALS + 1):
        if on_grid(levels, 10.0**-digits).all():
            return 10.0**-digits
    return 0.0


def _repeated(
    levels: np.ndarray, counts: np.ndarray, often: np.ndarray, finest: float
) -> tuple[float, ...]:
    """Numbers with a probability of their own."""
    found = []
    for value, count in zip(levels[often], counts[often], strict=True):
        # As many as nearby numbers that are as round.
        grid = _roundness(value, finest)
        near = (np.abs(levels - value) <= NEAR * grid * (1 + 1e-9)) & (levels != value)
        around = counts[near & on_grid(levels, grid)] if finest else counts[:0]
        if count > PEAK * (np.median(around) if len(around) else 0):
            found.append(float(value))
    return tuple(found)


def _roundness(value: float, finest: float) -> float:
    """The coarsest grid that a number lies on."""
    return next((r * finest for r in RATIOS if on_grid(np.array(value), r * finest)), finest)


def _grids(levels: np.ndarray, counts: np.ndarray, finest: float) -> tuple[float, ...]:
    """The grids, from coarse to fine, in which the numbers are most likely.

    On its grid, a number is as likely as its cell is wide, if the density is smooth.
    """
    ratios = [
        r for r in RATIOS if counts[on_grid(levels, r * finest)].sum() > ON_GRID * counts.sum()
    ]
    chains = [()]
    for ratio in ratios:
        chains += [(*c, ratio) for c in chains if len(c) < GRIDS and (not c or c[-1] % ratio == 0)]
    best, best_score = (), 0.0
    for chain in chains[1:]:
        left, score, share = counts.astype(float), -COST * len(chain), 1.0
        for i, ratio in enumerate((*chain, 1)):
            here = left[on_grid(levels, ratio * finest)]
            left = np.where(on_grid(levels, ratio * finest), 0.0, left)
            share = 1 - (
                ratio / chain[i - 1] if i else 0.0
            )  # of its numbers, not on a coarser grid
            if (n := here.sum()) > 0:
                score += n * np.log(n / counts.sum() * ratio / share)
        if score > best_score:
            best, best_score = chain, score
    return (*(ratio * finest for ratio in best), finest)
