"""Whether samples have a density: then a Metropolis step does not change them, on average."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

# Sizes of a step, in quartile ranges: some that suit narrow modes and correlated coordinates.
STEPS = 2.0 / 4.0 ** np.arange(4)
# Log-densities count as at most this far apart, so that one sample on a bound weighs little.
FAR = 100.0


def imbalance(
    key: PRNGKeyArray,
    samples: Float[np.ndarray, "count *event"],
    log_density: Callable[[np.ndarray], np.ndarray],
) -> float:
    """How far a Metropolis step moves the samples, in standard errors.

    If `x` has the density `p`, then with a random `d`, as likely as `-d`,

        E[min(1, p(x + d) / p(x)) (g(x + d) - g(x))] = 0

    for every function `g`. This compares `log p`, and for each coordinate its value and its
    distance from the median, and returns the largest mean. Steps are short, so moments of the
    density need not exist; it may have a bounded support, and any factor.

    References: Metropolis et al. (1953), doi:10.1063/1.1699114.
    """
    count, event = len(samples), samples.shape[1:]
    x = np.asarray(samples, float).reshape(count, -1)
    low, median, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    spread = np.where(high > low, high - low, 1.0)
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))
    step = rng.choice(STEPS, size=(count, 1)) / math.sqrt(x.shape[1])
    u = (x - median) / spread
    moved = u + step * rng.standard_normal(u.shape)
    before, after = (
        np.nan_to_num(log_density(at.reshape(-1, *event)), neginf=-1e30, posinf=1e30)
        for at in (x, median + spread * moved)
    )
    accept = np.exp(np.minimum(after - before, 0.0))[:, None]
    change = np.clip(after - before, -FAR, FAR)[:, None]
    changes = (change, moved - u, np.abs(moved) - np.abs(u))
    return max(_largest_mean(accept * change) for change in changes)


def _largest_mean(x: Float[np.ndarray, "count n"]) -> float:
    """The largest |mean| of a column, in its standard errors."""
    error = np.std(x, axis=0) / math.sqrt(len(x))
    return float(np.max(np.abs(np.mean(x, axis=0)) / np.where(error > 0, error, 1.0)))
