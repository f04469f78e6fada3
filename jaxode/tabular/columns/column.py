"""The columns of a table: each value is a mode, and in some modes a number within a cell.

A mode is a category, a number that is repeated so often that it has a probability of its own, a
grid that the number lies on, or missing. A cell is what lies between a number and the next one on
its grid. A density of `number + noise`, with noise in the cell, integrates over it to the
probability of the number.
"""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.columns.dates import Dates
from jaxode.tabular.columns.multiples import EPS, LARGEST, on_grid, tidy
from jaxode.tabular.columns.periodic import TURN, Circle

# A repeated number is a mode if this part of the rows have it, and so many times as many as its
# neighbours, the next numbers that are as round; and if there are few, all are.
OFTEN, PEAK, NEAR, FEW_VALUES = 0.02, 4.0, 10, 20
# A coarser grid may be a mode if this part of the rows lie on it. At most so many are, each of
# which gains so many nats in all.
ON_GRID, GRIDS, COST = 0.05, 3, 10.0
# The share of draws beyond the training rows that is told, if there are so many draws.
MOST_MOVED, DRAWS_TO_JUDGE = 0.05, 200
RATIOS = (1000, 500, 250, 200, 100, 50, 25, 20, 10, 5, 2)
DECIMALS = 6
# More categories warn, in all or as a share of the rows, and a larger share raises. `POOLED` rows
# are what the messages advise.
MANY, SHARE, TOO_LARGE_SHARE, POOLED = 500, 0.1, 0.5, 10
# A given column of more modes enters as so many numbers, which are random and fixed for each mode.
DIRECTIONS = 64
# Standard deviations of the middle half, up to which the others have a say.
OUTLIER_DEVIATIONS = 1000.0
OTHER = None  # the mode of rare categories
INSIDE = 1e-6  # how far a number stays from a bound, in standard deviations


