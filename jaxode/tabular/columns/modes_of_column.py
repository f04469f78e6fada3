"""Find the modes of a training column: categories, repeated numbers and grids."""

import warnings
from collections import Counter

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.columns.column import OTHER, Column
from jaxode.tabular.columns.dates import Dates
from jaxode.tabular.columns.multiples import EPS, LARGEST_MULTIPLE, on_grid
from jaxode.tabular.columns.periodic import TURN, Circle

FEW_VALUES = 20  # a column of no more different numbers has a mode for each
# A number is a mode if this share of the rows have it, and it is this many times as frequent as
# the median of the equally round numbers up to this many steps away.
MIN_SHARE_OF_MODE = 0.02
MIN_PEAK = 4.0
NEIGHBOUR_STEPS = 10
# A coarser grid may be a mode if this share of the rows lie on it. There are at most this many,
# each of which must gain this many nats over all rows.
MIN_SHARE_OF_GRID = 0.05
MAX_COARSE_GRIDS = 3
NATS_OF_GRID = 10.0
GRID_RATIOS = (1000, 500, 250, 200, 100, 50, 25, 20, 10, 5, 2)  # spacing over the finest one
MAX_DECIMALS = 6  # decimals of a number that is taken for rounded
MIN_REPEATED_SHARE = 0.02  # numbers are not rounded if fewer of the rows repeat one
# Warn of more categories than this number, or than this share of the rows; raise beyond a larger
# share. The messages advise to pool categories with fewer than `RARE_ROWS` rows.
MANY_CATEGORIES = 500
MANY_CATEGORIES_SHARE = 0.1
TOO_MANY_CATEGORIES_SHARE = 0.5
RARE_ROWS = 10
OUTLIER_DEVIATIONS = 1000.0  # beyond this many times the middle half's spread, use that


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
    """A column of categories. Those with fewer than `other` rows share a mode.

    By default, the `MANY_CATEGORIES` most frequent categories of a modelled column have their own
    modes, and all categories of a given column.

    Args:
        name: of the column.
        values: one a row.
        missing: which of them are missing.
        other: least number of rows of a category with a mode of its own.
        text: whether the frame holds text.
        cures: advice if the categories are dates, and if they are numbers; empty if they are not.
        is_given: whether the column is conditioned on.
        weights: of the rows, for the shares of pooled categories.
    """
    counts = Counter(values[~missing].tolist())
    levels = sorted(counts, key=str)
    rare = {level for level in levels if counts[level] < (other or 0)}
    pools = other is None and not is_given
    _check_levels(name, len(levels) - len(rare), len(values), cures, is_given, pools)
    if pools:
        rare = set(sorted(levels, key=lambda level: -counts[level])[MANY_CATEGORIES:])
    common = [level for level in levels if level not in rare]
    share = dict.fromkeys([level for level in levels if level in rare], 0.0)
    weights = np.ones(len(values)) if weights is None else weights
    for level, weight in zip(values, weights, strict=True):
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
    if number <= min(MANY_CATEGORIES, max(FEW_VALUES, MANY_CATEGORIES_SHARE * rows)):
        return
    of_dates, of_numbers = cures
    pool_them = (
        f"Drop the column, or pool categories with fewer than {RARE_ROWS} rows by "
        f"other={RARE_ROWS}."
    )
    message = f"{arg('frame')} column {name!r} must repeat its categories; got {number} of them"
    message += f" in {rows} rows. {of_dates or of_numbers + pool_them}"
    if number > max(FEW_VALUES, TOO_MANY_CATEGORIES_SHARE * rows):
        raise ValueError(message)
    effect = (
        "With so many, the model is large, and its samples combine what never belongs together."
    )
    if pools and number > MANY_CATEGORIES:
        effect = f"The {number - MANY_CATEGORIES} rarest are pooled."
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
    """A column of numbers, with the repeated numbers and the grids of the others as modes."""
    x, has_missing = values[~missing].astype(float), bool(missing.any())
    levels, counts = np.unique(x, return_counts=True)
    is_count = kind in ("integer", "date")
    finest = 1.0 if is_count else _resolution(levels, len(x))
    resolution = 0.0 if is_count else finest
    if (few := _few(levels, len(x))) is not None:
        resolution = _without_density(few, resolution)
        return Column(
            name, kind, few, (), has_missing, low, high, resolution=resolution, dates=dates
        )
    ratios = GRID_RATIOS if dates is None else dates.ratios
    atoms, on_grids, grids = _modes(levels, counts, finest, ratios)
    inner = np.repeat(levels[on_grids], counts[on_grids]) if on_grids.any() else x
    center, scale = float(np.median(inner)), spread(name, inner, dates)
    extremes = float(levels[0]), float(levels[-1])
    return Column(
        name, kind, atoms, grids, has_missing, low, high, extremes, center, scale, resolution,
        dates=dates,
    )  # fmt: skip


