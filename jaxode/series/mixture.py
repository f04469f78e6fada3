"""Mixtures of normals with covariances of low rank, whose gaps are integrated out exactly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

COMPONENTS = 3
MAX_RANK = 4  # of the covariance that channels share
MIN_SD = 1e-3  # of a component, in units of that of a channel
TAIL_SD = 3.0  # of the last component at first, in units of the others
LOG_TAIL_WEIGHT = -4.0  # of the last component at first
BISECTIONS = 50  # of the interval around a quantile
DRAWS_WITHIN = 8  # tries to draw between limits


def rank(channels: int) -> int:
    """Of the covariance that channels share."""
    return min(channels - 1, MAX_RANK)


class Mixture(NamedTuple):
    """`sum_k w_k N(mean_k, diag(sd_k^2) + loadings loadings^T)` of the channels of a time."""

    log_weight: Float[Array, " components"]
    mean: Float[Array, "components channels"]
    sd: Float[Array, "components channels"]
    loading: Float[Array, "channels rank"]

    @staticmethod
    def size(channels: int) -> int:
        """How many numbers `of` needs."""
        return COMPONENTS * (1 + 2 * channels) + channels * (2 + rank(channels))

    @classmethod
    def of(cls, numbers: Float[Array, " numbers"], channels: int) -> "Mixture":
        """The mixture with these numbers. Zeros are a standard normal with heavy tails."""
        k, c = COMPONENTS, channels
        parts = jnp.split(numbers, np.cumsum([k, c, c, k * c, k * c]))
        weight, mean, scale, offset, spread, loading = parts
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
        """Of each channel alone."""
        return self.sd**2 + jnp.sum(self.loading**2, axis=1)[None]

    def moments(self) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
        """Mean and variance of each channel."""
        weight = jnp.exp(self.log_weight)
        mean = weight @ self.mean
        return mean, weight @ (self.variance + (self.mean - mean[None]) ** 2)

    def log_prob(
        self, y: Float[Array, " channels"], there: Bool[Array, " channels"]
    ) -> Float[Array, ""]:
        """Nats of the values that are there.

        With `A = [L / sd; I]` and `b = [(y - mean) / sd; 0]` of channels and factors, the squares
        are those of `b` less its projection on `A`, and the determinant is that of `A^T A`. Both
        come from orthogonal columns, which keep their digits where a covariance would lose them.
        """
        k, r = len(self.log_weight), self.loading.shape[1]
        scale = jnp.where(there[None], 1 / self.sd, 0.0)
        ones = jnp.broadcast_to(jnp.eye(r, dtype=y.dtype)[:, None], (r, k, r))
        columns = [*jnp.concatenate([scale[None] * self.loading.T[:, None], ones], axis=2)]
        rest = jnp.pad(scale * (y[None] - self.mean), ((0, 0), (0, r)))
        log_sd = jnp.log(self.sd) + 0.5 * math.log(2 * math.pi)
        log_det = jnp.sum(jnp.where(there[None], log_sd, 0.0), axis=1)
        while columns:
            first, *others = columns
            square = jnp.sum(first**2, axis=1)
            columns = [_orthogonal(x, first, square) for x in others]
            rest = _orthogonal(rest, first, square)
            log_det = log_det + 0.5 * jnp.log(square)
        return jax.nn.logsumexp(self.log_weight - 0.5 * jnp.sum(rest**2, axis=1) - log_det)

    def sample(self, key: PRNGKeyArray) -> Float[Array, " channels"]:
        """Draw all channels."""
        of_component, of_factors, of_noise = jax.random.split(key, 3)
        k = jax.random.categorical(of_component, self.log_weight)
        factors = jax.random.normal(of_factors, self.loading.shape[1:], self.mean.dtype)
        noise = jax.random.normal(of_noise, self.mean.shape[1:], self.mean.dtype)
        return self.mean[k] + self.sd[k] * noise + self.loading @ factors

    def sample_within(
        self, key: PRNGKeyArray, low: Float[Array, " channels"], high: Float[Array, " channels"]
    ) -> Float[Array, " channels"]:
        """Draw all channels, again if one is beyond its limits, and move there what still is."""
        ys = jax.vmap(self.sample)(jax.random.split(key, DRAWS_WITHIN))
        inside = jnp.all((ys >= low[None]) & (ys <= high[None]), axis=1)
        return jnp.clip(ys[jnp.argmax(inside)], low, high)

    def quantile(self, q: Float[Array, ""], rest: Float[Array, ""]) -> Float[Array, " channels"]:
        """Of each channel alone, by bisection. `rest` is `1 - q`, whose digits `q` may not hold."""
        sd, weight = jnp.sqrt(self.variance), jnp.exp(self.log_weight)
        # Of the mixture or of its mirror image, whichever has the level in its lower half.
        sign, tail = jnp.where(q < rest, 1.0, -1.0), jnp.minimum(q, rest)
        mean = sign * self.mean
        least = jax.scipy.special.ndtri(tail) * sd + mean  # of each component

        def halve(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            below = weight @ jax.scipy.special.ndtr((middle[None] - mean) / sd) < tail
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (least.min(0), least.max(0)))
        return sign * 0.5 * (low + high)


def _orthogonal(x: Array, to: Array, square: Array) -> Array:
    """The part of `x` that is orthogonal to another column, of each component."""
    return x - (jnp.sum(to * x, axis=1) / square)[:, None] * to