@dataclass(frozen=True)
class Column:
    """The modes of a column and the cells of its numbers."""

    name: str
    kind: str
    """"categorical", "integer", "continuous", "periodic" or "date"."""
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
    """The distance of the decimals that continuous or periodic numbers are rounded to, or 0."""
    text: bool = False
    """Whether the frame holds categories, not numbers."""
    pool: dict[Any, float] = field(default_factory=dict)
    """Rare values that share the last mode of the `values`, and their shares."""
    circle: Circle | None = None
    """The period of a periodic column."""
    dates: Dates | None = None
    """How the numbers of a date column are dates."""

    @property
    def present(self) -> int:
        """The number of modes but for missing."""
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
        parts = [*numbers, *(f(angle) for angle in angles for f in (np.sin, np.cos))]
        seen = [np.where(is_number, part, 0.0) for part in parts]
        return np.stack([*seen, *[~is_number] * self.missing], 1)

    def show(self, x: float) -> str:
        """A number as users know it."""
        return f"{x:g}" if self.dates is None else self.dates.show(x)

    def encode(self, values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mode of each value, -1 if there is none, and its number, or the log of the share of a
        category in its mode."""
        mode, x = (
            np.full(len(values), self.modes - 1 if self.missing else -1),
            np.zeros(len(values)),
        )
        if self.kind == "categorical":
            codes = {value: (i, 0.0) for i, value in enumerate(self.values) if value is not OTHER}
            last, unseen = len(self.values) - 1, (-1, 0.0)
            if self.pool:
                codes |= {value: (last, np.log(share)) for value, share in self.pool.items()}
                unseen = last, -np.inf
            for row in np.flatnonzero(~missing):
                mode[row], x[row] = codes.get(values[row], unseen)
            return mode, x
        x = self.wrapped(np.where(missing, 0.0, values.astype(float)))
        of_number = np.full(len(x), -1 if not self.grids else self.present - 1)
        for i, grid in reversed(list(enumerate(self.grids[:-1]))):
            of_number[on_grid(x, grid)] = len(self.values) + i
        for i, value in enumerate(self.values):
            # Another program may compute or print it with another rounding.
            of_number[np.abs(x - value) <= 4 * EPS * abs(value)] = i
        return np.where(missing, mode, of_number), x

    def is_number(self, mode: np.ndarray) -> np.ndarray:
        """Whether there is a number in this mode."""
        return (mode >= len(self.values)) & (mode < self.present)

    def scaled(self, x: Any) -> Any:
        """Numbers of order one."""
        return (x - self.center) / self.scale

    def wrapped(self, x: np.ndarray) -> np.ndarray:
        """Numbers in their period, if they have one."""
        return x if self.circle is None else self.circle.wrapped(x, self.resolution)

    @property
    def ends(self) -> tuple[float, float]:
        """Between which scaled numbers with noise lie."""
        return self.scaled(self.low), self.scaled(self.high + self.grids[-1])

    def cells(self, mode: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lower ends and widths of scaled cells, and where there is no number."""
        low, width, (first, last) = np.array(x, float), np.zeros(len(x)), self.ends
        for i, grid in enumerate(self.grids):
            here = mode == len(self.values) + i
            if grid and here.any():
                low[here], width[here] = self.cell(x[here], i)

        def inside(end):
            return INSIDE * max(1.0, abs(end)) if np.isfinite(end) else 0.0

        # In single precision, too, the upper end of a cell is inside.
        low = np.clip(self.scaled(low), first + inside(first), last - 2 * inside(last))
        width = np.minimum(width / self.scale, last - inside(last) - low)
        return low, width, ~self.is_number(mode)

    def cell(self, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The lower end and the width of the cell in which `x` lies, on grid `i`."""
        low, grid = self.round_down(x, i), self.grids[i]
        if not grid:
            return low, np.zeros_like(low)
        end = self._next(low, i, grid)
        if self.circle is not None and not self.circle.is_divided_by(grid):
            end = np.minimum(end, self.circle.end)
        return low, end - low

    def round_down(self, x: np.ndarray, i: int) -> np.ndarray:
        """The number in whose cell `x` lies, on grid `i`."""
        x, grid = self.wrapped(x), self.grids[i]
        if not grid:
            return x
        multiple = np.floor(x / grid + 1e-9 + 4 * EPS * np.abs(x / grid))
        return self.wrapped(self._next(tidy((multiple + 1) * grid, grid), i, -grid))

    def _next(self, x: np.ndarray, i: int, step: float) -> np.ndarray:
        """The next number that is of no other mode."""
        x = tidy(x + step, step)
        # Beyond, the next number is the same.
        while (taken := self._is_other(x, i) & (np.abs(x) < LARGEST * abs(step))).any():
            x = np.where(taken, tidy(x + step, step), x)
        return x

    def _is_other(self, x: np.ndarray, i: int) -> np.ndarray:
        x = self.wrapped(x)
        other = np.isin(x, np.array(self.values, float))
        for grid in self.grids[:i]:
            other |= on_grid(x, grid)
        return other

    def decode(self, mode: np.ndarray, x: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """The values of modes and scaled numbers, with None where they are missing."""
        values, moved = np.full(len(mode), None, object), 0
        for i, value in enumerate(self.values):
            values[mode == i] = value
        if self.pool:
            here = mode == len(self.values) - 1
            shares = list(self.pool.values())
            values[here] = draw.choice(np.array([*self.pool], object), here.sum(), p=shares)
        for i in range(len(self.grids)):
            here = mode == len(self.values) + i
            numbers = self.round_down(x[here].astype(float) * self.scale + self.center, i)
            values[here] = np.clip(numbers, *self.seen)
            moved += int(np.count_nonzero(values[here] != numbers))
        self._warn_of_moved(moved, len(mode))
        return values

    def _warn_of_moved(self, moved: int, drawn: int) -> None:
        """Warn if many draws lie beyond the training rows, to whose ends they are moved."""
        if drawn >= DRAWS_TO_JUDGE and moved > MOST_MOVED * drawn:
            warnings.warn(
                f"{arg('n')} {moved / drawn:.0%} of the rows have a number of column {self.name!r} "
                "beyond the training rows, to whose ends it is moved: the density is too wide. "
                "Train longer, or on more rows.",
                stacklevel=6,
            )


def categorical(
    name: str,
    values: np.ndarray,
    missing: np.ndarray,
    other: int | None,
    text: bool,
    cures: tuple[str, str] = ("", ""),
    is_given: bool = False,
    weights: np.ndarray | None = None,
) -> Column:
    """A column of categories; those with fewer than `other` rows share a mode.

    By default, those beyond the `MANY` that are most frequent do, unless the column is given.
    `cures`: what to do with them if they are dates, or numbers. `weights`: of the rows, for the
    shares in the mode.
    """
    counts = Counter(values[~missing].tolist())
    levels = sorted(counts, key=str)
    rare = {level for level in levels if counts[level] < (other or 0)}
    pools = other is None and not is_given
    _check_levels(name, len(levels) - len(rare), len(values), cures, is_given, pools)
    if pools:
        rare = set(sorted(levels, key=lambda level: -counts[level])[MANY:])
    common = [level for level in levels if level not in rare]
    share = dict.fromkeys([level for level in levels if level in rare], 0.0)
    each = zip(values, np.ones(len(values)) if weights is None else weights, strict=True)
    for level, weight in each:
        if level in share:
            share[level] += float(weight)
    total = sum(share.values())
    return Column(
        name, "categorical", (*common, *[OTHER] * bool(rare)), (), bool(missing.any()), text=text,
        pool={level: weight / total for level, weight in share.items()},
    )  # fmt: skip


def _check_levels(
    name: str, number: int, rows: int, cures: tuple[str, str], is_given: bool, pools: bool
) -> None:
    """Warn of many categories, and raise if they are a large part of the rows."""
    if number <= min(MANY, max(FEW_VALUES, SHARE * rows)):
        return
    of_dates, of_numbers = cures
    cure = f"Drop the column, or pool categories with fewer than {POOLED} rows by other={POOLED}."
    message = f"{arg('frame')} column {name!r} must repeat its categories; got {number} of them"
    message += f" in {rows} rows. {of_dates or of_numbers + cure}"
    if number > max(FEW_VALUES, TOO_LARGE_SHARE * rows):
        raise ValueError(message)
    effect = (
        "With so many, the model is large, and its samples combine what never belongs together."
    )
    if pools and number > MANY:
        effect = f"The {number - MANY} rarest are pooled."
    if not is_given:
        warnings.warn(f"{message} {effect}", stacklevel=9)


def numeric(
    name: str,
    kind: str,
    values: np.ndarray,
    missing: np.ndarray,
    low: float = -np.inf,
    high: float = np.inf,
    dates: Dates | None = None,
) -> Column:
    """A column of numbers, with the values that are repeated and the grids that they lie on."""
    x, some = values[~missing].astype(float), bool(missing.any())
    levels, counts = np.unique(x, return_counts=True)
    is_count = kind in ("integer", "date")
    finest = 1.0 if is_count else _resolution(levels, len(x))
    resolution = 0.0 if is_count else finest
    if (few := _few(levels, len(x))) is not None:
        resolution = _without_density(few, resolution)
        return Column(name, kind, few, (), some, low, high, resolution=resolution, dates=dates)
    atoms, rest, grids = _modes(levels, counts, finest, RATIOS if dates is None else dates.ratios)
    inner = np.repeat(levels[rest], counts[rest]) if rest.any() else x
    center, scale = float(np.median(inner)), spread(name, inner, dates)
    seen = float(levels[0]), float(levels[-1])
    return Column(
        name, kind, atoms, grids, some, low, high, seen, center, scale, resolution, dates=dates
    )


def angular(name: str, values: np.ndarray, missing: np.ndarray, circle: Circle) -> Column:
    """A periodic column, whose numbers differ by a part of the period."""
    x, some = values[~missing].astype(float), bool(missing.any())
    levels = np.unique(x)
    finest = 1.0 if on_grid(levels, 1.0).all() else _resolution(levels, len(x))
    levels, counts = np.unique(circle.wrapped(x, finest), return_counts=True)
    if (few := _few(levels, len(x))) is not None:
        resolution = _without_density(few, finest)
        return Column(name, "periodic", few, (), some, resolution=resolution, circle=circle)
    if finest and not circle.is_divided_by(finest):
        # A grid with a short last cell, which no value interrupts.
        circle, atoms, grids = circle.from_grid(finest), (), (finest,)
    else:
        atoms, _, grids = _modes(levels, counts, finest, RATIOS, circle.period)
    scale = circle.period / TURN
    return Column(
        name, "periodic", atoms, grids, some, scale=scale, resolution=finest, circle=circle
    )


def _few(levels: np.ndarray, count: int) -> tuple[float, ...] | None:
    """All numbers, if there are few that repeat."""
    few = len(levels) <= FEW_VALUES and count > 5 * len(levels)
    return tuple(map(float, levels)) if few else None


def _without_density(atoms: tuple[float, ...], resolution: float) -> float:
    """No resolution for a constant, which has no density, but a probability of one."""
    return 0.0 if len(atoms) == 1 else resolution


def _modes(
    levels: np.ndarray,
    counts: np.ndarray,
    finest: float,
    ratios: tuple[int, ...],
    period: float = 0.0,
) -> tuple[tuple[float, ...], np.ndarray, tuple[float, ...]]:
    """The numbers that are modes, which of the levels are not, and the grids of those."""
    often = counts >= max(OFTEN * counts.sum(), 3)
    atoms = _repeated(levels, counts, often, finest, ratios)
    rest = ~np.isin(levels, atoms)
    grids = _grids(levels[rest], counts[rest], finest, period, ratios) if finest else (finest,)
    return atoms, rest, grids


def spread(name: str, x: np.ndarray, dates: Dates | None = None) -> float:
    """The standard deviation, or that of the middle half if a few numbers are far away."""
    std = float(x.std())
    low, high = np.quantile(x, [0.25, 0.75])
    middle = float(high - low) / 1.349
    if middle and std > OUTLIER_DEVIATIONS * middle:
        worst = float(x[np.argmax(np.abs(x - np.median(x)))])
        worst = f"{worst:g}" if dates is None else dates.show(worst)
        warnings.warn(
            f"{arg('frame')} column {name!r} has numbers far from all others, such as {worst}, "
            "beside which the others look alike. Correct them, make them missing, or take "
            "logarithms.",
            stacklevel=8,
        )
        return middle
    return std if std > 4 * EPS * np.abs(x).max() else 1.0  # of a constant, it may be rounding


def _resolution(levels: np.ndarray, count: int) -> float:
    """The distance of decimals that the numbers are rounded to, or 0 if they do not repeat."""
    if len(levels) > 0.98 * count:
        return 0.0
    for digits in range(DECIMALS + 1):
        told_apart = np.abs(levels).max() <= LARGEST * 10.0**-digits
        if told_apart and on_grid(levels, 10.0**-digits).all():
            return 10.0**-digits
    return 0.0


def _repeated(
    levels: np.ndarray,
    counts: np.ndarray,
    often: np.ndarray,
    finest: float,
    ratios: tuple[int, ...],
) -> tuple[float, ...]:
    """Numbers with a probability of their own."""
    found = []
    for value, count in zip(levels[often], counts[often], strict=True):
        # As many as nearby numbers that are as round.
        grid = _roundness(value, finest, ratios)
        near = (np.abs(levels - value) <= NEAR * grid * (1 + 1e-9)) & (levels != value)
        around = counts[near & on_grid(levels, grid)] if finest else counts[:0]
        if count > PEAK * (np.median(around) if len(around) else 0):
            found.append(float(value))
    return tuple(found)


def _roundness(value: float, finest: float, ratios: tuple[int, ...]) -> float:
    """The coarsest grid that a number lies on."""
    return next((r * finest for r in ratios if on_grid(np.array(value), r * finest)), finest)


def _grids(
    levels: np.ndarray, counts: np.ndarray, finest: float, period: float, among: tuple[int, ...]
) -> tuple[float, ...]:
    """The grids, from coarse to fine, in which the numbers are most likely, of some ratios to the
    finest. They divide the period.

    On its grid, a number is as likely as its cell is wide, if the density is smooth.
    """
    ratios = [
        r
        for r in among
        if counts[on_grid(levels, r * finest)].sum() > ON_GRID * counts.sum()
        and on_grid(np.array(period), r * finest)
    ]
    chains = [()]
    for ratio in ratios:
        chains += [(*c, ratio) for c in chains if len(c) < GRIDS and (not c or c[-1] % ratio == 0)]
    best, best_score = (), 0.0
    for chain in chains[1:]:
        left, score = counts.astype(float), -COST * len(chain)
        for i, ratio in enumerate((*chain, 1)):
            here = left[on_grid(levels, ratio * finest)]
            left = np.where(on_grid(levels, ratio * finest), 0.0, left)
            # Of its numbers, this share is not on a coarser grid.
            share = 1 - ratio / chain[i - 1] if i else 1.0
            if (n := here.sum()) > 0:
                score += n * np.log(n / counts.sum() * ratio / share)
        if score > best_score:
            best, best_score = chain, score
    return (*(ratio * finest for ratio in best), finest)
