"""Irregular series with gaps: exact likelihoods, forecasts with bands, and states."""

from jaxode.series.fit_series import fit
from jaxode.series.long_tables import from_frame
from jaxode.series.series_model import Series

__all__ = ["Series", "fit", "from_frame"]
