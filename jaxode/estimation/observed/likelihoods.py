"""Densities of observations about predictions, by name."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.lax import lgamma, polygamma
from jaxtyping import Array, Float

LOG_ROOT_2_PI = 0.5 * float(np.log(2 * np.pi))
# A mean this far below zero still predicts a count of zero: solvers make such errors.
BELOW_ZERO = 1e-3
# Floor of the mean of a count, which divides.
LEAST_MEAN_COUNT = 1e-6
# Round the corner of Laplace's density within this many scales, so that searches end in it. This
# makes the log-density of an observation that is predicted exactly too small by half of this.
CORNER = 1e-2
# Multiply the curvature of the parabola that touches the distance from above by this: with all of
# it, steps between corners are small.
FLATTENING = 0.1
# The information about the size of a negative binomial is a mean over counts: below this size a sum
# over the first of them, else a quadrature.
SMALL_SIZE = 3.0
# How many counts the sum takes.
SUMMED_COUNTS = 48
# How many nodes the quadrature has.
QUADRATURE_NODES_OF_COUNTS = 6


class Likelihood(eqx.Module):
    """`-log p(observed | predicted, noise) = half_deviance + saturated`, elementwise."""

    noise_rule = "known"
    """What becomes of `noise` if it is left out: "estimated" from the residuals, "needed" (an
    error), or "unused"."""
    values = "numbers"
    """Which observations there may be: "numbers", "positive" ones, or "counts"."""

    def half_deviance(self, predicted: Array, observed: Array, noise: Any) -> Array:
        """The term that is zero where `predicted` is `observed`."""
        raise NotImplementedError

    def saturated(self, observed: Array, noise: Any) -> Array:
        """The term that does not depend on `predicted`, with all constants."""
        raise NotImplementedError

    def information(self, predicted: Array, noise: Any) -> tuple[Array, Array]:
        """The Fisher information about `predicted`, and about `log(noise)`; there is none about
        both."""
        raise NotImplementedError

    def curvature(self, predicted: Array, observed: Array, noise: Any) -> Array:
        """The curvature by `predicted` that the search steps on."""
        del observed
        return self.information(predicted, noise)[0]


class Normal(Likelihood):
    """`noise` is the standard deviation."""

    noise_rule = "estimated"

    def half_deviance(self, predicted, observed, noise):
        return 0.5 * ((predicted - observed) / noise) ** 2

    def saturated(self, observed, noise):
        return jnp.log(noise) + LOG_ROOT_2_PI + jnp.zeros_like(observed)

    def information(self, predicted, noise):
        return 1 / noise**2 + jnp.zeros_like(predicted), jnp.full_like(predicted, 2.0)


class LogNormal(Likelihood):
    """`noise` is the standard deviation of the logarithm, whose mean is `log(predicted)`."""

    noise_rule = "estimated"
    values = "positive"

    def half_deviance(self, predicted, observed, noise):
        return 0.5 * ((jnp.log(predicted) - jnp.log(observed)) / noise) ** 2

    def saturated(self, observed, noise):
        return jnp.log(noise) + LOG_ROOT_2_PI + jnp.log(observed)

    def information(self, predicted, noise):
        return 1 / (noise * predicted) ** 2, jnp.full_like(predicted, 2.0)


class Laplace(Likelihood):
    """`noise` is the mean distance from the median, `predicted`."""

    noise_rule = "needed"

    def half_deviance(self, predicted, observed, noise):
        distance = jnp.abs(predicted - observed) / noise
        inner = jnp.minimum(distance, CORNER)  # Huber's function
        return inner**2 / (2 * CORNER) + distance - inner

    def saturated(self, observed, noise):
        return jnp.log(2 * noise) + CORNER / 2 + jnp.zeros_like(observed)

    def information(self, predicted, noise):
        return 1 / noise**2 + jnp.zeros_like(predicted), jnp.ones_like(predicted)

    def curvature(self, predicted, observed, noise):
        distance = jnp.abs(predicted - observed) / noise
        outside = FLATTENING / jnp.maximum(distance, CORNER)
        return jnp.where(distance < CORNER, 1 / CORNER, outside) / noise**2


class Poisson(Likelihood):
    """`predicted` is the mean."""

    noise_rule = "unused"
    values = "counts"

    def half_deviance(self, predicted, observed, noise):
        mean = _mean_of_count(predicted, observed)
        return mean - observed + observed * jnp.log(_ratio(observed, mean))

    def saturated(self, observed, noise):
        return (
            observed
            + lgamma(observed + 1)
            - observed * jnp.log(_ratio(observed, jnp.ones_like(observed)))
        )

    def information(self, predicted, noise):
        return 1 / jnp.maximum(predicted, LEAST_MEAN_COUNT), jnp.zeros_like(predicted)


class NegativeBinomial(Likelihood):
    """`predicted` is the mean, `noise` the size k: the variance is `mean + mean**2 / k`."""

    noise_rule = "needed"
    values = "counts"

    def half_deviance(self, predicted, observed, noise):
        mean = _mean_of_count(predicted, observed)
        of_size = (observed + noise) * jnp.log1p((mean - observed) / (observed + noise))
        return observed * jnp.log(_ratio(observed, mean)) + of_size

    def saturated(self, observed, noise):
        ways = lgamma(observed + noise) - lgamma(noise) - lgamma(observed + 1)
        of_size = noise * jnp.log1p(observed / noise)
        return of_size - ways - observed * jnp.log(_ratio(observed, observed + noise))

    def information(self, predicted, noise):
        mean = jnp.maximum(predicted, LEAST_MEAN_COUNT)
        k = noise + jnp.zeros_like(mean)
        return 1 / (mean + mean**2 / k), k**2 * _information_of_size(mean, k)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": Normal(),
    "log_normal": LogNormal(),
    "laplace": Laplace(),
    "poisson": Poisson(),
    "negative_binomial": NegativeBinomial(),
}


def _mean_of_count(predicted: Array, observed: Array) -> Array:
    """The prediction, raised to the floor if it is about zero and nothing was counted."""
    nothing = (observed == 0) & (predicted > -BELOW_ZERO)
    return jnp.where(nothing, jnp.maximum(predicted, LEAST_MEAN_COUNT), predicted)


def _ratio(observed: Array, mean: Array) -> Array:
    """`observed / mean`, or one where nothing was observed: its logarithm does not count."""
    return jnp.where(observed > 0, observed, mean) / mean


def _trigamma(x: Array) -> Array:
    return polygamma(jnp.ones_like(x), x)


@jnp.vectorize
def _information_of_size(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The Fisher information about the size of a negative binomial."""
    small = _mean_by_sum(mean, jnp.minimum(k, SMALL_SIZE))
    large = _mean_by_quadrature(mean, jnp.maximum(k, SMALL_SIZE))
    return jnp.maximum(jnp.where(k < SMALL_SIZE, small, large) - mean / (k * (k + mean)), 0.0)


