"""An integral by importance sampling, with proposals made from samples."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from jaxode.density.importance import Importance
from jaxode.density.importance import importance as judge

CENTERS, OTHERS = 512, 4096  # samples to propose around, and others to judge the proposals by
# Shares of the proposals: around samples (any shape, in few dimensions), from a normal with their
# mean and covariance (many dimensions), and with heavier tails (against huge weights).
PARTS = (0.5, 0.4, 0.1)
FREEDOM = 3.0
# In more dimensions, noise in the covariance exceeds the correlations.
CORRELATED_UP_TO = 32


def importance(
    key: PRNGKeyArray,
    samples: Float[np.ndarray, "count *event"],
    log_density: Callable[[np.ndarray], np.ndarray],
) -> Importance:
    """The weights of samples of a proposal, whose mean is the integral of the density.

    There are as many proposals as samples. A weight is the density divided by the density of the
    proposal mixture. A narrow mode that proposals miss shows in the weights of the samples there:
    by their mean, too, the effective sample size is bounded.

    References: Owen and Zhou (2000), doi:10.1080/01621459.2000.10473909.
    """
    count, event = len(samples), samples.shape[1:]
    flat = np.asarray(samples, float).reshape(count, -1)
    size, mean = flat.shape[1], flat.mean(axis=0)
    axes, scale = _principal_axes(flat - mean)
    centers = _times(flat[:CENTERS] - mean, axes) / scale
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))
    sizes = [round(part * count) for part in PARTS]
    width = (4 / (len(centers) * (size + 2))) ** (1 / (size + 4))  # Silverman (1986)
    around, normal, heavy = (rng.standard_normal((n, size)) for n in sizes)
    around = centers[rng.integers(len(centers), size=sizes[0])] + width * around
    heavy *= np.sqrt(FREEDOM / rng.chisquare(FREEDOM, size=(sizes[2], 1)))
    proposals = np.concatenate([around, normal, heavy])
    back = None if axes is None else axes.T

    def log_weights(points):
        log_values = log_density((_times(points * scale, back) + mean).reshape(-1, *event))
        log_proposal = _log_mixture(points, centers, width) - np.sum(np.log(scale))
        # In many dimensions, both overflow but their ratio does not.
        return log_values - log_proposal

    found, others = judge(log_weights(proposals)), flat[CENTERS : CENTERS + OTHERS]
    if not len(others):
        return found
    of_others = log_weights(_times(others - mean, axes) / scale)
    log_mean = float(np.logaddexp.reduce(of_others)) - math.log(len(others))
    # The effective sample size is `(E_q w)^2 / E_q w^2`, which is `E_q w / E_p w`.
    ess = jnp.minimum(found.ess, jnp.exp(found.log_z - log_mean))
    return dataclasses.replace(found, ess=ess)


def _principal_axes(centered: Float[np.ndarray, "count n"]):
    """Orthonormal axes and the spread along each. The axes are None in many dimensions."""
    if centered.shape[1] > CORRELATED_UP_TO:
        axes, variance = None, np.mean(centered**2, axis=0)
    else:
        variance, axes = np.linalg.eigh(centered.T @ centered / len(centered))
    # The samples may lie on a line.
    return axes, np.sqrt(np.maximum(variance, 1e-12 * variance.max() + 1e-200))


def _times(x: Float[np.ndarray, "count n"], axes: Float[np.ndarray, "n n"] | None):
    return x if axes is None else x @ axes


def _log_mixture(x: Float[np.ndarray, "count n"], centers: np.ndarray, width: float):
    """The log-density of the proposals in coordinates of unit spread."""
    size, square = x.shape[1], np.sum(x * x, axis=1)
    log_unit = -0.5 * size * math.log(2 * math.pi)
    distance = square[:, None] - 2 * x @ centers.T + np.sum(centers * centers, axis=1)
    around = log_unit - size * math.log(width) + _log_mean(-0.5 * distance / width**2)
    normal = log_unit - 0.5 * square
    constant = math.lgamma((FREEDOM + size) / 2) - math.lgamma(FREEDOM / 2)
    constant -= 0.5 * size * math.log(FREEDOM * math.pi)
    heavy = constant - 0.5 * (FREEDOM + size) * np.log1p(square / FREEDOM)
    each = np.stack([around, normal, heavy]) + np.log(PARTS)[:, None]
    return np.logaddexp.reduce(each)


def _log_mean(x: Float[np.ndarray, "count n"]) -> Float[np.ndarray, " count"]:
    largest = x.max(axis=1)
    return largest + np.log(np.mean(np.exp(x - largest[:, None]), axis=1))
