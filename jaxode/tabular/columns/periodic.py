"""Numbers on a circle, such as wind directions and hours of the day."""

import math
from dataclasses import dataclass

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.columns.multiples import on_grid, tidy

PERIODS = (1.0, 2 * math.pi, 7.0, 12.0, 24.0, 60.0, 360.0)  # candidates for an unknown period
TURN = 2 * math.pi  # the period of scaled numbers


@dataclass(frozen=True)
class Circle:
    """A period and its start."""

    start: float
    period: float

    @classmethod
    def from_values(cls, name: str, values: np.ndarray, period: float | None) -> "Circle":
        """The circle of a column.

        It starts at 0; at 1 for whole numbers from 1 to about the period, such as months and days
        of the year; at minus half a period if there are negative values. Without a period, it is
        the first of `PERIODS` that holds all values, from 7 on for whole numbers.
        """
        low, high = float(values.min()), float(values.max())
        whole = bool((values == np.round(values)).all())

        def circle_of(period: float) -> Circle:
            from_one = whole and low >= 1 and period - 1 < high < period + 1
            return cls(-period / 2 if low < 0 else float(from_one), float(period))

        if period is not None:
            return circle_of(period)
        for period in PERIODS[2 if whole else 0 :]:
            circle = circle_of(period)
            if circle.start <= low and high <= circle.end:
                return circle
        raise ValueError(
            f"{arg('kinds')} column {name!r} must have a period that is given, since its values, "
            f"from {low:g} to {high:g}, fit no usual one; got 'periodic' alone. Pass ('periodic', "
            "period)."
        )

    def wrapped(self, x: np.ndarray, grid: float) -> np.ndarray:
        """Numbers moved into the period. Those on a grid that divides it stay on the grid."""
        wrapped = x - self.period * np.floor((x - self.start) / self.period)
        if grid and self.is_divided_by(grid):
            wrapped = np.where(on_grid(x, grid), tidy(wrapped, grid), wrapped)
        is_inside = (wrapped >= self.start) & (wrapped < self.end)
        wrapped = np.where(is_inside, wrapped, self.start)  # rounding may give the end
        return np.where((x >= self.start) & (x < self.end), x, wrapped)

    @property
    def end(self) -> float:
        """The end of the period, which is the start."""
        return self.start + self.period

    def is_divided_by(self, grid: float) -> bool:
        """Whether the period is a multiple of a grid."""
        return bool(on_grid(np.array(self.period), grid))

    def from_grid(self, grid: float) -> "Circle":
        """The period from the first number on a grid."""
        return Circle(math.ceil(self.start / grid) * grid, self.period)
