"""Multiples of the spacing of a grid."""

import numpy as np

EPS = np.finfo(float).eps
LARGEST_MULTIPLE = 2.0**50  # up to this, double precision tells multiples apart after rounding


def on_grid(x: np.ndarray, grid: float) -> np.ndarray:
    """Mark numbers that are multiples of the spacing, up to rounding."""
    if not grid:
        return np.ones(np.shape(x), bool)
    return np.abs(x - tidy(x, grid)) <= 2 * EPS * np.abs(x)


def tidy(x: np.ndarray, grid: float) -> np.ndarray:
    """The closest multiples of the spacing, as their decimals would be read."""
    multiple = np.round(x / grid)
    return multiple / round(1 / abs(grid)) * np.sign(grid) if abs(grid) < 1 else multiple * grid
