"""Parameters as one vector: their bounds and their names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxode._checks.arguments import floating, numbers
from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row
from jaxode.estimation.search.levenberg_marquardt import Box


def boxed(bounds: Any, template: PyTree, flats: Float[Array, "starts n"]) -> Box:
    """The bounds of the parameters as vectors, infinite where there are none."""
    n, dtype = flats.shape[1], flats.dtype
    if bounds is None:
        return Box(jnp.full(n, -jnp.inf, dtype), jnp.full(n, jnp.inf, dtype))
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{arg('bounds')} must be a pair (low, high); got {bounds!r}.")
    box = Box(*(_bound(bound, template).astype(dtype) for bound in bounds))
    low, high, starts = (np.asarray(x) for x in (*box, flats))
    first_row(
        ~(low <= high),
        lambda i: (
            f"{arg('bounds')} must not cross; got {low[i]:g} and {high[i]:g} for "
            f"{names(template)[i]}."
        ),
    )
    if (outside := (starts < low) | (starts > high)).any():
        start, i = map(int, np.argwhere(outside)[0])
        raise ValueError(
            f"{arg('starts')} must be within bounds, {low[i]:g} to {high[i]:g} for "
            f"{names(template)[i]}; got {starts[start, i]:g} in start {start}."
        )
    return box


def _bound(bound: Any, template: PyTree) -> Float[Array, " n"]:
    """One bound of each parameter: a number for all, or for all of a leaf."""

    def wide(of, leaf):
        return jnp.broadcast_to(floating(numbers("bounds", of)), leaf.shape)

    try:
        if jax.tree.structure(bound) == jax.tree.structure(0.0) and not jnp.ndim(bound):
            tree = jax.tree.map(lambda leaf: wide(bound, leaf), template)
        else:
            tree = jax.tree.map(wide, bound, template)
    except ValueError as error:
        raise ValueError(
            f"{arg('bounds')} must be numbers, or pytrees of them like one of starts; got {bound}."
        ) from error
    return ravel_pytree(tree)[0]


def names(template: PyTree) -> list[str]:
    """Name each number, such as `['k'][0]`."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = jax.tree_util.keystr(path) or "params"
        found += [name + "".join(f"[{i}]" for i in at) for at in np.ndindex(leaf.shape)]
    return found
