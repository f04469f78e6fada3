"""Where a search ends: the best fit, how sure its parameters are, and warnings of both."""

import math
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode.estimation.search.starts import MultiStart, Outcomes
from jaxode.estimation.uncertainty import (
    NULL_SINGULAR_VALUE,
    SAME_NATS,
    SAME_SQUARE,
    chi_square,
    covariance_without_bounds,
    cure,
    gain_left,
    has_known_variance,
    has_noise,
    is_unlikely,
    is_vague,
    uncertainty,
    warn_of_modes,
    warn_of_parameters,
)


class Fit(NamedTuple):
    """Where the best run ended, and how well it fits."""

    flat: Float[np.ndarray, " n"]
    params: PyTree
    cost: float
    converged: bool
    information: Float[np.ndarray, "k n"]
    """A root of the Fisher information, without the scale."""
    gradient: Float[np.ndarray, " n"]
    """The gradient of the cost."""
    parameters: int
    """The number of movable parameters, the noise too if the residuals say it."""
    observations: int
    """The number of observations that are not missing."""
    square: float
    """A statistic whose mean is `degrees` if the noise is right."""
    degrees: int
    """Degrees of freedom of the residuals."""
    scale: float
    """Multiplies covariances: the estimated variance of the noise, in the unit of the cost, or
    one."""
    noise: Array | None
    """The noise of the estimate."""


class Precision(NamedTuple):
    """How sure the parameters are."""

    covariance: Float[np.ndarray, "n n"]
    unbounded: Float[np.ndarray, "n n"]
    """The covariance as if no parameter had come to a bound."""
    errors: Float[np.ndarray, " n"]
    at_bound: Bool[np.ndarray, " n"]
    """Which parameters ended at a bound, or are fixed."""
    converged: bool
    """Whether the search has converged, or little is left to gain."""


def best_fit(search: MultiStart, outcomes: Outcomes) -> Fit:
    """The run that costs least, and the noise that its residuals say."""
    problem, best = search.problem, int(np.argmin(outcomes.costs))
    flat, cost = outcomes.runs.flats[best], float(outcomes.costs[best])
    residuals, dtype = outcomes.residuals[best], problem.ts.dtype
    params = problem.unravel(jnp.asarray(flat, dtype))
    observations = int((~np.isnan(problem.ys)).sum())
    # A prior adds a row for each of its residuals; a missing observation has none.
    rows = len(residuals) - (problem.ys.size - observations)
    parameters = int(search.bounds.movable.sum())
    square, degrees = chi_square(problem, residuals, cost), rows - parameters
    noise, scale = None, 1.0
    if problem.estimated:
        scale, parameters = square / degrees, parameters + 1
        noise = jnp.asarray(math.sqrt(scale) * problem.unit, dtype)
    elif has_noise(problem):
        noise = problem.noise_at(params) if callable(problem.noise) else problem.noise
    return Fit(
        flat, params, cost, bool(outcomes.converged[best]), outcomes.information[best],
        outcomes.gradients[best], parameters, observations, square, degrees, scale, noise,
    )  # fmt: skip


def precision_of(search: MultiStart, fit: Fit) -> Precision:
    """The standard errors of a fit, and whether it is as good as it can be."""
    bounds, tiny = search.bounds, NULL_SINGULAR_VALUE[search.problem.ts.dtype]
    at_bound = (fit.flat <= np.asarray(bounds.lower)) | (fit.flat >= np.asarray(bounds.upper))
    covariance, errors = uncertainty(fit.information, fit.scale, tiny, ~at_bound)
    unbounded = covariance_without_bounds(
        fit.information, fit.scale, tiny, bounds.movable, covariance
    )
    converged = fit.converged
    if not converged and is_vague(fit.flat, errors).any():
        # Steps never become small along parameters that are not determined.
        gain = gain_left(fit.information, fit.gradient, tiny, ~at_bound)
        converged = gain < SAME_NATS * fit.scale
    return Precision(covariance, unbounded, errors, at_bound, converged)


def warn_of_fit(
    search: MultiStart, fit: Fit, precision: Precision, flats: np.ndarray, costs: np.ndarray
) -> None:
    """Warn if the fit or its errors are not to be relied on. The starts ended at `flats`."""
    problem = search.problem
    if precision.converged and has_known_variance(problem) and is_unlikely(fit.square, fit.degrees):
        warnings.warn(
            f"estimate: residuals are {math.sqrt(fit.square / fit.degrees):.3g} times the noise: "
            f"half their squares sum to {fit.square / 2:.3g} for {fit.degrees} degrees of freedom. "
            f"The model does not fit, or the noise is larger{cure(problem)}. The standard errors "
            "are too small.",
            stacklevel=5,
        )
    movable = search.bounds.movable
    warn_of_parameters(problem, fit.flat, precision.errors, precision.at_bound & movable)
    alike = costs - fit.cost <= SAME_NATS * fit.scale + SAME_SQUARE * fit.observations
    warn_of_modes(problem, fit.flat, precision.errors, flats[alike])
    if not precision.converged:
        warnings.warn(
            f"estimate: the search {search.budget.describe()}. The standard errors may be wrong. "
            "Start nearer, give more time, or lower rtol and atol.",
            stacklevel=5,
        )
