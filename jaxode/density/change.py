"""The change of variables between data and what a flow sees, by the maps around it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import takes
from jaxode._jax.closure import compiled
from jaxode.density.maps import Affine, Map, contains
from jaxode.flows.energy import Target


def _one(support: Map | None, standardize: Map | None, z: Float[Array, " *event"]):
    """A sample in the units of the data, and `log |det dz/dx|`."""
    log_det = jnp.zeros((), z.dtype)
    for each in (standardize, support):
        if each is None:
            continue
        z, of_map = each.forward(z)
        log_det = log_det + of_map
    return z, log_det


@compiled
def to_data(support: Map | None, standardize: Map | None, z: Float[Array, "rows *event"]):
    """Samples in the units of the data, and `log |det dz/dx|` of each."""
    return jax.vmap(lambda z: _one(support, standardize, z))(z)


class InFlow(eqx.Module):
    """A target density as one of the flow's own samples `z` and contexts."""

    log_density: Target
    support: Map | None
    standardize: Map | None
    context_maps: PyTree

    def __call__(self, z: Float[Array, " *event"], *row: PyTree) -> Float[Array, ""]:
        x, log_det = _one(self.support, self.standardize, z)
        if row:
            maps = self.context_maps
            if maps is not None:
                back = lambda m, leaf: leaf if m is None else m.forward(leaf)[0]
                is_map = lambda x: x is None or isinstance(x, Affine)
                row = (jax.tree.map(back, maps, *row, is_leaf=is_map),)
            row = row if takes(self.log_density, x, *row) else ()
        return self.log_density(x, *row) - log_det


@compiled
def from_data(support: Map | None, standardize: Map | None, x: Float[Array, "rows *event"]):
    """Whether each row is in the support, its `z`, and `log |det dz/dx|`."""

    def one(x):
        inside, log_det = jnp.ones((), bool), jnp.zeros((), x.dtype)
        if support is not None:
            # NaN stays NaN. Outside the support the density is not used: `z = 0` stands in, where
            # the flow is well behaved.
            inside = contains(support, x) | jnp.isnan(x).any()
            u = jnp.zeros_like(x)
            center, _ = support.forward(u if standardize is None else standardize.forward(u)[0])
            x, log_det = support.inverse(jnp.where(inside, x, center))
        if standardize is not None:
            x, of_map = standardize.inverse(x)
            log_det = log_det + of_map
        return inside, x, log_det

    return jax.vmap(one)(x)
