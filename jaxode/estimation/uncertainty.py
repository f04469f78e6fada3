"""Standard errors and the likelihood at the end of a search, and warnings of both."""

import math
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode.estimation.observed.bounds import names
from jaxode.estimation.observed.likelihoods import Laplace, Likelihood, Poisson
from jaxode.estimation.observed.observed_system import ObservedODE

# A direction changes no residual if its singular value is below this part of the largest one.
NULL_SINGULAR_VALUE = {jnp.dtype("float64"): 1e-7, jnp.dtype("float32"): 1e-4}
# A parameter is undetermined if its component in such a direction is above this.
NULL_COMPONENT = 1e-3
# Warn of standard errors above this, in units of 1 + |parameter|.
VAGUE_ERROR = 10.0
# Ends whose costs differ by fewer nats are as likely.
SAME_NATS = 0.01
# So are ends that differ by less than this for each observation, in squares of its spread: solves
# have such errors.
SAME_SQUARE = 1e-10
# Parameters that differ by less than this part are the same.
SAME_PARAMETER = 1e-3
# Warn of residuals beyond the noise if their chi-square is this many standard deviations above its
# mean,
UNLIKELY_DEVIATIONS = 4.5
# and above this many times its mean: a smaller factor hardly changes standard errors.
UNLIKELY_FACTOR = 1.2


def has_noise(problem: ObservedODE) -> bool:
    """Whether the likelihood has a noise."""
    likelihood = problem.likelihood
    return isinstance(likelihood, Likelihood) and likelihood.noise_rule != "unused"


def has_known_variance(problem: ObservedODE) -> bool:
    """Whether the user says how large residuals should be."""
    return not (problem.estimated or problem.is_density)


def chi_square(problem: ObservedODE, residuals: np.ndarray, cost: float) -> float:
    """A statistic whose mean is the degrees of freedom if the noise is right, and which varies no
    more than a sum of squares."""
    # The cost of Laplace's likelihood is the sum of the distances in units of their mean.
    return cost if isinstance(problem.likelihood, Laplace) else float(np.sum(residuals**2))


def cure(problem: ObservedODE) -> str:
    """Advice for counts whose variance is too large."""
    of_poisson = isinstance(problem.likelihood, Poisson)
    return ": try likelihood='negative_binomial'" if of_poisson else ""


def nll_of(problem: ObservedODE, params: PyTree, cost: float, used: int) -> Float[Array, ""]:
    """Minus the log-likelihood, with constants, from the cost at its end."""
    if problem.likelihood is None:
        return jnp.asarray(jnp.nan, problem.ts.dtype)
    nll = cost - 0.5 * float(jnp.sum(problem.prior_residuals(params) ** 2))
    if not problem.is_density:
        of_each = problem.likelihood.saturated(problem.ys, problem.noise_at(params))
        nll += float(jnp.sum(jnp.where(jnp.isnan(problem.ys), 0.0, of_each)))
    if problem.estimated and cost > 0:
        # At the likeliest noise, the mean square of residuals by the noise is one.
        square = 2 * cost / used
        nll += 0.5 * used * (math.log(square) + 1 - square)
    return jnp.asarray(nll, problem.ts.dtype)


def is_unlikely(square: float, degrees: int) -> bool:
    """Whether a chi-square is too large for its degrees of freedom, by Wilson and Hilferty (1931),
    and changes standard errors."""
    if degrees <= 0 or square <= UNLIKELY_FACTOR * degrees:
        return False
    spread = 2 / (9 * degrees)
    return (square / degrees) ** (1 / 3) - (1 - spread) > UNLIKELY_DEVIATIONS * math.sqrt(spread)


