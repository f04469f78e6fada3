"""Importance weights: the integral of a target, and diagnostics of the weights."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._checks.arguments import described, floating, native, numeric_dtype
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import is_known

# Above this shape of the tail of the weights, or with fewer weights, the error of an estimate is
# itself not known (Vehtari et al.).
LARGEST_K = 0.7
FEWEST_WEIGHTS = 1000


class Importance(eqx.Module):
    """The result of `jaxode.importance`, a pytree. `print` warns where it is not reliable."""

    ess: Float[Array, ""]
    """The effective sample size as a fraction, `(sum w)^2 / (n sum w^2)`."""
    log_z: Float[Array, ""]
    """The logarithm of the mean weight, which estimates that of the integral of the target."""
    log_z_error: Float[Array, ""]
    """Its standard error, by the variance of the weights."""
    pareto_k: Float[Array, ""]
    """The shape of the tail of the weights: they have fewer than `1 / k` moments. It is infinite if
    there are too few positive weights for an estimate, and minus infinity if the largest are
    equal."""
    count: int = eqx.field(static=True)
    """The number of weights."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about uses that the weights do not support. Not inside `jit`."""
        warnings = []
        if not jnp.isfinite(self.ess):
            warnings.append("Some weights are NaN or infinite, or all are zero.")
        if self.count < FEWEST_WEIGHTS:
            warnings.append(
                f"With fewer than {FEWEST_WEIGHTS} weights, do not trust ess, log_z_error or "
                "pareto_k: draw more samples."
            )
        elif jnp.isfinite(self.ess) and not self.pareto_k <= LARGEST_K:
            warnings.append(
                f"With pareto_k above {LARGEST_K}, do not use weighted means, log_z or its error: "
                "a few weights dominate, and larger ones are still to come. Train longer."
            )
        return tuple(warnings)

    def __str__(self) -> str:
        values = self.ess, self.log_z, self.log_z_error, self.pareto_k
        if not (is_known(values) and all(eqx.is_array(x) and x.ndim == 0 for x in values)):
            return eqx.tree_pformat(self)
        lines = [
            f"effective sample size  {self.ess:.1%} of {self.count:,}",
            f"log Z                  {self.log_z:.4f} +- {self.log_z_error:.4f}",
            f"Pareto k               {self.pareto_k:.2f}",
        ]
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])

    __repr__ = __str__


@public("importance")
def importance(log_weights: Float[Array, " n"]) -> Importance:
    """Judge samples by their importance weights, `w = p(x) / q(x)`.

    ```python
    x, log_q = flow.sample_and_log_prob(params, key, 10_000)
    print(jaxode.importance(jax.vmap(log_density)(x) - log_q))
    ```

    The weights see only where there are samples: a flow that lost a mode can have a high effective
    sample size. Use an exact divergence: noise of variance `s^2` in `log q`, as Hutchinson's, adds
    about `s^2 / 2` to `log_z`, which more samples do not remove, and lowers the effective sample
    size by a factor of about `exp(-s^2)`.

    Args:
        log_weights: `log p(x) - log q(x)` of each sample, for an unnormalized `p`. Minus infinity
            is a weight of zero. If one is NaN, so are all results.

    Returns:
        An `Importance`: `ess`, `log_z`, `log_z_error` and `pareto_k`.

    Raises:
        TypeError, ValueError: unless it is a vector of at least two floating numbers.

    References: Zhang and Stephens (2009), doi:10.1198/tech.2009.08017; Vehtari et al. (2024),
    arXiv:1507.02646.
    """
    log_weights = native(log_weights)
    dtype = numeric_dtype(log_weights)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = described(log_weights)
        raise TypeError(f"{arg('log_weights')} must be an array of floating numbers; got {got}.")
    log_weights = floating(log_weights)
    if log_weights.ndim != 1 or len(log_weights) < 2:
        raise ValueError(
            f"{arg('log_weights')} must be a vector of at least two numbers; got shape "
            f"{log_weights.shape}."
        )
    return Importance(*_judge(log_weights), count=len(log_weights))


@jax.jit
def _judge(log_w: Float[Array, " n"]) -> tuple[Any, ...]:
    n = len(log_w)
    # The ratios count: a difference of two large logarithms would be rounding.
    ess = 1 / (n * jnp.sum(jax.nn.softmax(log_w) ** 2))
    error = jnp.sqrt(jnp.maximum(1 / ess - 1, 0) / (n - 1))
    return ess, jax.nn.logsumexp(log_w) - math.log(n), error, _pareto_k(log_w)


def _pareto_k(log_w: Float[Array, " n"]) -> Float[Array, ""]:
    """The shape of a generalized Pareto distribution of the largest weights.

    An empirical Bayes estimate: the mean over values `b` of `-shape / scale` in [-inf, 1 / max x],
    weighted by their profile likelihood, and drawn to 0.5 as by ten more weights.
    """
    n = len(log_w)
    tail = min(math.ceil(0.2 * n), math.ceil(3 * math.sqrt(n)), n - 1)
    if tail < 5:
        return jnp.where(jnp.isnan(log_w).any(), jnp.nan, jnp.inf).astype(log_w.dtype)
    largest = jnp.sort(log_w)[-tail - 1 :]
    below, largest, top = largest[0], largest[1:], largest[-1]
    # The excess over the next weight, in units of the largest.
    x = jnp.exp(largest - top) * -jnp.expm1(jnp.where(largest == below, 0, below - largest))
    count = 30 + math.floor(math.sqrt(tail))
    places = jnp.sqrt(count / (jnp.arange(count, dtype=x.dtype) + 0.5))
    quartile = x[math.floor(tail / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - places) / (3 * quartile)

    def k_of(b):
        return jnp.mean(jnp.log1p(-b * x))

    k = jax.vmap(k_of)(b)
    weights = jax.nn.softmax(tail * (jnp.log(-b / k) - k - 1))
    k = (tail * k_of(jnp.sum(weights * b)) + 10 * 0.5) / (tail + 10)
    tied = jnp.where(x[-1] == 0, -jnp.inf, jnp.inf)
    return jnp.where(quartile == 0, tied, k).astype(x.dtype)
