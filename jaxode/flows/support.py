"""Bijections from the real numbers to the support of a density, coordinate by coordinate."""

from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxode.ode.validation import is_known, numeric_dtype


class Support(Protocol):
    """Maps an event `x` of the support to one of real numbers `u`, and back."""

    def contains(self, x: Float[Array, " *event"]) -> Bool[Array, ""]: ...

    def inverse(
        self, x: Float[Array, " *event"]
    ) -> tuple[Float[Array, " *event"], Float[Array, ""]]:
        """`u`, and the logarithm of `|det du/dx|`."""
        ...

    def forward(self, u: Float[Array, " *event"]) -> Float[Array, " *event"]: ...


class Box(eqx.Module):
    """Each coordinate between two bounds, which may be infinite.

    A logit between finite bounds, a logarithm of the distance to a single one.
    """

    low: Float[Array, " *event"]
    high: Float[Array, " *event"]

    def contains(self, x: Float[Array, " *event"]) -> Bool[Array, ""]:
        return ((self.low < x) & (x < self.high)).all()

    def inverse(self, x):
        below, above = self._bounded
        # Where there is no bound, one is the distance to it: its logarithm is zero.
        from_low = jnp.log(jnp.where(below, x - self.low, 1.0))
        to_high = jnp.log(jnp.where(above, self.high - x, 1.0))
        width = jnp.log(jnp.where(below & above, self.high - self.low, 1.0))
        u = jnp.where(below | above, from_low - to_high, x)
        return u, jnp.sum(width - from_low - to_high)

    def forward(self, u):
        below, above = self._bounded
        low, high = jnp.where(below, self.low, 0.0), jnp.where(above, self.high, 0.0)
        between = low + (high - low) * jax.nn.sigmoid(u)
        half = jnp.where(below, low + jnp.exp(u), high - jnp.exp(-u))
        x = jnp.where(below & above, between, jnp.where(below | above, half, u))
        # Rounding must not leave the support.
        return jnp.clip(x, _beside(self.low, self.high), _beside(self.high, self.low))

    @property
    def _bounded(self):
        return jnp.isfinite(self.low), jnp.isfinite(self.high)


def _beside(bound, towards):
    """The next number, and the least that is not flushed to zero."""
    least = jnp.sign(towards) * jnp.finfo(bound.dtype).tiny
    return jnp.where(bound == 0, least, jnp.nextafter(bound, towards))


class OfNumpyro(eqx.Module):
    """A constraint of numpyro, by the bijection that numpyro has for it."""

    constraint: Any = eqx.field(static=True)

    @property
    def _bijection(self) -> Any:
        from numpyro.distributions import biject_to

        return biject_to(self.constraint)

    def contains(self, x: Float[Array, " *event"]) -> Bool[Array, ""]:
        return jnp.all(self.constraint(x))

    def inverse(self, x):
        u = self._bijection.inv(x)
        return u, -jnp.sum(self._bijection.log_abs_det_jacobian(u, x))

    def forward(self, u):
        return self._bijection(u)


class OfDistrax(eqx.Module):
    """A bijector of distrax, from the real numbers to the support."""

    bijector: Any

    def contains(self, x: Float[Array, " *event"]) -> Bool[Array, ""]:
        u, _ = self.inverse(x)
        return jnp.isfinite(u).all()

    def inverse(self, x):
        u, log_det = self.bijector.inverse_and_log_det(x)
        return u, jnp.sum(log_det)

    def forward(self, u):
        return self.bijector.forward(u)


def as_support(where: str, support: Any, event: tuple[int, ...]) -> Support | None:
    """What a user passes as the support: two bounds, or what other libraries have for it."""
    if support is None:
        return None
    if isinstance(support, tuple) and len(support) == 2:
        return _box(where, support, event)
    if hasattr(support, "inverse_and_log_det") and hasattr(support, "forward"):
        return OfDistrax(support)
    if hasattr(support, "feasible_like") and callable(support):
        return OfNumpyro(support)
    raise TypeError(
        f"{where}(support=...): must be bounds (low, high), a constraint of numpyro or a bijector "
        f"of distrax; got {support!r}."
    )


def _box(where: str, bounds: tuple[Any, Any], event: tuple[int, ...]) -> Box:
    for bound in bounds:
        if numeric_dtype(bound) is None:
            raise TypeError(f"{where}(support=...): bounds must be numbers; got {bound!r}.")
    dtype = jnp.result_type(*(jnp.asarray(bound, float) for bound in bounds))
    try:
        low, high = (jnp.broadcast_to(jnp.asarray(bound, dtype), event) for bound in bounds)
    except ValueError:
        shapes = ", ".join(str(jnp.shape(bound)) for bound in bounds)
        raise ValueError(
            f"{where}(support=...): bounds must be numbers, or have the shape of an event, {event};"
            f" got {shapes}."
        ) from None
    if is_known((low, high)) and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(
            f"{where}(support=...): each lower bound must be less than the upper one; got {bounds}."
        )
    return Box(low, high)
