"""An interval or a half-line for each coordinate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.arguments import numeric_dtype
from jaxode._checks.rules import is_known
from jaxode.density.maps.base import Support, constants_like


class Box(Support):
    """Each coordinate between two bounds, which may be infinite.

    A logit between finite bounds, the logarithm of the distance to a single bound.
    """

    low: Float[Array, " *event"]
    high: Float[Array, " *event"]

    def inverse(self, x):
        low, high, below, above = self._bounds(x)
        # Without a bound, the distance is one, whose logarithm is zero.
        from_low = jnp.log(jnp.where(below, x - low, 1.0))
        to_high = jnp.log(jnp.where(above, high - x, 1.0))
        width = jnp.log(jnp.where(below & above, high - low, 1.0))
        u = jnp.where(below | above, from_low - to_high, x)
        return u, jnp.sum(width - from_low - to_high)

    def forward(self, u):
        low, high, below, above = self._bounds(u)
        bounded, half_bounded = below & above, below ^ above
        # Each branch sees only its own coordinates, so no exponential overflows: derivatives of the
        # other coordinates would become NaN.
        most = jnp.log(jnp.finfo(u.dtype).max) - 1
        distance = jnp.exp(jnp.minimum(jnp.where(half_bounded, jnp.where(below, u, -u), 0.0), most))
        logit = jnp.where(bounded, u, 0.0)
        between = low + (high - low) * jax.nn.sigmoid(logit)
        beyond = jnp.where(below, low + distance, high - distance)
        x = jnp.where(bounded, between, jnp.where(half_bounded, beyond, u))
        of_logit = -jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(-logit)
        of_logit -= jnp.log(jnp.where(bounded, high - low, 1.0))
        of_half = jnp.where(below, -u, u)
        log_det = jnp.where(bounded, of_logit, jnp.where(half_bounded, of_half, 0.0))
        # Rounding must not leave the support.
        lowest, highest = constants_like((self.low, self.high), u)
        return jnp.clip(x, _beside(lowest, highest), _beside(highest, lowest)), jnp.sum(log_det)

    def spares(self, columns):
        bounds = self.low, self.high

        def unbounded(bound):
            return np.isinf(np.asarray(bound).reshape(-1)[np.array(columns, int)]).all()

        return is_known(bounds) and all(map(unbounded, bounds))

    def _bounds(self, like: Array):
        """The bounds with zero for missing ones, and masks of where there are bounds."""
        low, high = constants_like((self.low, self.high), like)
        below, above = jnp.isfinite(low), jnp.isfinite(high)
        return jnp.where(below, low, 0.0), jnp.where(above, high, 0.0), below, above


def _beside(bound, towards):
    """The next number towards `towards` that is not flushed to zero."""
    least = jnp.sign(towards) * jnp.finfo(bound.dtype).tiny
    return jnp.where(bound == 0, least, jnp.nextafter(bound, towards))


def support_of(bounds: Any, event: tuple[int, ...]) -> Box | None:
    """The box of two bounds."""
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        return None
    for bound in bounds:
        kind = numeric_dtype(bound)
        if kind is None or jnp.issubdtype(kind, jnp.complexfloating):
            raise TypeError(f"bind(support=...): bounds must be real numbers; got {bound!r}.")
    dtype = jnp.result_type(*(jnp.asarray(bound, float) for bound in bounds))
    try:
        low, high = (jnp.broadcast_to(jnp.asarray(bound, dtype), event) for bound in bounds)
    except ValueError:
        shapes = ", ".join(str(jnp.shape(bound)) for bound in bounds)
        raise ValueError(
            f"bind(support=...): bounds must be numbers, or have the shape of an event, {event};"
            f" got {shapes}."
        ) from None
    if is_known((low, high)):
        least, most = np.asarray(low), np.asarray(high)
        if not np.all(least < most):
            raise ValueError(
                "bind(support=...): each lower bound must be less than the upper one; got "
                f"{bounds}."
            )
        with np.errstate(over="ignore"):
            width = most - least
        # A width that is not a normal number is flushed to zero.
        normal = (width >= jnp.finfo(dtype).tiny) & (width < np.inf)
        if not np.all(normal | np.isinf(least) | np.isinf(most)):
            raise ValueError(
                "bind(support=...): the distance between bounds must be a normal number of "
                f"{dtype}; got {bounds}. Rescale the data, or pass infinite bounds."
            )
    return Box(low, high)
