"""What the end of a search says: likelihood, standard errors, and whether noise explains it."""

import math
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode.estimation.observed.bounds import names
from jaxode.estimation.observed.likelihoods import Laplace, Likelihood, Poisson
from jaxode.estimation.observed.observed_system import ObservedODE

# The largest singular value, as a part of the first, of a direction that changes no residual.
NULL_SINGULAR_VALUE = {jnp.dtype("float64"): 1e-7, jnp.dtype("float32"): 1e-4}
NULL_COMPONENT = 1e-3  # the largest component of a null vector in a parameter that is determined
VAGUE_ERROR = 10.0  # warn of standard errors above this, in units of 1 + |parameter|
# Ends are as likely if they differ by so many nats and such a part of the squared spread of each
# observation; parameters are the same if they differ by less than that part.
SAME_NATS, SAME_SQUARE, SAME_PARAMETER = 0.01, 1e-10, 1e-3
# Warn of residuals beyond the given noise if their chi-square is this many standard deviations
# above its mean, and this many times the mean: a smaller factor hardly changes standard errors.
UNLIKELY_DEVIATIONS, UNLIKELY_FACTOR = 4.5, 1.2


def has_noise(problem: ObservedODE) -> bool:
    """Whether the likelihood has a noise."""
    of = problem.likelihood
    return isinstance(of, Likelihood) and of.noise_rule != "unused"


def has_known_variance(problem: ObservedODE) -> bool:
    """Whether residuals can be too large for what is known of the noise."""
    return not (problem.estimated or problem.is_density)


def chi_square(problem: ObservedODE, residuals: np.ndarray, cost: float) -> float:
    """What is about the degrees of freedom if the noise is as known, and varies by chance no more
    than a sum of squares does."""
    # Those of Laplace are not squares. Its distances in units of their mean add up to the cost.
    return cost if isinstance(problem.likelihood, Laplace) else float(np.sum(residuals**2))


def cure(problem: ObservedODE) -> str:
    """What to try for counts whose variance is too large."""
    of_poisson = isinstance(problem.likelihood, Poisson)
    return ": try likelihood='negative_binomial'" if of_poisson else ""


def nll_of(problem: ObservedODE, params: PyTree, cost: float, used: int) -> Float[Array, ""]:
    """Minus the log-likelihood, with constants, from the cost at its end."""
    if problem.likelihood is None:
        return jnp.asarray(jnp.nan, problem.ts.dtype)
    found = cost - 0.5 * float(jnp.sum(problem.prior_residuals(params) ** 2))
    if not problem.is_density:
        of_each = problem.likelihood.saturated(problem.ys, problem.noise_at(params))
        found += float(jnp.sum(jnp.where(jnp.isnan(problem.ys), 0.0, of_each)))
    if problem.estimated and cost > 0:
        # The noise that is likeliest has a mean square of one in units of itself.
        square = 2 * cost / used
        found += 0.5 * used * (math.log(square) + 1 - square)
    return jnp.asarray(found, problem.ts.dtype)


def is_unlikely(square: float, free: int) -> bool:
    """Whether a chi-square is too large, by Wilson and Hilferty (1931), and by how much errors
    would change."""
    if free <= 0 or square <= UNLIKELY_FACTOR * free:
        return False
    spread = 2 / (9 * free)
    return (square / free) ** (1 / 3) - (1 - spread) > UNLIKELY_DEVIATIONS * math.sqrt(spread)


def uncertainty(jacobian: np.ndarray, scale: float, tiny: float, free: np.ndarray):
    """The covariance and the standard errors of the parameters, infinite for those without effect.
    Singular values up to this `tiny` part of the largest count as zero. They are NaN for those that
    are not free, and those of the others have these fixed."""
    units, values, vectors = _directions(jacobian, free)
    none = values <= max(values[0], 1e-30) * tiny
    lost = np.asarray((np.abs(vectors[none]) > NULL_COMPONENT).any(axis=0))
    inverse = vectors[~none].T / values[~none] ** 2 @ vectors[~none]
    covariance = scale * inverse / units / units[:, None]
    unknown = np.where(np.eye(len(units)) > 0, np.inf, 0.0)
    covariance = np.where(lost | lost[:, None], unknown, covariance)
    covariance = np.where(free & free[:, None], covariance, np.nan)
    return covariance, np.sqrt(np.diag(covariance))


