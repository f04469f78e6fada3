"""Quantiles of a mixture of atoms and several grids, in few solves.

The level of a number is that of the atoms plus a sum over the grids, each of which takes a solve.
As normal deviates, the levels of a grid are nearly a straight line. So a step takes the quantile
that the lines imply, solves for the levels there, and moves the lines through them: a secant method
for each grid. An interval from a number that falls short of the level to one that reaches it always
holds the quantile.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.multiples import tidy

# Accept a step that misses its level by this share of the tail beyond it. Then the lines lead to
# the quantile with less error than a solve has, and beside narrow peaks with this share at most.
MISS_OF_TAIL = 0.01
MAX_TAIL = 0.05  # largest probability of a tail that `MISS_OF_TAIL` is a share of
LINE_SPACING = 2e-3  # least deviates between the points of a line: many errors of a solve
LARGEST_DEVIATE = 38.0  # the levels of larger deviates are 0 in double precision
LEAST_SLOPE = 1e-9  # slope of a line, in deviates per scaled number
STEPS_PER_BISECTION = 3  # every third step halves the interval instead
NUMBERS_MULTIPLE = 128  # solve for multiples of this many numbers, so that few sizes compile


class Lines(NamedTuple):
    """For each grid and number, a line of the normal deviates of levels, `[grids, *numbers]`."""

    x: np.ndarray
    """A scaled number on each line."""
    z: np.ndarray
    """The deviate there."""
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
        """Lines through these points; and through the last ones, if they differ enough."""
        z = deviates(levels)
        differ = (np.abs(z - self.z) > LINE_SPACING) & (x != self.x)
        slope = (z - self.z) / np.where(differ, x - self.x, 1.0)
        return Lines(x, z, np.where(differ, np.maximum(slope, LEAST_SLOPE), self.slope))

    def take(self, numbers: np.ndarray) -> "Lines":
        """The lines of the chosen numbers."""
        return Lines(*(leaf[:, numbers] for leaf in self))


class GridMixture(NamedTuple):
    """The probabilities of atoms and grids, for several numbers."""

    column: Column
    atoms: np.ndarray
    """`[*numbers, atoms]`: the probabilities of atoms."""
    shares: np.ndarray
    """`[grids, *numbers]`: the probabilities of grids."""
    grids: list[int]
    """The places of these grids in `column.grids`."""

    def ends_of_cells(self, y: np.ndarray) -> np.ndarray:
        """Scaled numbers below which values are at most `y` on each grid, `[grids, *numbers]`."""
        column = self.column
        numbers = [sum(column.cell(y, i)) if column.grids[i] else y for i in self.grids]
        return column.scaled(np.array(numbers).reshape(len(numbers), *y.shape))

    def level(self, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """The probability of at most `y`, from the level of each grid at `ends_of_cells`."""
        below = np.array(self.column.values, float) <= y[..., None]
        return np.sum(self.atoms * below, axis=-1) + np.sum(self.shares * levels, axis=0)

    def take(self, numbers: np.ndarray) -> "GridMixture":
        """The mixtures of the chosen numbers."""
        return self._replace(atoms=self.atoms[numbers], shares=self.shares[:, numbers])


def deviates(levels: np.ndarray) -> np.ndarray:
    """The normal deviates of levels, clipped to finite ones."""
    from scipy.special import ndtri  # as JAX does

    return np.clip(ndtri(levels), -LARGEST_DEVIATE, LARGEST_DEVIATE)


def _ndtr(z: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(z)


def wide_enough(levels: np.ndarray) -> np.ndarray:
    """The levels. Append one if they are too close to give the slope of a line."""
    z = deviates(levels)
    return levels if np.ptp(z) > 1 else np.append(levels, _ndtr(z[0] - np.copysign(1, z[0])))


def quantiles(
    mixture: GridMixture,
    levels: np.ndarray,
    lines: Lines,
    interval: tuple[np.ndarray, np.ndarray],
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The least numbers that reach `levels`.

    Args:
        mixture: for each level.
        levels: one for each number.
        lines: through points close to the quantiles.
        interval: numbers that fall short of the levels, and those that reach them.
        solve: `(numbers, x)` to the levels of the grids at scaled numbers `[grids, numbers]`.
    """
    unit = mixture.column.grids[-1]
    low, high = (np.round(bound / unit) for bound in interval)  # multiples of the finest grid
    x, z, slope = map(np.array, lines)
    accuracy = MISS_OF_TAIL * np.minimum(np.minimum(levels, 1 - levels), MAX_TAIL)

    def quantiles_of_lines(numbers: np.ndarray) -> np.ndarray:
        """The quantiles, as multiples, if all levels were on the lines."""
        mixtures, straight = mixture.take(numbers), Lines(x, z, slope).take(numbers)

        def reach(multiple: np.ndarray) -> np.ndarray:
            y = tidy(multiple * unit, unit)
            reached = mixtures.level(y, straight.levels(mixtures.ends_of_cells(y)))
            return reached >= levels[numbers]

        return _bisected(reach, low[numbers], high[numbers])

    unsolved, step = np.arange(len(levels)), 0  # the numbers that are not yet accurate
    while len(unsolved := unsolved[_has_integers_between(low[unsolved], high[unsolved])]):
        step += 1
        middle = np.floor((low[unsolved] + high[unsolved]) / 2)
        guess = np.minimum(quantiles_of_lines(unsolved), high[unsolved] - 1)
        is_inside = (low[unsolved] < guess) & (guess < high[unsolved])
        guess = np.where(is_inside & (step % STEPS_PER_BISECTION > 0), guess, middle)
        mixtures, y = mixture.take(unsolved), tidy(guess * unit, unit)
        x_of_guess = mixtures.ends_of_cells(y)
        solved = solve(*_padded(unsolved, x_of_guess, len(levels)))[:, : len(unsolved)]
        lines = Lines(x, z, slope).take(unsolved).through(x_of_guess, solved)
        x[:, unsolved], z[:, unsolved], slope[:, unsolved] = lines
        missed = mixtures.level(y, solved) - levels[unsolved]
        low[unsolved] = np.where(missed < 0, guess, low[unsolved])
        high[unsolved] = np.where(missed < 0, high[unsolved], guess)
        unsolved = unsolved[np.abs(missed) > accuracy[unsolved]]
    return tidy(quantiles_of_lines(np.arange(len(levels))) * unit, unit)


def _has_integers_between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Mark intervals with an integer inside. Floats beyond 2^53 are more than one apart."""
    middle = np.floor((low + high) / 2)
    return (low < middle) & (middle < high)


def _bisected(
    reach: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The least integers in `(low, high]` that reach a level, by bisection."""
    while (between := _has_integers_between(low, high)).any():
        middle = np.floor((low + high) / 2)
        enough = reach(middle)
        low = np.where(between & ~enough, middle, low)
        high = np.where(between & enough, middle, high)
    return high


def _padded(numbers: np.ndarray, x: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad with repeats: few batch sizes compile."""
    count = min(-(-len(numbers) // NUMBERS_MULTIPLE) * NUMBERS_MULTIPLE, most)
    places = np.resize(np.arange(len(numbers)), count)
    return numbers[places], x[:, places]
