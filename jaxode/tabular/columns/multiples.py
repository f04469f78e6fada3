"""Multiples of a distance."""

import numpy as np

EPS = np.finfo(float).eps
LARGEST_MULTIPLE = 2.0**50  # integers, which double precision and its rounding tell apart


def on_grid(x: np.ndarray, grid: float) -> np.ndarray:
    """Which numbers are multiples of the distance, up to rounding."""
    if not grid:
        return np.ones(np.shape(x), bool)
    return np.abs(x - tidy(x, grid)) <= 2 * EPS * np.abs(x)


def tidy(x: np.ndarray, grid: float) -> np.ndarray:
    """Multiples of the distance as a decimal would be read."""
    multiple = np.round(x / grid)
    return multiple / round(1 / abs(grid)) * np.sign(grid) if abs(grid) < 1 else multiple * grid
