"""The change of variables between data and what a flow sees, by the maps around it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import takes
from jaxode._jax.closure import compiled
from jaxode.density.maps import Affine, Chain, Map, contains
from jaxode.flows.energy import Target


def _maps(support: Map | None, standardize: Map | None) -> Chain:
    """Both maps, from the data to the flow."""
    return Chain(tuple(each for each in (support, standardize) if each is not None))


@compiled
def to_data(support: Map | None, standardize: Map | None, z: Float[Array, "rows *event"]):
    """Samples in the units of the data, and `log |det dz/dx|` of each."""
    return jax.vmap(_maps(support, standardize).forward)(z)


class InFlow(eqx.Module):
    """A target density as one of the flow's own samples `z` and contexts."""

    log_density: Target
    support: Map | None
    standardize: Map | None
    context_maps: PyTree

    def __call__(self, z: Float[Array, " *event"], *row: PyTree) -> Float[Array, ""]:
        x, log_det = _maps(self.support, self.standardize).forward(z)
        if row:
            back = lambda m, leaf: leaf if m is None else m.forward(leaf)[0]
            is_map = lambda x: x is None or isinstance(x, Affine)
            row = (jax.tree.map(back, self.context_maps, *row, is_leaf=is_map),)
            row = row if takes(self.log_density, x, *row) else ()
        return self.log_density(x, *row) - log_det


@compiled
def from_data(support: Map | None, standardize: Map | None, x: Float[Array, "rows *event"]):
    """Whether each row is in the support, and whether it fits; its `z`, and `log |det dz/dx|`.

    A finite row whose `z` overflows does not fit: `z = 0` stands in.
    """
    maps = _maps(support, standardize)

    def one(x):
        inside = jnp.ones((), bool)
        if support is not None:
            # NaN stays NaN. Outside the support the density is not used: `z = 0` stands in, where
            # the flow is well behaved.
            inside = contains(support, x) | jnp.isnan(x).any()
            x = jnp.where(inside, x, maps.forward(jnp.zeros_like(x))[0])
        z, log_det = maps.inverse(x)
        fits = jnp.isfinite(z).all() | ~jnp.isfinite(x).all()
        return inside, fits, jnp.where(fits, z, 0.0), log_det

    return jax.vmap(one)(x)
