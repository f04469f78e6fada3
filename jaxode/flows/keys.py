"""Random numbers as functions of the key and a row's number in the whole batch.

So a sample gets the same noise under `jit`, alone or in a batch, and on one device or many. (JAX's
rbg generators draw for a batch together, so with their keys it depends on the batch.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._jax.sharding import AxisName, row_numbers

# Folded into the key for the end time. No row has this number.
END_TIME = 2**32 - 2


def of_each_row(
    draw: Callable[[Any, Float[Array, " *event"]], Any],
    key: PRNGKeyArray | None,
    x: Float[Array, "batch *event"],
    axis_name: AxisName | None,
) -> Any:
    """`draw(key, row)` for each row of `x`: with one key of all, or those of `keys_of_rows`."""
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


def random_end(key: PRNGKeyArray | None, t0: Float[Array, ""], steer: float) -> Float[Array, ""]:
    """A uniform time between `t0 - steer` and `t0 + steer`, shared by the whole batch."""
    if key is None:
        raise ValueError(
            f"nll: steer={steer!r} needs random numbers; got key=None. Pass "
            "key=jax.random.key(...)."
        )
    # Drawn in float32 for samples of any dtype, so that it depends only on the key.
    uniform = jax.random.uniform(jax.random.fold_in(key, END_TIME), (), jnp.float32, -1.0, 1.0)
    return t0 + steer * uniform.astype(t0.dtype)
