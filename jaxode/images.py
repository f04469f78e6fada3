"""Images as continuous data: dequantization, the logit, and bits per dimension.

Each map works on a batch `[batch, *event]` and also returns its log-determinant `[batch]`, in nats.
The log-density of images with integer levels is the log-density of the flow plus all
log-determinants:

```python
u, log_det_1 = dequantize(key, x, 256)
y, log_det_2 = logit(u)
bits = bits_per_dimension(flow.log_prob(params, y) + log_det_1 + log_det_2, x[0].size)
```

Noise with the density `q` in the cell of a level gives a bound, which is tight if the density in
the cell is proportional to `q`: `log p(level) >= E_q[log p(level + noise) - log q(noise)]`.

References: Dinh et al. (2017), arXiv:1605.08803; Theis et al. (2016), arXiv:1511.01844; Zheng et
al. (2023), arXiv:2305.03935.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxode._checks.arguments import floating, integer, numbers
from jaxode._checks.caller import arg, public
from jaxode._checks.rules import is_known
from jaxode._checks.samples import check_key
from jaxode.density.noise import Noise, as_noise, in_cells, log_density


@public("dequantize")
def dequantize(
    key: PRNGKeyArray, x: Real[Array, "batch *event"], levels: int, *, noise: Noise = "uniform"
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """`u = (x + noise) / levels` in `(0, 1)`, with noise in `(0, 1)`.

    Args:
        key: draws the noise. Use a new key for each pass over the data.
        x: levels `0, 1, ..., levels - 1`, as integers of any dtype. Other values, such as images
            scaled to `[0, 1]`, raise outside `jit`. Inside `jit` they go unnoticed, and their
            density is wrong.
        levels: the number of levels, such as 256.
        noise: "uniform", or "normal" with mean 1/2 and standard deviation 1/6, cut off at the ends;
            or a tuple of the levels that get normal noise, such as `(0,)`. Normal noise leaves a
            flow no jumps to learn between a common level and a rare one. Of levels that the flow
            does not tell apart, it costs 0.56 bits each.

    Returns:
        `u [batch, *event]`, in the dtype of `x` if it is floating, and at least float32; otherwise
        in the default dtype. And the log-determinant `[batch]` less the log-density of the noise,
        `-size log levels - log q(noise)`. The log-density of `u` plus it is, in the mean over
        noise, at most the log-probability of the levels.

    Raises:
        TypeError: if `x` is not an array of real numbers, or `key` not a key of `jax.random`.
        ValueError: if a value is known not to be a level, `levels` is not an integer of at least 2,
            or `noise` is another, or names others than the levels.
    """
    integer("levels", levels, 2)
    noise = as_noise("noise", noise, (0, levels - 1))
    x = numbers("x", x)

    def is_level(x):
        return (x >= 0) & (x < levels) & (x == np.floor(x))

    rule = f"must be integers from 0 to {levels - 1}"
    _check_values("x", x, is_level, rule, "Pass the levels themselves, not scaled.")
    x = floating(x)
    log_det = jnp.full(x.shape[:1], -math.prod(x.shape[1:]) * math.log(levels), x.dtype)
    # A division by the levels and a product with them round, too.
    noisy = in_cells(check_key(key), x, 2, noise)
    log_noise = log_density(noise, noisy - x, x).sum(axis=tuple(range(1, x.ndim)))
    return noisy / levels, log_det - log_noise


@public("quantize")
def quantize(u: Float[Array, "..."], levels: int) -> Float[Array, "..."]:
    """The level of each value: the inverse of `dequantize`, clipped to `0, ..., levels - 1`.

    Of more than 2^20 levels, float32 loses some.

    Raises:
        ValueError: if `levels` is not an integer of at least 2.
    """
    integer("levels", levels, 2)
    return jnp.clip(jnp.floor(u * levels), 0, levels - 1)


@public("logit")
def logit(
    u: Float[Array, "batch *event"], margin: float = 0.05
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """`y = log(v / (1 - v))` with `v = margin + (1 - 2 margin) u`, and its log-determinant.

    Args:
        u: values in `[0, 1]`. Others raise outside `jit`.
        margin: keeps `y` finite at both ends. At least 0 and below 1/2.

    Raises:
        TypeError: if `u` is not an array of real numbers.
        ValueError: if a value is known not to be in `[0, 1]`, or `margin` is not in `[0, 1/2)`.
    """
    _check_margin(margin)
    u = numbers("u", u)

    def in_range(u):
        return (u >= 0) & (u <= 1)

    _check_values("u", u, in_range, "must be in [0, 1]", "Use dequantize for levels.")
    u = floating(u)
    v, one_less_v = (margin + (1 - 2 * margin) * part for part in (u, 1 - u))  # their sum is one
    y = jnp.log(v) - jnp.log(one_less_v)
    slope = math.log(1 - 2 * margin) - jnp.log(v) - jnp.log(one_less_v)
    return y, jnp.sum(slope, axis=tuple(range(1, u.ndim)))


@public("inverse_logit")
def inverse_logit(y: Float[Array, "..."], margin: float = 0.05) -> Float[Array, "..."]:
    """The inverse of `logit`. Beyond the data, `u` may leave `[0, 1]` by `margin / (1 - 2 margin)`.

    Raises:
        ValueError: if `margin` is not at least 0 and below 1/2.
    """
    _check_margin(margin)
    return (jax.nn.sigmoid(y) - margin) / (1 - 2 * margin)


@public("bits_per_dimension")
def bits_per_dimension(log_prob: Float[Array, "..."], size: int) -> Float[Array, "..."]:
    """`-log_prob / (size log 2)`: nats per event of `size` numbers as bits per number."""
    size = integer("size", size)
    return -log_prob / (size * math.log(2))


def _check_values(name: str, x: Any, good, rule: str, remedy: str) -> None:
    """Raise unless all values that this host knows are good."""
    if not is_known(x) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)
    bad = values[~good(values)]
    if bad.size:
        raise ValueError(f"{arg(name)} {rule}; got {bad[0]}. {remedy}")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 0.5:
        raise ValueError(f"{arg('margin')} must be at least 0 and below 0.5; got {margin!r}.")
