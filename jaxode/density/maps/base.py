"""Base classes of maps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._jax.closure import compiled

Numbers = Array | np.ndarray  # a fit is in NumPy, until `bind` casts it to the data's dtype


class Map(eqx.Module):
    """A bijection between an event `x` and numbers `u` of the same shape."""

    def inverse(
        self, x: Float[Array, " *event"], /
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`u`, and `log |det du/dx|`."""
        raise NotImplementedError

    def forward(
        self, u: Float[Array, " *event"], /
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`x`, and `log |det du/dx|`."""
        raise NotImplementedError

    def contains(self, x: Float[Array, " *event"], /) -> Bool[Array, ""]:
        """Whether the map is defined at `x`."""
        return jnp.ones((), bool)

    def spares(self, columns: tuple[int, ...]) -> bool:
        """Whether the map is known to leave these coordinates of a flattened event unchanged."""
        return not columns


class Support(Map):
    """A map that is defined on a support only: its inverse is not finite outside."""

    def contains(self, x):
        u, log_det = self.inverse(x)
        return jnp.isfinite(u).all() & jnp.isfinite(log_det)


@compiled
def contained(maps: Map, x: Float[Array, "rows *event"]) -> Bool[Array, " rows"]:
    """Which events a map is defined at."""
    return jax.vmap(maps.contains)(x)


def constants_like(tree: PyTree, x: Array) -> PyTree:
    """Constant arrays in the dtype of `x`: training must not move the units."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf).astype(x.dtype), tree)