def uncertainty(
    jacobian: np.ndarray, scale: float, tiny: float, movable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The covariance and the standard errors of the movable parameters, with the others fixed.

    They are infinite for undetermined parameters, and NaN for those that are not movable. Singular
    values up to a `tiny` part of the largest one count as zero.
    """
    units, values, vectors = _directions(jacobian, movable)
    null = values <= max(values[0], 1e-30) * tiny
    undetermined = np.asarray((np.abs(vectors[null]) > NULL_COMPONENT).any(axis=0))
    inverse = vectors[~null].T / values[~null] ** 2 @ vectors[~null]
    covariance = scale * inverse / units / units[:, None]
    infinite = np.where(np.eye(len(units)) > 0, np.inf, 0.0)
    covariance = np.where(undetermined | undetermined[:, None], infinite, covariance)
    covariance = np.where(movable & movable[:, None], covariance, np.nan)
    return covariance, np.sqrt(np.diag(covariance))


def covariance_without_bounds(
    jacobian: np.ndarray, scale: float, tiny: float, movable: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """The covariance as if no parameter had come to a bound; `covariance` if bounds determine
    another parameter."""
    unbounded, _ = uncertainty(jacobian, scale, tiny, movable)
    lost = np.isinf(np.diag(unbounded)) & np.isfinite(np.diag(covariance))
    return covariance if lost.any() else unbounded


def is_vague(flat: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Which parameters the observations do not determine."""
    return errors > VAGUE_ERROR * (1 + np.abs(flat))


def gain_left(
    jacobian: np.ndarray, gradient: np.ndarray, tiny: float, movable: np.ndarray
) -> float:
    """How much lower the cost may be, by the Fisher information: half of Newton's decrement, in
    directions that change a residual."""
    units, values, vectors = _directions(jacobian, movable)
    determined = values > max(values[0], 1e-30) * tiny
    down = np.where(movable, gradient, 0.0) / units
    along = vectors[determined] @ down / values[determined]
    return 0.5 * float(np.sum(along**2))


def _directions(jacobian: np.ndarray, movable: np.ndarray) -> tuple[np.ndarray, Any, np.ndarray]:
    """The units of the parameters, and the singular values and vectors of the Jacobian in them."""
    jacobian = np.where(movable, np.nan_to_num(jacobian), 0.0)
    # With at least as many rows as parameters, every direction has a vector.
    jacobian = np.pad(jacobian, ((0, jacobian.shape[1]), (0, 0)))
    sizes = np.linalg.norm(jacobian, axis=0)
    units = np.where(sizes > 0, sizes, 1.0)
    _, values, vectors = np.linalg.svd(jacobian / units, full_matrices=False)
    return units, values, vectors


def warn_of_parameters(
    problem: ObservedODE, flat: np.ndarray, errors: np.ndarray, stopped: np.ndarray
) -> None:
    """Warn of parameters at a bound, and of those that the observations do not determine."""
    labels = np.asarray(names(problem.template))
    if stopped.any():
        warnings.warn(
            f"estimate: {', '.join(labels[stopped])} ended at a bound. The standard errors are "
            "those of the others, with these fixed.",
            stacklevel=6,
        )
    vague = is_vague(flat, errors)
    if vague.any():
        warnings.warn(
            f"estimate: the observations do not determine {', '.join(labels[vague])}: their "
            "standard errors are of no use. They run away, or others make up for them. Fix "
            "them, give a prior or bounds, or look at Estimate.profile.",
            stacklevel=6,
        )


def warn_of_modes(
    problem: ObservedODE, flat: np.ndarray, errors: np.ndarray, flats: np.ndarray
) -> None:
    """Warn if the ends `flats` of starts, which are as likely as `flat`, differ from it by more
    than a standard error in a parameter that is determined."""
    clear = ~(is_vague(flat, errors) | np.isnan(errors))
    least = np.maximum(errors, SAME_PARAMETER * np.abs(flat) + SAME_PARAMETER**2)
    differ = clear & (np.abs(flats - flat) > least)
    if differ.any():
        other = flats[np.argmax(differ.any(axis=1))]
        labels = names(problem.template)
        pairs = [
            f"{labels[i]} {flat[i]:.3g} or {other[i]:.3g}"
            for i in np.flatnonzero(np.abs(other - flat) > least)
        ]
        warnings.warn(
            f"estimate: starts end at different parameters that are as likely: {', '.join(pairs)}. "
            "Choose by bounds or a prior. Estimate.starts has all ends.",
            stacklevel=6,
        )
