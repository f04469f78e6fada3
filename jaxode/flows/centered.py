"""Vector fields of particles, on the space of configurations whose mean is zero."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode.flows.bases import centered
from jaxode.ode.field import Completed, Field, VectorField


class Centered(eqx.Module, Field):
    """`P f(P z)`, where `P z` is `z` less its mean over the particles.

    Its divergence in all coordinates, `tr(P df/dz)`, is that on the space of centred
    configurations, also for a field that moves with a shift of all particles.
    """

    f: VectorField

    def __call__(self, t: Float[Array, ""], z: Float[Array, "n dim"], args: Any):
        if Completed(self.f).is_centered(args):
            return self.f(t, z, args)
        dz = self.f(t, centered(z), args)
        fits = jax.tree.structure(dz) == jax.tree.structure(z) and jnp.shape(dz) == z.shape
        return centered(dz) if fits else dz  # the usual check names the shape

    def value_and_divergence(self, t: Float[Array, ""], z: Float[Array, "n dim"], args: Any):
        """The field and its divergence, or `NotImplemented` if `f` has no closed form."""
        f = Completed(self.f)
        is_centered = f.is_centered(args)
        z = z if is_centered else centered(z)
        closed_form = f.value_and_divergence(t, z, args)
        if closed_form is NotImplemented or is_centered:
            return closed_form
        dz, div = closed_form
        by_shift = jax.jacfwd(lambda shift: jnp.mean(self.f(t, z + shift[None], args), axis=0))
        return centered(dz), div - jnp.trace(by_shift(jnp.zeros_like(z[0])))

    def is_centered(self, args: Any) -> bool:
        del args
        return True

    def check_span(self, t0: Any, t1: Any) -> Any:
        return Completed(self.f).check_span(t0, t1)

    def span_faults(self, t0: Any) -> dict[str, Callable[[], Any]]:
        return Completed(self.f).span_faults(t0)
