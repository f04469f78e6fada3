"""Affine maps around a flow, so that its network sees numbers of about one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxode.flows.support import Support
from jaxode.ode.results import in_rows
from jaxode.ode.validation import is_known

WHERE = "bind"


class Affine(eqx.Module):
    """`z = (u - mean) / scale`, coordinate by coordinate."""

    mean: Float[Array, "..."]
    scale: Float[Array, "..."]

    def __call__(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        mean, scale = self._spread(u)
        return (u - mean) / scale

    def back(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        mean, scale = self._spread(z)
        return mean + scale * z

    def _spread(self, like: Float[Array, "..."]):
        shape = jnp.shape(like)
        return (
            jnp.broadcast_to(part, shape).astype(like.dtype) for part in (self.mean, self.scale)
        )


def split(standardize: Any, event: tuple[int, ...]) -> tuple[Any, Any]:
    """What is said of `x`, and of the context."""
    if not isinstance(standardize, tuple):
        return standardize, None
    if len(standardize) != 2:
        raise ValueError(
            f"{WHERE}(standardize=...): must be data, (mean, scale), or a pair of such for x and "
            f"context; got {len(standardize)} parts."
        )
    first = standardize[0]
    pair = first is None or isinstance(first, tuple) or jnp.ndim(first) == len(event) + 1
    return standardize if pair else (standardize, None)


def affine(
    name: str, given: Any, event: tuple[int, ...], support: Support | None = None
) -> Affine | None:
    if given is None:
        return None
    if isinstance(given, tuple):
        mean, scale = (jnp.asarray(part, float) for part in given)
        for part in (mean, scale):
            if part.shape not in ((), event):
                raise ValueError(
                    f"{WHERE}(standardize=...): mean and scale of {name} must be numbers, or have "
                    f"shape {event}; got {part.shape}."
                )
        if is_known(scale) and not (np.isfinite(scale).all() and (np.asarray(scale) > 0).all()):
            raise ValueError(
                f"{WHERE}(standardize=...): the scale of {name} must be positive; got {given[1]}."
            )
        return Affine(mean, scale)
    data = np.asarray(given) if is_known(given) else given
    if data.shape[1:] != event or data.ndim != len(event) + 1 or len(data) < 2:
        raise ValueError(
            f"{WHERE}(standardize=...): data of {name} must have shape (n, *{event}), with at "
            f"least two rows; got {data.shape}."
        )
    if support is not None:
        rows = jnp.asarray(data)
        outside = ~jax.vmap(support.contains)(rows)
        if is_known(outside) and np.any(outside):
            raise ValueError(
                f"{WHERE}(support=...): the data must lie strictly within; got others in "
                f"{in_rows(outside)}. Widen the support, or leave those rows out."
            )
        data = jax.vmap(lambda x: support.inverse(x)[0])(rows)
    return _fitted(name, data)


def _fitted(name: str, data: Any) -> Affine:
    """Mean and standard deviation, in float64 if the data are known."""
    if not is_known(data):
        return Affine(jnp.mean(data, axis=0), jnp.std(data, axis=0))
    wide = np.asarray(data, np.float64)
    if not np.isfinite(wide).all():
        bad = ~np.isfinite(wide).reshape(len(wide), -1).all(axis=1)
        raise ValueError(
            f"{WHERE}(standardize=...): data of {name} must be finite; got others in "
            f"{in_rows(bad)}. Leave those rows out."
        )
    mean, scale = wide.mean(axis=0), wide.std(axis=0)
    constant = np.argwhere(~(scale > 1e-12 * np.abs(mean).clip(1e-300)))
    if constant.size:
        column = tuple(map(int, constant[0]))
        place = column[0] if len(column) == 1 else column
        raise ValueError(
            f"{WHERE}(standardize=...): {name} must vary; got a constant coordinate, number "
            f"{place}. Leave it out, or pass (mean, scale)."
        )
    return Affine(jnp.asarray(mean, data.dtype), jnp.asarray(scale, data.dtype))


def of_context(given: Any) -> PyTree:
    """A map for each leaf of the context that is of floating point numbers."""
    if given is None:
        return None
    if isinstance(given, tuple) and len(given) == 2 and all(jnp.ndim(part) < 2 for part in given):
        return affine("context", given, jnp.shape(given[0]))
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    one = lambda x: affine("context", x, jnp.shape(x)[1:]) if floating(x) else None
    return jax.tree.map(one, given)
