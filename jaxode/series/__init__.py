"""Irregular series with gaps: exact likelihoods, forecasts with bands, and states."""

from jaxode.series.frames import from_frame
from jaxode.series.model import Series
from jaxode.series.training import fit

__all__ = ["Series", "fit", "from_frame"]
