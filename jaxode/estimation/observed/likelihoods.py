"""Densities of observations about predictions, by name."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.lax import lgamma, polygamma
from jaxtyping import Array, Float

LOG_ROOT_2_PI = 0.5 * float(np.log(2 * np.pi))
# A prediction this far below zero still explains a count of zero: solvers leave such errors.
BELOW_ZERO, LEAST_MEAN = 1e-3, 1e-6
# Round the corner of Laplace's density within this many scales, so that searches end in it. Where
# an observation is predicted exactly, its log-density is half of this too small.
CORNER = 1e-2
# Step on this part of the parabola that touches a distance and lies above it: all of it is so steep
# that steps between corners are small.
FLATTER = 0.1
# Means over the counts of a negative binomial: below this size a sum over so many, else by nodes.
SMALL_SIZE, SUMMED, NODES = 3.0, 48, 6


class Likelihood(eqx.Module):
    """`-log p(observed | predicted, noise) = half_deviance + saturated`, elementwise."""

    noise_rule = "known"
    """Of `noise`: "estimated" from the residuals if it is left out, "needed", or "unused"."""
    values = "numbers"
    """What is observed: "numbers", "positive" ones, or "counts"."""

    def half_deviance(self, predicted: Array, observed: Array, noise: Any) -> Array:
        """The part that vanishes where `predicted` is `observed`."""
        raise NotImplementedError

    def saturated(self, observed: Array, noise: Any) -> Array:
        """The rest, with all constants."""
        raise NotImplementedError

    def information(self, predicted: Array, noise: Any) -> tuple[Array, Array]:
        """The Fisher information about `predicted`, and about `log(noise)`. They are orthogonal."""
        raise NotImplementedError

    def curvature(self, predicted: Array, observed: Array, noise: Any) -> Array:
        """The curvature in `predicted` that steps rely on."""
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
        apart = jnp.abs(predicted - observed) / noise
        near = jnp.minimum(apart, CORNER)  # Huber's function
        return near**2 / (2 * CORNER) + apart - near

    def saturated(self, observed, noise):
        return jnp.log(2 * noise) + CORNER / 2 + jnp.zeros_like(observed)

    def information(self, predicted, noise):
        return 1 / noise**2 + jnp.zeros_like(predicted), jnp.ones_like(predicted)

    def curvature(self, predicted, observed, noise):
        apart = jnp.abs(predicted - observed) / noise
        far = FLATTER / jnp.maximum(apart, CORNER)
        return jnp.where(apart < CORNER, 1 / CORNER, far) / noise**2


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
        return 1 / jnp.maximum(predicted, LEAST_MEAN), jnp.zeros_like(predicted)


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
        mean = jnp.maximum(predicted, LEAST_MEAN)
        k = noise + jnp.zeros_like(mean)
        return 1 / (mean + mean**2 / k), k**2 * _of_size(mean, k)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": Normal(),
    "log_normal": LogNormal(),
    "laplace": Laplace(),
    "poisson": Poisson(),
    "negative_binomial": NegativeBinomial(),
}


def _mean_of_count(predicted: Array, observed: Array) -> Array:
    nothing = (observed == 0) & (predicted > -BELOW_ZERO)
    return jnp.where(nothing, jnp.maximum(predicted, LEAST_MEAN), predicted)


def _ratio(observed: Array, mean: Array) -> Array:
    """`observed / mean`, or one where nothing was observed: its logarithm does not count."""
    return jnp.where(observed > 0, observed, mean) / mean


def _trigamma(x: Array) -> Array:
    return polygamma(jnp.ones_like(x), x)


@jnp.vectorize
def _of_size(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The Fisher information about the size of a negative binomial."""
    small = _apart_by_sum(mean, jnp.minimum(k, SMALL_SIZE))
    large = _apart_by_quadrature(mean, jnp.maximum(k, SMALL_SIZE))
    return jnp.maximum(jnp.where(k < SMALL_SIZE, small, large) - mean / (k * (k + mean)), 0.0)


def _apart_by_quadrature(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The mean of `trigamma(k) - trigamma(k + count)`, by Gauss's quadrature, whose nodes are the
    eigenvalues of the Jacobi matrix of Meixner's polynomials (Golub and Welsch 1969)."""
    n, part = jnp.arange(NODES, dtype=mean.dtype), mean / k
    beside = jnp.sqrt(n[1:] * (n[1:] - 1 + k) * part * (1 + part))
    middle = jnp.diag(mean + n * (1 + 2 * part))
    counts, vectors = jnp.linalg.eigh(middle + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    apart = _trigamma(k) - _trigamma(k + jnp.maximum(counts, 0.0))
    return jnp.sum(vectors[0] ** 2 * apart)


def _apart_by_sum(mean: Float[Array, ""], k: Float[Array, ""]) -> Float[Array, ""]:
    """The same by a sum over small counts, and the others at their mean: far from `k`, it hardly
    matters where they are."""
    counts, part = jnp.arange(SUMMED, dtype=mean.dtype), mean / (k + mean)
    ways = lgamma(counts + k) - lgamma(k) - lgamma(counts + 1)
    chance = jnp.exp(ways + k * jnp.log1p(-part) + counts * jnp.log(part))
    more = jnp.maximum(1 - chance.sum(), 0.0)
    total = jnp.maximum(mean - (counts * chance).sum(), more * SUMMED)
    middle = jnp.where(more > 0, total, SUMMED) / jnp.where(more > 0, more, 1.0)
    near = (chance * (_trigamma(k) - _trigamma(k + counts))).sum()
    return near + more * (_trigamma(k) - _trigamma(k + middle))
