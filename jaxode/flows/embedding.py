"""Contexts that a network maps to vectors, once, before a field sees them."""

from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxode._checks.caller import arg
from jaxode._jax.closure import compiled

MOST_EMBEDDED_ROWS = 1024  # at once: the network may need much memory for each


class Embedded(NamedTuple):
    """Parameters of a vector field, and the network of its contexts. `jaxode.bind` makes it."""

    params: PyTree
    """Parameters of the vector field."""
    embed: Any
    """A function of the context of one sample, and a pytree of its own parameters."""


def embedded(params: PyTree, context: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters of the field alone, and the rows of the context as the field sees them."""
    if not isinstance(params, Embedded):
        return params, context
    if context is None:
        raise ValueError(f"{arg('context')} must be given for a flow with embed=; got None.")
    return params.params, _of_rows(params.embed, context)


@compiled
def _of_rows(embed: Any, context: PyTree) -> PyTree:
    count = jax.tree.leaves(context)[0].shape[0]
    if not isinstance(count, int) or count <= MOST_EMBEDDED_ROWS:  # symbolic, of `jax.export`
        return jax.vmap(embed)(context)
    return jax.lax.map(embed, context, batch_size=MOST_EMBEDDED_ROWS)
