"""Checks of the shape of an event and of the periods of its coordinates."""

import math
import operator
from typing import Any

import numpy as np

from jaxode._checks.caller import arg


def as_event_shape(event_shape: Any, name: str = "event_shape") -> tuple[int, ...]:
    """Check the argument `name` and return it as a tuple. An integer stands for a vector."""
    try:
        shape = tuple(map(operator.index, np.atleast_1d(event_shape)))
    except TypeError:
        shape = (0,)
    if not all(size > 0 for size in shape):
        raise ValueError(f"{arg(name)} must be positive integers; got {event_shape!r}.")
    return shape


def as_period(period: Any, shape: tuple[int, ...]) -> tuple[float, ...]:
    """Check the argument `period` and return the period of each coordinate."""
    try:
        periods = np.broadcast_to(np.asarray(period, float), shape)
    except (TypeError, ValueError):
        periods = np.zeros(1)
    if not (periods > 0).all():  # false for NaN, too
        raise ValueError(
            f"{arg('period')} must be positive numbers that broadcast to {shape}, infinite for "
            f"coordinates that are no angles; got {period!r}."
        )
    return tuple(map(float, periods.reshape(-1)))


def radius_of(period: tuple[float, ...]) -> np.ndarray:
    """The radius of each angle's circle, `period / (2 pi)`; one where the period is infinite."""
    return np.where(np.isfinite(period), np.asarray(period) / (2 * math.pi), 1.0)
