"""Quantiles of a mixture of atoms and several grids, in few solves.

The level of a number is that of the atoms, and a sum over the grids, each of whose levels takes a
solve. As normal deviates, these are nearly straight lines. So a step takes the quantile of the
lines, solves for the levels there, and turns the lines to meet them: a secant method for each grid.
A number that falls short of the level, and one that reaches it, enclose the quantile all the time.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.multiples import tidy

# Accept a step that misses its level by this part of the tail, of a tail of at most so much. From
# there, the lines miss by less than a solve does; beside narrow peaks, by that part at most.
NEAR, CENTRAL = 0.01, 0.05
# Deviates between the points of a line, at least: many times the error of a solve.
LINE_SPACING = 2e-3
LARGEST, LEAST_SLOPE = 38.0, 1e-9
EVERY = 3  # one of so many steps halves what encloses the quantile
UNIT = 128  # of which a multiple is solved for at once: few sizes, so that few are compiled


class Lines(NamedTuple):
    """Normal deviates of the levels of each grid, `[grids, *numbers]`."""

    x: np.ndarray
    """Scaled numbers at which the deviates are known."""
    z: np.ndarray
    slope: np.ndarray

    @classmethod
    def of_quantiles(cls, x: np.ndarray, levels: np.ndarray) -> "Lines":
        """Lines through quantiles `[grids, rows, levels]`, as steep as between the furthest two."""
        z = np.broadcast_to(deviates(levels), x.shape)
        slope = np.ptp(z, axis=2) / np.maximum(np.ptp(x, axis=2), LEAST_SLOPE)
        return cls(x, z, np.broadcast_to(slope[..., None], x.shape))

    def levels(self, x: np.ndarray) -> np.ndarray:
        return _ndtr(self.z + self.slope * (x - self.x))

    def through(self, x: np.ndarray, levels: np.ndarray) -> "Lines":
        """Lines through these points; and through the last ones, if they are apart."""
        z = deviates(levels)
        apart = (np.abs(z - self.z) > LINE_SPACING) & (x != self.x)
        slope = (z - self.z) / np.where(apart, x - self.x, 1.0)
        return Lines(x, z, np.where(apart, np.maximum(slope, LEAST_SLOPE), self.slope))

    def of(self, numbers: np.ndarray) -> "Lines":
        """Those of some of the numbers."""
        return Lines(*(leaf[:, numbers] for leaf in self))


class GridMixture(NamedTuple):
    """The probabilities of atoms and grids, for each of some numbers."""

    column: Column
    atoms: np.ndarray
    """`[*numbers, atoms]`."""
    shares: np.ndarray
    """`[grids, *numbers]`."""
    grids: list[int]

    def ends(self, y: np.ndarray) -> np.ndarray:
        """`[grids, *numbers]`: below which scaled numbers are at most `y` on each grid."""
        column = self.column
        ends = [sum(column.cell(y, i)) if column.grids[i] else y for i in self.grids]
        return column.scaled(np.array(ends).reshape(len(ends), *y.shape))

    def level(self, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """The probability of at most `y`, from the levels of each grid at its end."""
        below = np.array(self.column.values, float) <= y[..., None]
        return np.sum(self.atoms * below, axis=-1) + np.sum(self.shares * levels, axis=0)

    def of(self, numbers: np.ndarray) -> "GridMixture":
        """For some of the numbers."""
        return self._replace(atoms=self.atoms[numbers], shares=self.shares[:, numbers])


def deviates(levels: np.ndarray) -> np.ndarray:
    """Finite normal deviates."""
    from scipy.special import ndtri  # as JAX does

    return np.clip(ndtri(levels), -LARGEST, LARGEST)


def _ndtr(z: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(z)


def with_others(levels: np.ndarray) -> np.ndarray:
    """The levels, and another one at the end if they are too close for the slope of a line."""
    z = deviates(levels)
    return levels if np.ptp(z) > 1 else np.append(levels, _ndtr(z[0] - np.copysign(1, z[0])))


def quantiles(
    mixture: GridMixture,
    levels: np.ndarray,
    lines: Lines,
    ends: tuple[np.ndarray, np.ndarray],
    solved: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The least numbers that reach `levels`.

    Args:
        lines: through points that are near.
        ends: numbers that fall short of the levels, and those that reach them.
        solved: `(numbers, x)` to the levels of the grids at scaled numbers `[grids, numbers]`.
    """
    unit = mixture.column.grids[-1]
    low, high = (np.round(end / unit) for end in ends)  # multiples of the finest grid
    x, z, slope = map(np.array, lines)
    accuracy = NEAR * np.minimum(np.minimum(levels, 1 - levels), CENTRAL)

    def of_lines(some: np.ndarray) -> np.ndarray:
        """The quantiles if all levels were on the lines."""
        part, own = mixture.of(some), Lines(x, z, slope).of(some)

        def reached(multiple: np.ndarray) -> np.ndarray:
            y = tidy(multiple * unit, unit)
            return part.level(y, own.levels(part.ends(y))) >= levels[some]

        return _bisected(reached, low[some], high[some])

    left, step = np.arange(len(levels)), 0
    while len(left := left[_some_between(low[left], high[left])]):
        step += 1
        middle = np.floor((low[left] + high[left]) / 2)
        guess = np.minimum(of_lines(left), high[left] - 1)
        inside = (low[left] < guess) & (guess < high[left])
        guess = np.where(inside & (step % EVERY > 0), guess, middle)
        part, y = mixture.of(left), tidy(guess * unit, unit)
        at = part.ends(y)
        found = solved(*_filled_up(left, at, len(levels)))[:, : len(left)]
        x[:, left], z[:, left], slope[:, left] = Lines(x, z, slope).of(left).through(at, found)
        missed = part.level(y, found) - levels[left]
        low[left] = np.where(missed < 0, guess, low[left])
        high[left] = np.where(missed < 0, high[left], guess)
        left = left[np.abs(missed) > accuracy[left]]
    return tidy(of_lines(np.arange(len(levels))) * unit, unit)


def _some_between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether there are integers in between. Beyond 2^53, neighbours are further apart."""
    middle = np.floor((low + high) / 2)
    return (low < middle) & (middle < high)


def _bisected(
    reached: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The least integers, up to the upper ends, that reach a level."""
    while (between := _some_between(low, high)).any():
        middle = np.floor((low + high) / 2)
        enough = reached(middle)
        low = np.where(between & ~enough, middle, low)
        high = np.where(between & enough, middle, high)
    return high


def _filled_up(left: np.ndarray, x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """With some of them again."""
    again = np.resize(np.arange(len(left)), min(-(-len(left) // UNIT) * UNIT, most))
    return left[again], x[:, again]
