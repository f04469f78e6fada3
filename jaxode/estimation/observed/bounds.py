"""Parameters as one vector: their bounds and their names."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxode._checks.arguments import floating, numbers
from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row


class Bounds(NamedTuple):
    """The bounds of the parameters. Equal ones fix a parameter."""

    lower: Float[Array | np.ndarray, "*starts n"]
    upper: Float[Array | np.ndarray, "*starts n"]

    @property
    def movable(self) -> Bool[np.ndarray, "*starts n"]:
        """Which parameters a search may change."""
        return np.asarray(self.lower) < np.asarray(self.upper)


def checked_bounds(
    bounds: Any, template: PyTree, flats: Float[Array, "starts n"], name: str = "starts"
) -> Bounds:
    """The user's bounds as vectors, infinite where there are none. Raises for starts outside, which
    are the argument `name`."""
    n, dtype = flats.shape[1], flats.dtype
    if bounds is None:
        return Bounds(jnp.full(n, -jnp.inf, dtype), jnp.full(n, jnp.inf, dtype))
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{arg('bounds')} must be a pair (low, high); got {bounds!r}.")
    vectors = Bounds(*(_vector(bound, template).astype(dtype) for bound in bounds))
    lower, upper, starts = (np.asarray(x) for x in (*vectors, flats))
    first_row(
        ~(lower <= upper),
        lambda i: (
            f"{arg('bounds')} must not cross; got {lower[i]:g} and {upper[i]:g} for "
            f"{names(template)[i]}."
        ),
    )
    if (outside := (starts < lower) | (starts > upper)).any():
        start, i = map(int, np.argwhere(outside)[0])
        raise ValueError(
            f"{arg(name)} must be within bounds, {lower[i]:g} to {upper[i]:g} for "
            f"{names(template)[i]}; got {starts[start, i]:g}"
            f"{f' in start {start}' if name == 'starts' else ''}."
        )
    return vectors


def _vector(bound: Any, template: PyTree) -> Float[Array, " n"]:
    """Lower or upper bounds as a vector, from one number, or from one for each leaf."""

    def broadcast(value, leaf):
        return jnp.broadcast_to(floating(numbers("bounds", value)), leaf.shape)

    try:
        if jax.tree.structure(bound) == jax.tree.structure(0.0) and not jnp.ndim(bound):
            tree = jax.tree.map(lambda leaf: broadcast(bound, leaf), template)
        else:
            tree = jax.tree.map(broadcast, bound, template)
    except ValueError as error:
        raise ValueError(
            f"{arg('bounds')} must be numbers, or pytrees of them like one of starts; got {bound}."
        ) from error
    return ravel_pytree(tree)[0]


def names(template: PyTree) -> list[str]:
    """Name each number, such as `['k'][0]`."""
    labels = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(path) or "params"
        labels += [name + "".join(f"[{i}]" for i in at) for at in np.ndindex(leaf.shape)]
    return labels
