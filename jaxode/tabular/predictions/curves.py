"""Curves of level and value of a distribution, and integrals over them."""

import numpy as np

CURVE_DEVIATIONS = 4.5  # standard deviations of the base that a curve reaches to either side
POINTS_PER_ROUND = 16  # points that a round of refinement adds to a curve
MAX_AREA = 0.03  # refine if a rectangle between two neighbours is larger, in spreads of the curve
POINTS_BETWEEN = 8  # points on the line between two neighbours


def refined(q: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers to add to a curve, most of them where it is coarse; and the mask of coarse rows.

    The curve increases, so it lies within the rectangles of neighbours, and their areas bound the
    error of an integral. The bound is least if the new points fall in proportion to their roots.
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
    """Values and weights of a curve that is straight between points of values and deviates."""
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
