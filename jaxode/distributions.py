"""Base densities. Anything with `event_shape`, `log_prob` and `sample` serves as one."""

import math
import operator
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


class BaseDensity(Protocol):
    """What `cnf` needs of a base density."""

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]: ...

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...]) -> Float[Array, "..."]: ...


@dataclass(frozen=True)
class StandardNormal:
    """Independent normals of mean zero and variance one."""

    event_shape: tuple[int, ...]

    def log_prob(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log-density in nats."""
        axes = tuple(range(-len(self.event_shape), 0))
        size = math.prod(self.event_shape)
        return -0.5 * jnp.sum(z * z, axis=axes) - 0.5 * size * math.log(2 * math.pi)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Independent draws in JAX's default floating dtype."""
        return jax.random.normal(key, (*sample_shape, *self.event_shape))


def standard_normal(event_shape: int | tuple[int, ...]) -> StandardNormal:
    """The standard normal density on events of this shape; an integer stands for a vector.

    Raises:
        ValueError: if a dimension is not a positive integer.
    """
    try:
        shape = tuple(map(operator.index, np.atleast_1d(event_shape))) if event_shape != () else ()
    except TypeError:
        shape = (0,)
    if not all(size > 0 for size in shape):
        raise ValueError(
            f"standard_normal(event_shape=...): must be positive integers; got {event_shape!r}."
        )
    return StandardNormal(shape)