def covariance_without_bounds(
    jacobian: np.ndarray, scale: float, tiny: float, free: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """The covariance as if no parameter had come to a bound; `covariance` if it is the bounds that
    determine another parameter."""
    unbounded, _ = uncertainty(jacobian, scale, tiny, free)
    lost = np.isinf(np.diag(unbounded)) & np.isfinite(np.diag(covariance))
    return covariance if lost.any() else unbounded


def is_vague(flat: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Which parameters the observations do not determine."""
    return errors > VAGUE_ERROR * (1 + np.abs(flat))


def gain_left(jacobian: np.ndarray, gradient: np.ndarray, tiny: float, free: np.ndarray) -> float:
    """How much lower the cost may be, by the Fisher information: half of Newton's decrement, in
    directions that change a residual."""
    units, values, vectors = _directions(jacobian, free)
    known = values > max(values[0], 1e-30) * tiny
    along = vectors[known] @ (np.where(free, gradient, 0.0) / units) / values[known]
    return 0.5 * float(np.sum(along**2))


def _directions(jacobian: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, Any, np.ndarray]:
    """The units of the parameters, and the singular values and vectors of the Jacobian in them."""
    jacobian = np.where(free, np.nan_to_num(jacobian), 0.0)
    # At least as many rows as parameters, so that every direction has a vector.
    jacobian = np.pad(jacobian, ((0, jacobian.shape[1]), (0, 0)))
    sizes = np.linalg.norm(jacobian, axis=0)
    units = np.where(sizes > 0, sizes, 1.0)
    _, values, vectors = np.linalg.svd(jacobian / units, full_matrices=False)
    return units, values, vectors


def warn_of_parameters(
    problem: ObservedODE, flat: np.ndarray, errors: np.ndarray, stopped: np.ndarray
) -> None:
    """Warn of parameters at a bound, and of those that the observations do not determine."""
    called = np.asarray(names(problem.template))
    if stopped.any():
        warnings.warn(
            f"estimate: {', '.join(called[stopped])} ended at a bound. The standard errors are "
            "those of the others, with these fixed.",
            stacklevel=5,
        )
    vague = is_vague(flat, errors)
    if vague.any():
        warnings.warn(
            f"estimate: the observations do not determine {', '.join(called[vague])}: their "
            "standard errors are of no use. They run away, or others make up for them. Fix "
            "them, give a prior or bounds, or look at Estimate.profile.",
            stacklevel=5,
        )


def warn_of_modes(
    problem: ObservedODE, flat: np.ndarray, errors: np.ndarray, others: np.ndarray
) -> None:
    """Warn of ends that are as likely, but whose parameters differ by more than chance. Those that
    the observations do not determine may differ."""
    clear = ~(is_vague(flat, errors) | np.isnan(errors))
    least = np.maximum(errors, SAME_PARAMETER * np.abs(flat) + SAME_PARAMETER**2)
    differ = clear & (np.abs(others - flat) > least)
    if differ.any():
        other = others[np.argmax(differ.any(axis=1))]
        called = names(problem.template)
        pairs = [
            f"{called[i]} {flat[i]:.3g} or {other[i]:.3g}"
            for i in np.flatnonzero(np.abs(other - flat) > least)
        ]
        warnings.warn(
            f"estimate: starts end at different parameters that are as likely: {', '.join(pairs)}. "
            "Choose by bounds or a prior. Estimate.starts has all ends.",
            stacklevel=5,
        )
