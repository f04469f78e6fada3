"""Noise in the cells of rounded numbers, such as levels of pixels, counts and rents.

Noise with the density `q` in the cell of a level gives a bound, which is tight if the density in
the cell is proportional to `q`: `log p(level) >= E_q[log p(level + noise) - log q(noise)]`.

Reference: Theis et al. (2016), arXiv:1511.01844.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import is_number
from jaxode._checks.caller import arg

NOISES = "uniform", "normal"
Noise = str | tuple[float, ...]  # the last of levels that get normal noise, uniform elsewhere
NORMAL_SCALE = 1 / 6  # standard deviation of normal noise
# Its probability of (0, 1).
NORMAL_MASS = math.erf(0.5 / NORMAL_SCALE / math.sqrt(2))


@partial(jax.jit, static_argnames=("spacings", "noise"))
def in_cells(
    key: PRNGKeyArray, x: Float[Array, "..."], spacings: float = 0.51, noise: Noise = "uniform"
) -> Float[Array, "..."]:
    """`x` plus noise that rounding never moves onto `x` or `x + 1`.

    `spacings` is the distance from both, in units in the last place. A sum alone needs a
    little more than half of one.
    """
    return x + in_unit(key, x, margin_of(jax.lax.stop_gradient(x), spacings), noise)


def as_noise(name: str, noise: Any, level_range: tuple[int, int] | None = None) -> Noise:
    """The noise, if it is the name of one or a tuple of levels in the `level_range`."""
    if isinstance(noise, tuple | list) and noise and all(map(is_number, noise)):
        low, high = level_range or (-math.inf, math.inf)
        wrong = [v for v in noise if not (low <= v <= high and v == math.floor(v))]
        if wrong and level_range:
            raise ValueError(
                f"{arg(name)} must name levels, whole numbers from {low} to {high}; got {wrong}. "
                "Leave out what is no level: it would change nothing."
            )
        return tuple(map(float, noise))
    if not (isinstance(noise, str) and noise in NOISES):
        also = "True, False, " if name == "dequantize" else ""
        raise ValueError(
            f"{arg(name)} must be {also}'uniform', 'normal' or a tuple of the levels that get "
            f"normal noise, such as (0,); got {noise!r}."
        )
    return noise


def _is_normal(noise: Noise, levels: Array) -> Any:
    """Which levels get normal noise."""
    if isinstance(noise, str):
        return noise == "normal"
    return jnp.isin(levels, jnp.asarray(noise, levels.dtype))


def in_unit(key: PRNGKeyArray, levels: Any, margin: Any, noise: Noise = "uniform") -> Array:
    """Noise in (0, 1) for each level, with a margin at both ends."""
    v = jax.random.uniform(key, levels.shape, levels.dtype)
    if noise != "uniform":
        normal = 0.5 + NORMAL_SCALE * jax.scipy.special.ndtri(0.5 + NORMAL_MASS * (v - 0.5))
        v = jnp.where(_is_normal(noise, levels), normal, v)
    return jnp.clip(v, margin, 1 - margin)


def log_density(noise: Noise, v: Any, levels: Any) -> Array:
    """The log-density of each noise in (0, 1)."""
    log_area = math.log(NORMAL_MASS * NORMAL_SCALE * math.sqrt(2 * math.pi))
    normal = -0.5 * ((v - 0.5) / NORMAL_SCALE) ** 2 - log_area
    return jnp.where(_is_normal(noise, levels), normal, 0.0)


def margin_of(x: Any, spacings: float = 0.51) -> Any:
    """The distance that the noise of `in_cells` keeps from its ends; `x` in JAX or NumPy."""
    return (spacings * (float(jnp.finfo(x.dtype).eps) * (abs(x) + 1))).clip(max=0.5)
