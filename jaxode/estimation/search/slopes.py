"""A first guess of parameters: slopes of smoothed observations, matched by the field.

Varah (1982, doi:10.1137/0903003). Smoothing splines are those of SciPy, by cross-validation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.arguments import check_derivative
from jaxode.estimation.observed.bounds import Bounds
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.levenberg_marquardt import STARTS_AT_ONCE, minimize
from jaxode.estimation.search.objectives import Objective
from jaxode.ode.field import call_field
from jaxode.training.budget import Budget

# SciPy's smoothing splines need this many observations of a series.
FEWEST_FOR_A_SPLINE = 5
# The largest number of steps of the search that matches slopes, which needs no solve.
MATCHING_STEPS = 100


def smoothed(ts: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Smooth series `[..., times]`: values and slopes at their times.

    Returns None if a series has too few observations, or at too uneven times.
    """
    from scipy.interpolate import make_smoothing_spline

    values, slopes = np.full(ys.shape, np.nan), np.full(ys.shape, np.nan)
    for i in np.ndindex(ys.shape[:-1]):
        first = np.unique(ts[i], return_index=True)[1]
        observed = first[~np.isnan(ys[i][first])]
        if len(observed) < FEWEST_FOR_A_SPLINE:
            return None
        start, unit = ts[i][observed[0]], np.ptp(ts[i][observed]) / (len(observed) - 1)
        at = (ts[i] - start) / unit  # SciPy's bounds of the smoothing fit a spacing of about one
        try:
            spline = make_smoothing_spline(at[observed], ys[i][observed])
        except ValueError:  # too uneven
            return None
        values[i], slopes[i] = spline(at), spline.derivative()(at) / unit
    return values, slopes


class OfSlopes(Objective):
    """Squares of the distances between slopes of the smoothed observations and those of `f`."""

    problem: ObservedODE
    values: Float[Array, "..."]
    slopes: Float[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def count(self) -> int:
        return self.slopes.size

    def quantities(self, flat, start):
        problem = self.problem
        params = problem.with_args(problem.unravel(flat))

        def slope(t, y, row):
            dy = call_field(problem.f, t, y, params, row=row)
            check_derivative(y, dy, casts=True)
            return jnp.asarray(dy)

        at_times = jax.vmap(slope, (0, 0, None))
        if problem.ts.ndim == 1:
            slopes = at_times(problem.ts, self.values, None)
        else:
            slopes = jax.vmap(at_times)(problem.ts, self.values, problem.row_args)
        return ((slopes - self.slopes) / self.scale).ravel()


def match_slopes(
    problem: ObservedODE, starts: Float[Array, "starts n"], bounds: Bounds, budget: Budget
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fit the slopes of `f` to those of the smoothed observations, by least squares.

    Returns the parameters and costs where each start ends; None if there are too few observations,
    or `f` is not finite at any start.
    """
    ts, ys = np.asarray(problem.ts, float), np.asarray(problem.ys, float)
    axis = ts.ndim - 1  # of the times, which `smoothed` takes last
    series = np.moveaxis(ys, axis, -1)
    times = ts.reshape(ts.shape[:-1] + (1,) * (ys.ndim - ts.ndim) + ts.shape[-1:])
    curves = smoothed(np.broadcast_to(times, series.shape), series)
    if curves is None:
        return None
    scale = curves[1].std(axis=-1, keepdims=True)
    scale = np.where(np.isnan(series), np.inf, np.where(scale > 0, scale, 1.0))
    values, slopes, scale = (
        jnp.asarray(np.moveaxis(x, -1, axis), starts.dtype) for x in (*curves, scale)
    )
    objective = OfSlopes(problem, values, slopes, scale)
    size = min(STARTS_AT_ONCE, len(starts))
    fits = minimize(objective, np.asarray(starts), bounds, MATCHING_STEPS, size=size, budget=budget)
    return (fits.flats, fits.costs) if np.isfinite(fits.costs).any() else None
