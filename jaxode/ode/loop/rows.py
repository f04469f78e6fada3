"""Rows and samples.

Everything in a row takes the same steps. With per-sample steps each sample is a row; otherwise all
samples are one. Times, step sizes and flags are `[rows]`, states are `[samples, n]`, and one row is
broadcast over the samples.
"""

from collections.abc import Callable

from jaxtyping import Array, Shaped


def over_rows(
    reduce: Callable[..., Array], x: Shaped[Array, "samples ..."], rows: int
) -> Shaped[Array, " rows"]:
    """`reduce`, such as `jnp.sum`, over all that belongs to each row."""
    first = 1 if x.shape[0] == rows else 0
    return reduce(x, axis=tuple(range(first, x.ndim))).reshape(rows)
