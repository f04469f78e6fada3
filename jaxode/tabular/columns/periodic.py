"""Numbers on a circle, such as wind directions and hours of the day."""

import math
from dataclasses import dataclass

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.columns.multiples import on_grid, tidy

PERIODS = 1.0, 2 * math.pi, 7.0, 12.0, 24.0, 60.0, 360.0
TURN = 2 * math.pi  # the period of scaled numbers


@dataclass(frozen=True)
class Circle:
    """One period, from its start on."""

    start: float
    period: float

    @classmethod
    def of(cls, name: str, values: np.ndarray, period: float | None) -> "Circle":
        """From 0; from 1 for whole numbers from 1 to about the period, such as months and days of
        the year; or from minus half a period if there are negative values. Without a period, the
        first of `PERIODS` that holds them; whole numbers have a whole period of several."""
        low, high = float(values.min()), float(values.max())
        whole = bool((values == np.round(values)).all())

        def of(period: float) -> Circle:
            from_one = whole and low >= 1 and period - 1 < high < period + 1
            return cls(-period / 2 if low < 0 else float(from_one), float(period))

        if period is not None:
            return of(period)
        for period in PERIODS[2 if whole else 0 :]:
            circle = of(period)
            if circle.start <= low and high <= circle.end:
                return circle
        raise ValueError(
            f"{arg('kinds')} column {name!r} must have a period that is given, since its values, "
            f"from {low:g} to {high:g}, fit no usual one; got 'periodic' alone. Pass ('periodic', "
            "period)."
        )

    def wrapped(self, x: np.ndarray, grid: float) -> np.ndarray:
        """Numbers in the period; those on a grid that divides it stay on it."""
        moved = x - self.period * np.floor((x - self.start) / self.period)
        if grid and self.is_divided_by(grid):
            moved = np.where(on_grid(x, grid), tidy(moved, grid), moved)
        inside = (moved >= self.start) & (moved < self.end)
        moved = np.where(inside, moved, self.start)  # else rounded to the end
        return np.where((x >= self.start) & (x < self.end), x, moved)

    @property
    def end(self) -> float:
        """The end of the period, which is the start."""
        return self.start + self.period

    def is_divided_by(self, grid: float) -> bool:
        """Whether a grid goes on after a period."""
        return bool(on_grid(np.array(self.period), grid))

    def from_grid(self, grid: float) -> "Circle":
        """The period from the first number on a grid."""
        return Circle(math.ceil(self.start / grid) * grid, self.period)