def angular(name: str, values: np.ndarray, missing: np.ndarray, circle: Circle) -> Column:
    """A column of numbers on a circle."""
    x, has_missing = values[~missing].astype(float), bool(missing.any())
    levels = np.unique(x)
    finest = 1.0 if on_grid(levels, 1.0).all() else _resolution(levels, len(x))
    levels, counts = np.unique(circle.wrapped(x, finest), return_counts=True)
    if (few := _few(levels, len(x))) is not None:
        resolution = _without_density(few, finest)
        return Column(name, "periodic", few, (), has_missing, resolution=resolution, circle=circle)
    if finest and not circle.is_divided_by(finest):
        # The period ends within a cell, so that the last cell is short, and nothing else is a mode.
        circle, atoms, grids = circle.from_grid(finest), (), (finest,)
    else:
        atoms, _, grids = _modes(levels, counts, finest, GRID_RATIOS, circle.period)
    scale = circle.period / TURN
    return Column(
        name, "periodic", atoms, grids, has_missing, scale=scale, resolution=finest, circle=circle
    )


def _few(levels: np.ndarray, count: int) -> tuple[float, ...] | None:
    """All of the numbers if they are few and repeat; else None."""
    few = len(levels) <= FEW_VALUES and count > 5 * len(levels)
    return tuple(map(float, levels)) if few else None


def _without_density(atoms: tuple[float, ...], resolution: float) -> float:
    """The resolution; 0 for a constant, which has a probability of one and no density."""
    return 0.0 if len(atoms) == 1 else resolution


def _modes(
    levels: np.ndarray,
    counts: np.ndarray,
    finest: float,
    ratios: tuple[int, ...],
    period: float = 0.0,
) -> tuple[tuple[float, ...], np.ndarray, tuple[float, ...]]:
    """The numbers that are modes, a mask of the other levels, and the grids of those."""
    often = counts >= max(MIN_SHARE_OF_MODE * counts.sum(), 3)
    atoms = _repeated(levels, counts, often, finest, ratios)
    on_grids = ~np.isin(levels, atoms)
    if not finest:
        return atoms, on_grids, (finest,)
    return atoms, on_grids, _grids(levels[on_grids], counts[on_grids], finest, period, ratios)


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
    """The spacing of the decimals that numbers are rounded to, or 0 if they are not."""
    if len(levels) > (1 - MIN_REPEATED_SHARE) * count:
        return 0.0
    for digits in range(MAX_DECIMALS + 1):
        told_apart = np.abs(levels).max() <= LARGEST_MULTIPLE * 10.0**-digits
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
    """The numbers that are far more frequent than equally round neighbours."""
    atoms = []
    for value, count in zip(levels[often], counts[often], strict=True):
        grid = _roundness(value, finest, ratios)
        distance = np.abs(levels - value)
        is_neighbour = (distance <= NEIGHBOUR_STEPS * grid * (1 + 1e-9)) & (distance > 0)
        neighbours = counts[is_neighbour & on_grid(levels, grid)] if finest else counts[:0]
        if count > MIN_PEAK * (np.median(neighbours) if len(neighbours) else 0):
            atoms.append(float(value))
    return tuple(atoms)


def _roundness(value: float, finest: float, ratios: tuple[int, ...]) -> float:
    """The coarsest grid that a number lies on."""
    return next((r * finest for r in ratios if on_grid(np.array(value), r * finest)), finest)


def _grids(
    levels: np.ndarray, counts: np.ndarray, finest: float, period: float, ratios: tuple[int, ...]
) -> tuple[float, ...]:
    """The most likely grids, from coarse to fine. All of them divide the period.

    If the density is smooth, the probability of a number is proportional to the width of its cell.

    Args:
        levels: the different numbers.
        counts: how many rows have each.
        finest: the finest grid.
        period: of the column, or zero.
        ratios: candidates for the ratio of a grid to the finest one.
    """
    candidates = [
        r
        for r in ratios
        if counts[on_grid(levels, r * finest)].sum() > MIN_SHARE_OF_GRID * counts.sum()
        and on_grid(np.array(period), r * finest)
    ]
    chains = [()]
    for ratio in candidates:
        chains += [
            (*c, ratio)
            for c in chains
            if len(c) < MAX_COARSE_GRIDS and (not c or c[-1] % ratio == 0)
        ]
    best, best_score = (), 0.0
    for chain in chains[1:]:
        left, score = counts.astype(float), -NATS_OF_GRID * len(chain)
        for i, ratio in enumerate((*chain, 1)):
            is_on_grid = on_grid(levels, ratio * finest)
            n = left[is_on_grid].sum()
            left = np.where(is_on_grid, 0.0, left)
            # Share of this grid's numbers on no coarser grid.
            share = 1 - ratio / chain[i - 1] if i else 1.0
            if n > 0:
                score += n * np.log(n / counts.sum() * ratio / share)
        if score > best_score:
            best, best_score = chain, score
    return (*(ratio * finest for ratio in best), finest)
