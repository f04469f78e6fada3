"""A shift and a scale of each coordinate."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.density.maps.base import Map, Numbers, constants_like


class Affine(Map):
    """`z = (x - mean) / scale`, coordinate by coordinate."""

    mean: Float[Numbers, "..."]
    scale: Float[Numbers, "..."]

    def inverse(self, x):
        mean, scale = self._spread(x)
        return (x - mean) / scale, -jnp.sum(jnp.log(scale))

    def forward(self, z):
        mean, scale = self._spread(z)
        return mean + scale * z, -jnp.sum(jnp.log(scale))

    def _spread(self, like: Array):
        def spread(part):
            return jnp.broadcast_to(part, like.shape)

        return map(spread, constants_like((self.mean, self.scale), like))


def fit(data: Float[np.ndarray, "rows *event"]) -> Affine:
    """Subtract the mean of each coordinate, and divide by its standard deviation."""
    return Affine(data.mean(axis=0), data.std(axis=0))
