"""The maps between data and what a flow sees, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._jax.closure import compiled
from jaxode.density.maps.base import Map, Support


class Chain(Map):
    """Compose maps, from data to `z`. A support, if there is one, comes first."""

    maps: tuple[Map, ...]

    def inverse(self, x):
        return _through([part.inverse for part in self.maps], x)

    def forward(self, z):
        return _through([part.forward for part in reversed(self.maps)], z)

    def contains(self, x):
        return super().contains(x) if self.support is None else self.support.contains(x)

    def spares(self, columns):
        return all(part.spares(columns) for part in self.maps)

    @property
    def support(self) -> Map | None:
        """The map of the support."""
        return next((part for part in self.maps if isinstance(part, Support)), None)

    @property
    def standardize(self) -> Map | None:
        """The map of the units, which follows that of the support."""
        return next((part for part in self.maps if not isinstance(part, Support)), None)


def _through(steps: list[Callable[..., Any]], x: Array) -> tuple[Array, Array]:
    total = jnp.zeros((), x.dtype)
    for step in steps:
        x, log_det = step(x)
        total = total + log_det
    return x, total


@compiled
def to_data(maps: Chain, z: Float[Array, "rows *event"]):
    """Samples in the units of the data, and `log |det dz/dx|` of each."""
    return jax.vmap(maps.forward)(z)


@compiled
def from_data(maps: Chain, x: Float[Array, "rows *event"]):
    """Whether each row is in the support, and whether it fits; its `z`, and `log |det dz/dx|`.

    A finite row whose `z` overflows does not fit: `z = 0` stands in.
    """

    def of_row(x):
        inside = maps.contains(x)
        if maps.support is not None:
            # NaN stays NaN. Outside the support the density is not used: `z = 0` stands in, where
            # the flow is well behaved.
            inside |= jnp.isnan(x).any()
            x = jnp.where(inside, x, maps.forward(jnp.zeros_like(x))[0])
        z, log_det = maps.inverse(x)
        fits = jnp.isfinite(z).all() | ~jnp.isfinite(x).all()
        return inside, fits, jnp.where(fits, z, 0.0), log_det

    return jax.vmap(of_row)(x)
