"""A bijector of distrax as a map."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxode.density.maps.base import Support


class DistraxSupport(Support):
    """A distrax bijector from real numbers to the support."""

    bijector: Any

    def inverse(self, x):
        u, log_det = jax.lax.stop_gradient(self.bijector).inverse_and_log_det(x)
        return u, jnp.sum(log_det)

    def forward(self, u):
        x, log_det = jax.lax.stop_gradient(self.bijector).forward_and_log_det(u)
        return x, -jnp.sum(log_det)


def support_of(bijector: Any, event: tuple[int, ...]) -> DistraxSupport | None:
    """The map of a bijector of distrax."""
    ways = hasattr(bijector, "inverse_and_log_det"), hasattr(bijector, "forward_and_log_det")
    return DistraxSupport(bijector) if all(ways) else None
