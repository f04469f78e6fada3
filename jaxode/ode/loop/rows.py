"""Rows and samples.

Everything in a row takes the same steps. With per-sample steps each sample is a row; otherwise all
samples are one. Times, step sizes and flags are `[rows]`, states are `[samples, n]`, and one row is
broadcast over the samples. What depends on the number of rows stands here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

T = TypeVar("T")


def one_row(of_rows: Shaped[Array, "rows ..."]) -> bool:
    """Whether all samples are one row."""
    return of_rows.shape[0] == 1


def reduce_rows(
    reduce: Callable[..., Array], x: Shaped[Array, "samples ..."], of_rows: Shaped[Array, " rows"]
) -> Shaped[Array, " rows"]:
    """`reduce`, such as `jnp.sum`, over all that belongs to each row of `of_rows`."""
    first = 1 if x.shape[0] == of_rows.shape[0] else 0
    return reduce(x, axis=tuple(range(first, x.ndim))).reshape(of_rows.shape)


def size_of_row(x: Shaped[Array, "samples ..."], of_rows: Shaped[Array, " rows"]) -> int:
    """Count the numbers of each row of `of_rows`; at least one, for means."""
    return max(x.size // max(of_rows.shape[0], 1), 1)


def place_of_each(index: Int[Array, " rows"]) -> Any:
    """The place in `[entries, samples, ...]` of the entry with this index, per row."""
    if one_row(index):
        return index[0]
    return index, jnp.arange(index.shape[0], dtype=index.dtype)


def entry_of_each(
    x: Shaped[Array, "entries samples ..."], index: Int[Array, " rows"]
) -> Shaped[Array, "samples ..."]:
    """The entry with this index, per row."""
    return x[place_of_each(index)]


def of_group(
    reduce: Callable[..., Array], of_rows: Shaped[Array, " rows"], x: Shaped[Array, "groups ..."]
) -> Shaped[Array, "groups ..."]:
    """`reduce` over the rows of each group, shaped to broadcast with `x`.

    Rows are groups of one. One row is broadcast over the samples.
    """
    if not one_row(of_rows):
        of_rows = reduce(of_rows.reshape(len(x), len(of_rows) // max(len(x), 1)), axis=1)
    return of_rows.reshape(-1, *(1,) * (x.ndim - 1))


def replace_rows(
    tree: T, masked: Bool[Array, " rows"], good: Bool[Array, " rows"], groups: Any = ()
) -> T:
    """Leaves `[rows, ...]`, with a `good` row in place of the `masked` ones.

    Zero times NaN is NaN: a row must be finite to add nothing to a gradient that rows share.
    Leaves of `tree` and of `groups` may have values of groups of rows, `[groups, ...]`. The first
    good row of the smallest group that has one replaces a masked row, or a group without any.
    """
    if len(masked) < 2:
        return tree
    by, sizes = jnp.argmax(good), {len(masked) // len(x) for x in jax.tree.leaves((tree, groups))}
    for size in sorted(sizes - {1}, reverse=True):
        of_groups = good.reshape(-1, size)
        first = jnp.argmax(of_groups, axis=1) + size * jnp.arange(len(of_groups))
        by = jnp.broadcast_to(by, good.shape).reshape(-1, size)
        by = jnp.where(of_groups.any(axis=1)[:, None], first[:, None], by).reshape(-1)

    def replace(x):
        size = len(masked) // len(x)
        source = by if size == 1 else by[::size] // size
        missing = of_group(jnp.all, masked, x)
        if size > 1:
            missing &= ~of_group(jnp.any, good, x)
        return jnp.where(missing, x[source], x)

    return jax.tree.map(replace, tree)
