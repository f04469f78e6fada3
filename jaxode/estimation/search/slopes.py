"""A first guess of parameters: slopes of smoothed observations, matched by the field.

Varah (1982, doi:10.1137/0903003). Smoothing splines are those of SciPy, by cross-validation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.arguments import check_derivative
from jaxode.estimation.observed.observed_system import ObservedODE
from jaxode.estimation.search.budget import Budget
from jaxode.estimation.search.levenberg_marquardt import STARTS_AT_ONCE, Box, minimize
from jaxode.estimation.search.objectives import Objective
from jaxode.ode.field import call_field

FEWEST_FOR_A_SPLINE = 5  # observations of a series
MATCHING_STEPS = 100


def smoothed(ts: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and slopes of series `[..., times]` at their times, NaN where none was observed; None
    where there are too few, or too uneven ones."""
    from scipy.interpolate import make_smoothing_spline

    values, slopes = np.full(ys.shape, np.nan), np.full(ys.shape, np.nan)
    for i in np.ndindex(ys.shape[:-1]):
        first = np.unique(ts[i], return_index=True)[1]
        kept = first[~np.isnan(ys[i][first])]
        if len(kept) < FEWEST_FOR_A_SPLINE:
            return None
        start, unit = ts[i][kept[0]], np.ptp(ts[i][kept]) / (len(kept) - 1)
        at = (ts[i] - start) / unit  # SciPy's bounds of the smoothing fit a spacing of about one
        try:
            spline = make_smoothing_spline(at[kept], ys[i][kept])
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
        params = problem.given(problem.unravel(flat))

        def slope(t, y, row):
            dy = call_field(problem.f, t, y, params, row=row)
            check_derivative(y, dy, casts=True)
            return jnp.asarray(dy)

        each = jax.vmap(slope, (0, 0, None))
        if problem.ts.ndim == 1:
            found = each(problem.ts, self.values, None)
        else:
            found = jax.vmap(each)(problem.ts, self.values, problem.row_args)
        return ((found - self.slopes) / self.scale).ravel()


def match_slopes(problem: ObservedODE, starts: Float[Array, "starts n"], box: Box, budget: Budget):
    """The end of least squares of slopes from each start, and the half sums; None where there
    are too few observations, or `f` is finite at none."""
    ts, ys = np.asarray(problem.ts, float), np.asarray(problem.ys, float)
    axis = ts.ndim - 1  # of the times, which `smoothed` takes last
    series = np.moveaxis(ys, axis, -1)
    times = ts.reshape(ts.shape[:-1] + (1,) * (ys.ndim - ts.ndim) + ts.shape[-1:])
    found = smoothed(np.broadcast_to(times, series.shape), series)
    if found is None:
        return None
    scale = found[1].std(axis=-1, keepdims=True)
    scale = np.where(np.isnan(series), np.inf, np.where(scale > 0, scale, 1.0))
    values, slopes, scale = (
        jnp.asarray(np.moveaxis(x, -1, axis), starts.dtype) for x in (*found, scale)
    )
    objective = OfSlopes(problem, values, slopes, scale)
    size = min(STARTS_AT_ONCE, len(starts))
    ends = minimize(objective, np.asarray(starts), box, MATCHING_STEPS, size=size, budget=budget)
    return (ends.flats, ends.costs) if np.isfinite(ends.costs).any() else None
