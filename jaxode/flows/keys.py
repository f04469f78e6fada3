"""Random numbers as functions of the key and a row's number in the whole batch.

So a sample gets the same noise under `jit`, alone or in a batch, and on one device or many. (JAX's
rbg generators draw for a batch together, so with their keys it depends on the batch.)
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._jax.sharding import AxisName, row_numbers


def of_each_row(
    draw: Callable[[Any, Float[Array, " *event"]], Any],
    key: PRNGKeyArray | None,
    x: Float[Array, "batch *event"],
    axis_name: AxisName | None,
) -> Any:
    """`draw(key, row)` for each row of `x`, with one key for all or the keys of `keys_of_rows`."""
    if key is None:
        return jax.vmap(lambda row: draw(None, row))(x)
    if jax.random.key_data(key).ndim == 1:
        key = keys_of_rows(key, x, axis_name)
    return jax.vmap(draw)(key, x)


def keys_of_rows(
    key: PRNGKeyArray, x: Float[Array, "batch *event"], axis_name: AxisName | None
) -> PRNGKeyArray:
    """A different key for each row of `x`."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(row_numbers(x, key, axis_name))
