"""Mixtures of normals with covariances of low rank, whose gaps are integrated out exactly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

COMPONENTS = 3  # normal distributions in a mixture
MAX_RANK = 4  # rank of the covariance that channels share
MIN_SD = 1e-3  # standard deviation of a component, in standard units of the channel
TAIL_SD = 3.0  # standard deviation of the last component over that of the others, untrained
LOG_TAIL_WEIGHT = -4.0  # logit of the last component, untrained
BISECTIONS = 50  # halvings of the interval around a quantile
DRAWS_WITHIN = 8  # draws, of which the first within limits counts


def rank(channels: int) -> int:
    """The rank of the covariance that channels share."""
    return min(channels - 1, MAX_RANK)


class Mixture(NamedTuple):
    """`sum_k w_k N(mean_k, diag(sd_k^2) + loadings loadings^T)` of the channels of a time."""

    log_weight: Float[Array, " components"]
    mean: Float[Array, "components channels"]
    sd: Float[Array, "components channels"]
    loading: Float[Array, "channels rank"]

    @staticmethod
    def size(channels: int) -> int:
        """The number of numbers that `from_numbers` needs."""
        return COMPONENTS * (1 + 2 * channels) + channels * (2 + rank(channels))

    @classmethod
    def from_numbers(cls, numbers: Float[Array, " numbers"], channels: int) -> "Mixture":
        """Unpack the outputs of a network. Zeros give a standard normal with heavy tails."""
        k, c = COMPONENTS, channels
        places = np.cumsum([k, c, c, k * c, k * c])
        weight, mean, scale, offset, spread, loading = jnp.split(numbers, places)
        last = jnp.arange(k) == k - 1
        scale = jax.nn.softplus(scale + math.log(math.e - 1))[None]
        return cls(
            jax.nn.log_softmax(weight + jnp.where(last, LOG_TAIL_WEIGHT, 0.0)),
            mean[None] + scale * offset.reshape(k, c),
            MIN_SD + scale * jnp.exp(spread.reshape(k, c)) * jnp.where(last, TAIL_SD, 1.0)[:, None],
            scale.T * loading.reshape(c, rank(c)),
        )

    @property
    def variance(self) -> Float[Array, "components channels"]:
        """The variance of each channel in each component."""
        return self.sd**2 + jnp.sum(self.loading**2, axis=1)[None]

    def moments(self) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
        """Mean and variance of each channel."""
        weight = jnp.exp(self.log_weight)
        mean = weight @ self.mean
        return mean, weight @ (self.variance + (self.mean - mean[None]) ** 2)

    def log_prob(
        self, y: Float[Array, " channels"], is_observed: Bool[Array, " channels"]
    ) -> Float[Array, ""]:
        """The log-density of the observed values, in nats.

        Let `A = [L / sd; I]` and `b = [(y - mean) / sd; 0]`, with rows for channels and factors.
        The square in the exponent is that of the residual of `b` after its projection on `A`, and
        the determinant is that of `A^T A`. Both come from orthogonal columns, which keep their
        digits where a covariance would lose them.
        """
        k, r = len(self.log_weight), self.loading.shape[1]
        scale = jnp.where(is_observed[None], 1 / self.sd, 0.0)
        ones = jnp.broadcast_to(jnp.eye(r, dtype=y.dtype)[:, None], (r, k, r))
        columns = [*jnp.concatenate([scale[None] * self.loading.T[:, None], ones], axis=2)]
        residual = jnp.pad(scale * (y[None] - self.mean), ((0, 0), (0, r)))
        log_sd = jnp.log(self.sd) + 0.5 * math.log(2 * math.pi)
        log_det = jnp.sum(jnp.where(is_observed[None], log_sd, 0.0), axis=1)
        while columns:
            first, *later = columns
            square = jnp.sum(first**2, axis=1)
            columns = [_orthogonal(x, first, square) for x in later]
            residual = _orthogonal(residual, first, square)
            log_det = log_det + 0.5 * jnp.log(square)
        return jax.nn.logsumexp(self.log_weight - 0.5 * jnp.sum(residual**2, axis=1) - log_det)

    def sample(self, key: PRNGKeyArray) -> Float[Array, " channels"]:
        """Draw all channels."""
        component_key, factor_key, noise_key = jax.random.split(key, 3)
        k = jax.random.categorical(component_key, self.log_weight)
        factors = jax.random.normal(factor_key, self.loading.shape[1:], self.mean.dtype)
        noise = jax.random.normal(noise_key, self.mean.shape[1:], self.mean.dtype)
        return self.mean[k] + self.sd[k] * noise + self.loading @ factors

    def sample_within(
        self, key: PRNGKeyArray, low: Float[Array, " channels"], high: Float[Array, " channels"]
    ) -> Float[Array, " channels"]:
        """Draw all channels within limits. If no draw is, clip the first one."""
        ys = jax.vmap(self.sample)(jax.random.split(key, DRAWS_WITHIN))
        inside = jnp.all((ys >= low[None]) & (ys <= high[None]), axis=1)
        return jnp.clip(ys[jnp.argmax(inside)], low, high)

    def quantile(self, q: Float[Array, ""], above: Float[Array, ""]) -> Float[Array, " channels"]:
        """The quantile of each channel, by bisection. `above` is `1 - q`, which may have digits
        that `q` cannot hold."""
        sd, weight = jnp.sqrt(self.variance), jnp.exp(self.log_weight)
        # Take the mirror image of the mixture if the level is in its upper half.
        sign, tail = jnp.where(q < above, 1.0, -1.0), jnp.minimum(q, above)
        mean = sign * self.mean
        by_component = jax.scipy.special.ndtri(tail) * sd + mean

        def halve(_, interval):
            low, high = interval
            middle = 0.5 * (low + high)
            below = weight @ jax.scipy.special.ndtr((middle[None] - mean) / sd) < tail
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        interval = by_component.min(0), by_component.max(0)
        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, interval)
        return sign * 0.5 * (low + high)


def _orthogonal(x: Array, to: Array, square: Array) -> Array:
    """The part of `x` that is orthogonal to the column `to`, by component."""
    return x - (jnp.sum(to * x, axis=1) / square)[:, None] * to
