"""A constraint of numpyro as a map."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxode.density.maps.base import Support


class NumpyroSupport(Support):
    """A numpyro constraint, through numpyro's bijection for it."""

    constraint: Any

    @property
    def _bijection(self) -> Any:
        from numpyro.distributions import biject_to

        return biject_to(jax.lax.stop_gradient(self.constraint))

    def inverse(self, x):
        u = self._bijection.inv(x)
        log_det = -jnp.sum(self._bijection.log_abs_det_jacobian(u, x))
        return u, jnp.where(jnp.all(self.constraint(x)), log_det, -jnp.inf)

    def forward(self, u):
        x = self._bijection(u)
        return x, -jnp.sum(self._bijection.log_abs_det_jacobian(u, x))


def support_of(constraint: Any, event: tuple[int, ...]) -> NumpyroSupport | None:
    """The map of a constraint of numpyro."""
    if not (hasattr(constraint, "feasible_like") and callable(constraint)):
        return None
    support = NumpyroSupport(constraint)
    try:
        shape = support._bijection.forward_shape(event)
    except (NotImplementedError, ValueError):  # numpyro has none, or none for events of this shape
        shape = None
    if shape != event:
        raise ValueError(
            "bind(support=...): must be a constraint with a bijection from real numbers of the "
            f"same shape, {event}; got {constraint!r}."
        )
    return support
