"""Curves of level and value of a distribution, and integrals over them."""

import numpy as np

CURVE_DEVIATIONS = 4.5  # of the base, to which a curve reaches on either side
POINTS_PER_ROUND = 16  # that a round of refinement adds to a curve
MAX_AREA = 0.03  # of the rectangle of two neighbours, in units of the spread: else refine
POINTS_BETWEEN = 8  # of a straight line between two points


def refined(q: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers between those of a curve, most where it is coarse; and which rows are coarse.

    The curve increases, so it lies within the rectangles of neighbours, whose areas are the error
    of an integral at most. Their sum is least with so many points in each as its root.
    """
    area = np.diff(q, axis=1) * np.diff(x, axis=1)
    middle = 0.5 * (q[:, 1:] + q[:, :-1])
    spread = np.sum(middle * (1 - middle) * np.diff(x, axis=1), axis=1)
    coarse = area.max(axis=1) > MAX_AREA * spread
    sums = np.cumsum(np.pad(np.sqrt(area), ((0, 0), (1, 0))), axis=1)
    position = (np.arange(POINTS_PER_ROUND) + 0.5) / POINTS_PER_ROUND
    rows = zip(sums, x, strict=True)
    return np.stack([np.interp(position * s[-1], s, numbers) for s, numbers in rows]), coarse


def points_between(q: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of a curve that is straight between its points, in units of the base."""
    from scipy.special import ndtr, ndtri

    z = np.clip(ndtri(q), -CURVE_DEVIATIONS, CURVE_DEVIATIONS)[..., None]
    position = np.arange(POINTS_BETWEEN + 1) / POINTS_BETWEEN
    levels = ndtr(z[:, :-1] + np.diff(z, axis=1) * position)
    weights = np.diff(levels, axis=2).reshape(len(q), -1)
    steps = np.diff(x, axis=1)[..., None] * (0.5 * (position[1:] + position[:-1]))
    values = (x[:, :-1, None] + steps).reshape(len(q), -1)
    return values, weights / weights.sum(axis=1, keepdims=True)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The expected value of each row."""
    return np.sum(values * weights, axis=1)


def crps(values: np.ndarray, weights: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`E|Y - y| - E|Y - Y'| / 2` of each row."""
    below = np.cumsum(weights, axis=1) - weights / 2
    spread = np.sum(weights * values * (2 * below - 1), axis=1)
    return np.sum(weights * np.abs(values - y[:, None]), axis=1) - spread
