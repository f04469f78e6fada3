"""Checks of `jaxode.audit` for the base: its samples, and its integral."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxode.auditing.audited_flow import AuditedFlow, Row, within
from jaxode.divergence import EXACT_UP_TO
from jaxode.flows.bases import has_full_support, in_one_period

# Median distance from the mean of the base, in standard deviations. In one dimension, a normal base
# has no such samples.
MAX_DISTANCE = 10.0
IMBALANCE = 6.0
MAX_PROBABILITY = 1e-2
# In interquartile ranges. The smallest suit narrow modes and correlated coordinates.
STEP_SIZES = 2.0 / 4.0 ** np.arange(4)
# Differences of log-densities are clipped to it, so that one sample on a bound weighs little.
MAX_LOG_DENSITY_CHANGE = 100.0  # nats
KERNEL_CENTERS = 256
TAIL_PART = 0.1  # the part of the samples where the density is too low to divide by
Density = Callable[[np.ndarray], np.ndarray]


def distance(s: AuditedFlow) -> Row:
    """Median distance of samples from the mean of the base, in standard deviations.

    Far away, log-densities are so large that their rounding is an error.
    """
    drawn, z = np.asarray(s.base_samples, float), np.asarray(s.z, float)[~np.asarray(s.outside)]
    with np.errstate(all="ignore"):
        square = ((z - drawn.mean(axis=0)) / drawn.std(axis=0)) ** 2
        value = np.median(np.sqrt(square.mean(axis=tuple(range(1, z.ndim))))) if len(z) else np.nan
    return within(
        "distance from the base", value, MAX_DISTANCE, "standard deviations",
        "The flow does not carry these samples to its base: train it on standardized data, such "
        "as jaxode.bind(flow, params, standardize=data).to_flow(data), or for longer.",
    )  # fmt: skip


def samples(s: AuditedFlow) -> Row | None:
    """Whether the base draws samples of its density."""
    if not has_full_support(s.flow.base):
        return None  # It has a density of fewer coordinates than its samples.
    finite = np.isfinite(s.base_samples).all()
    return within(
        "base samples", imbalance(_rng(s), s.base_samples, _density(s)) if finite else np.inf,
        IMBALANCE, "standard errors off",
        "The samples of the base do not have its log_prob: make both finite, and give them the "
        "same location, scale and shape.",
    )  # fmt: skip


def probability(s: AuditedFlow) -> Row | None:
    """The integral of the base density, in few dimensions."""
    drawn = samples(s)
    if drawn is None or s.x[0].size > EXACT_UP_TO:
        return None
    name = "base probability"
    if drawn.advice:
        return Row(name, np.nan, "not known without its samples")
    value, error = integral(_rng(s), s.base_samples, _density(s))
    if not error < 0.05 * value:
        return Row(name, np.nan, "not resolved")
    limit = MAX_PROBABILITY + 4 * error
    advice = "Normalize the base density. A change of variables in it needs its determinant."
    text = f"1 within {limit:.2g}"
    return Row(name, value, text, advice if abs(value - 1) > limit else "")


def imbalance(rng: Any, samples: Float[np.ndarray, "count *event"], log_density: Density) -> float:
    """Shift of the samples by a Metropolis step, in standard errors.

    If `x` has the density `p`, a step `d`, as likely as `-d`, changes the mean of no function `g`:

        E[min(1, p(x + d) / p(x)) (g(x + d) - g(x))] = 0.

    This takes the largest for `log p`, and the value and distance from the median of each
    coordinate. Steps are short: moments need not exist. `p` may have bounds, and any factor.

    References: Metropolis et al. (1953), doi:10.1063/1.1699114.
    """
    x = np.asarray(samples, float).reshape(len(samples), -1)
    low, median, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    spread = np.where(high > low, high - low, 1.0)
    step = rng.choice(STEP_SIZES, size=(len(x), 1)) / math.sqrt(x.shape[1])
    u = (x - median) / spread
    proposal = u + step * rng.standard_normal(u.shape)
    before, after = (
        np.nan_to_num(log_density(at.reshape(samples.shape)), neginf=-1e30, posinf=1e30)
        for at in (x, median + spread * proposal)
    )
    accept = np.exp(np.minimum(after - before, 0.0))[:, None]
    change = np.clip(after - before, -MAX_LOG_DENSITY_CHANGE, MAX_LOG_DENSITY_CHANGE)[:, None]
    moves = accept * np.hstack([change, proposal - u, np.abs(proposal) - np.abs(u)])
    error = np.std(moves, axis=0) / math.sqrt(len(x))
    return float(np.max(np.abs(np.mean(moves, axis=0)) / np.where(error > 0, error, 1.0)))


def integral(
    rng: Any, samples: Float[np.ndarray, "count *event"], log_density: Density
) -> tuple[float, float]:
    """The integral of a density `p` from its samples, and the standard error.

    For any density `q`, and a set `A` where `p` is not small,

        int p = q(A) / E[1_A(x) q(x) / p(x)].

    `q` is a sum of kernels around some of the samples. No weight is large, whatever the tails.

    References: Gelfand and Dey (1994), doi:10.1111/j.2517-6161.1994.tb01996.x.
    """
    x = np.asarray(samples, float).reshape(len(samples), -1)
    size, spread = x.shape[1], np.std(np.clip(x, *np.quantile(x, (0.01, 0.99), axis=0)), axis=0)
    width = spread * (4 / (KERNEL_CENTERS * (size + 2))) ** (1 / (size + 4))  # Silverman (1986)
    centers, x = x[:KERNEL_CENTERS], x[KERNEL_CENTERS:]
    proposals = centers[rng.integers(KERNEL_CENTERS, size=len(x))] + width * rng.standard_normal(
        x.shape
    )
    of_x, of_proposals = (log_density(at.reshape(-1, *samples.shape[1:])) for at in (x, proposals))
    level = np.quantile(of_x, TAIL_PART)
    square = sum((x[:, i, None] - centers[:, i]) ** 2 / width[i] ** 2 for i in range(size))
    log_scale = math.log(KERNEL_CENTERS) + size / 2 * math.log(2 * math.pi) + np.sum(np.log(width))
    with np.errstate(all="ignore"):
        log_q = np.log(np.sum(np.exp(-square / 2), axis=1)) - log_scale
        weights = np.where(of_x >= level, np.exp(log_q - of_x), 0.0)
        part, mean = np.mean(of_proposals >= level), np.mean(weights)
        variance = np.var(weights) / mean**2 + (1 - part) / part
        return float(part / mean), float(part / mean * np.sqrt(variance / len(x)))


def _rng(s: AuditedFlow) -> Any:
    return np.random.default_rng(np.asarray(jax.random.bits(s.key, (4,), "uint32")))


def _density(s: AuditedFlow) -> Density:
    """The log-density of the base as a function of NumPy, minus infinity where it is NaN.

    On a torus, one period counts.
    """
    base: Any = s.flow.base

    def log_density(x: np.ndarray) -> np.ndarray:
        z = jnp.asarray(x, s.x.dtype)
        log_prob = np.asarray(base.log_prob(z), float)
        outside = np.asarray(in_one_period(base, z) != z) & np.isfinite(x)
        return np.where(outside.reshape(len(z), -1).any(axis=1), -np.inf, log_prob)

    return lambda x: np.nan_to_num(log_density(x), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