def _mean_by_quadrature(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The mean of `trigamma(k) - trigamma(k + count)`, by Gauss's quadrature, whose nodes are the
    eigenvalues of the Jacobi matrix of Meixner's polynomials (Golub and Welsch 1969)."""
    n, part = jnp.arange(QUADRATURE_NODES_OF_COUNTS, dtype=mean.dtype), mean / k
    beside = jnp.sqrt(n[1:] * (n[1:] - 1 + k) * part * (1 + part))
    middle = jnp.diag(mean + n * (1 + 2 * part))
    counts, vectors = jnp.linalg.eigh(middle + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    differences = _trigamma(k) - _trigamma(k + jnp.maximum(counts, 0.0))
    return jnp.sum(vectors[0] ** 2 * differences)


def _mean_by_sum(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The same mean by a sum over small counts. Larger ones count at their mean: the function is
    almost flat there."""
    counts, part = jnp.arange(SUMMED_COUNTS, dtype=mean.dtype), mean / (k + mean)
    ways = lgamma(counts + k) - lgamma(k) - lgamma(counts + 1)
    chance = jnp.exp(ways + k * jnp.log1p(-part) + counts * jnp.log(part))
    more = jnp.maximum(1 - chance.sum(), 0.0)
    total = jnp.maximum(mean - (counts * chance).sum(), more * SUMMED_COUNTS)
    middle = jnp.where(more > 0, total, SUMMED_COUNTS) / jnp.where(more > 0, more, 1.0)
    small = (chance * (_trigamma(k) - _trigamma(k + counts))).sum()
    return small + more * (_trigamma(k) - _trigamma(k + middle))
