"""Couplings: which base sample each row of a batch is matched with, for `flow.matching_loss`.

A coupling is one function, which returns a permutation of the base samples. Rows of the data keep
their place, and with them their contexts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxode._jax.sharding import axes_of, vary
from jaxode.ode.validation import integer, non_negative, state_dtype

Samples = Float[Array, "batch *event"]
Pair = Callable[[PRNGKeyArray, Samples, Samples, PyTree], Int[Array, " batch"] | None]


class Coupling(NamedTuple):
    """A coupling as one pure function of a batch. Equal if the function is."""

    pair: Pair
    """`pair(key, z, x, context) -> rows`: row `i` of the data `x` is matched with the base sample
    `z[rows[i]]`. `rows` is a permutation, or None to leave the base samples where they are."""


def independent() -> Coupling:
    """Pairs as they are drawn: the base sample does not depend on the data.

    The only coupling that is right for every conditional flow without a choice of weights.

    References: Lipman et al. (2022), arXiv:2210.02747.
    """
    return Coupling(_as_drawn)


def _as_drawn(key: PRNGKeyArray, z: Samples, x: Samples, context: PyTree) -> None:
    del key, z, x, context


def optimal_transport(group: int = 64, condition_weight: float | None = None) -> Coupling:
    """The exact optimal transport within groups of consecutive rows.

    Among all permutations within a group, the one of the least sum over its rows `i` of

        |x[i] - z[rows[i]]|^2 + condition_weight |c[i] - c[rows[i]]|^2.

    Trajectories become straighter, so that a solve takes fewer steps, and targets less noisy.
    Shuffle the data: rows that are far apart in the batch are never exchanged. Rows all count the
    same: draw them by their weights, if they have any.

    Args:
        group: the largest number of rows in a group. A batch that is no multiple of it is divided
            into as few groups, whose sizes differ by at most one. The work grows as its cube: more
            than some 512 rows are for large networks only.
        condition_weight: of the squared distance of conditions. A base sample has the condition of
            the row that it was drawn for, or that its start sample `x0` has. To be given with a
            context, and positive: with 0.0, transport ignores the condition and gives every
            condition the base samples that are nearest to its data, not all of them, so that the
            trained flow is skewed. The larger it is, the smaller the skew, and the less is
            exchanged; one-hot conditions that differ are 2 apart. Integers, such as labels, count 1
            for every entry that differs.

    It is compiled, on any device: the shortest augmenting paths of Jonker and Volgenant, for all
    groups at once, but step by step within one. On two CPU cores 8 groups of 64 rows take 1.5 to
    2 ms, as SciPy does by a host callback, so it pays for steps that take longer, or where straight
    paths are the aim. On an accelerator, where it was not measured, each of a thousand small
    kernels has to be started. Costs have the precision of the samples: pairings that differ by
    rounding are taken for equal.

    Raises:
        ValueError: if `group` is not a positive integer, or `condition_weight` is negative or not
            finite; at trace time, if conditions are to be weighed and there is no context, or if
            there is one and no `condition_weight`.

    References: Tong et al. (2023), arXiv:2302.00482; Cheng and Schwing (2025), arXiv:2503.10636;
    Crouse (2016), doi:10.1109/TAES.2016.140952.
    """
    where, rule = "optimal_transport", "a finite number, at least 0"
    group = integer(where, "group", group)
    if condition_weight is not None:
        condition_weight = non_negative(where, "condition_weight", condition_weight, rule)
    return Coupling(_OptimalTransport(group, condition_weight))


@dataclass(frozen=True)
class _OptimalTransport:
    group: int
    condition_weight: float | None

    def __call__(
        self, key: PRNGKeyArray, z: Samples, x: Samples, context: PyTree
    ) -> Int[Array, " batch"]:
        del key
        batch = x.shape[0]
        groups = -(-batch // self.group)
        starts = np.arange(groups + 1) * batch // groups
        own = starts[:-1, None] + np.arange(-(-batch // groups))
        real = own < starts[1:, None]
        # A group that is one short has the first row of the next one in its place, at no cost.
        grouped = lambda leaf: jnp.reshape(leaf, (batch, -1))[np.minimum(own, batch - 1)]
        cost = _squared_distances(grouped(x), grouped(z), real)
        weight = self.condition_weight or 0.0
        for leaf in map(grouped, self._conditions(context)):
            distance = _entries_that_differ(leaf, leaf)
            if _is_floating(leaf):
                distance = _squared_distances(leaf, leaf, real)
            cost = cost + (weight * distance).astype(cost.dtype)
        # What fills a group is paired with itself.
        both, alike = real[:, :, None] & real[:, None], real[:, :, None] == real[:, None]
        cost = jnp.where(both, cost, np.where(alike, 0.0, np.inf).astype(cost.dtype))
        rows = _assignments(cost) + jnp.asarray(starts[:-1, None], jnp.int32)
        return rows[real]

    def _conditions(self, context: PyTree) -> list[Any]:
        if self.condition_weight == 0:
            return []
        conditions = jax.tree.leaves(context)
        if self.condition_weight is None:
            if conditions:
                raise ValueError(
                    "optimal_transport(condition_weight=...): must be given with a context; got "
                    "None. Pass a positive weight of the squared distance of conditions, or 0.0 "
                    "for transport that ignores them, which skews the trained flow."
                )
        elif not conditions:
            raise ValueError(
                "matching_loss(context=...): must be given where its distance counts; got None "
                f"with optimal_transport(condition_weight={self.condition_weight}). Pass the "
                "context, or leave condition_weight out."
            )
        return conditions


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _squared_distances(
    a: Float[Array, "groups n d"], b: Float[Array, "groups n d"], real: Bool[np.ndarray, "groups n"]
):
    """Up to a constant for each row of `a` and each of `b`, which no assignment depends on."""
    dtype, where = state_dtype((a, b)), real[:, :, None]

    def center(x):
        x = x.astype(dtype)
        return x - jnp.mean(x, axis=1, keepdims=True, where=where)

    highest = lax.Precision.HIGHEST
    return -2 * jnp.einsum("gid,gjd->gij", center(a), center(b), precision=highest)


def _entries_that_differ(a: Int[Array, "groups n d"], b: Int[Array, "groups n d"]):
    differ = a[:, :, None, :] != b[:, None, :, :]
    return jnp.sum(differ, axis=-1).astype(jnp.float32)


def assignment(cost: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The column of each row in the assignment of least cost.

    One row after the other is added along the path of least reduced cost to a free column, and the
    rows on it move on. Every loop ends, and the result is a permutation, even if costs are NaN.
    """
    n, axes = cost.shape[0], axes_of(cost)
    columns = jnp.arange(n, dtype=jnp.int32)

    def add_row(start, carry):
        price, row_of, column_of = carry

        def search(carry):
            # Dijkstra's algorithm over columns: close the nearest, go on from the row that has it.
            i, offset, _, _, distance, parent, is_open = carry
            through = cost[i] - price - offset
            shorter = is_open & (through < distance)
            distance = jnp.where(shorter, through, distance)
            parent = jnp.where(shorter, i, parent)
            least = jnp.min(jnp.where(is_open, distance, jnp.inf))
            # A second minimum takes half the time of `argmin` on a CPU.
            nearest = is_open & (distance == least)
            j = jnp.min(jnp.where(nearest, columns, n - 1))
            i = row_of[j]
            is_open = is_open & ((columns != j) | (i < 0))
            return i, cost[i, j] - price[j] - least, j, least, distance, parent, is_open

        zero = jnp.zeros((), cost.dtype)
        distance, parent = jnp.full(n, jnp.inf, cost.dtype), jnp.full(n, start, jnp.int32)
        state = (start, zero, jnp.int32(0), zero, distance, parent, jnp.ones(n, bool))
        state = lax.while_loop(lambda state: state[0] >= 0, search, vary(state, axes))
        _, _, j, least, distance, parent, is_open = state

        def move(carry):
            j, row_of, column_of = carry
            i = parent[j]
            previous = jnp.where(i == start, -1, column_of[i])
            row_of = jnp.where(columns == j, i, row_of)
            return previous, row_of, jnp.where(columns == i, j, column_of)

        _, row_of, column_of = lax.while_loop(lambda c: c[0] >= 0, move, (j, row_of, column_of))
        return jnp.where(is_open, price, price + distance - least), row_of, column_of

    free = jnp.full(n, -1, jnp.int32)
    price = jnp.min(cost, axis=0, initial=jnp.inf)
    return lax.fori_loop(jnp.int32(0), jnp.int32(n), add_row, vary((price, free, free), axes))[2]


# As a program of its own, so that calls outside of `jit` do not compile the loops again.
_assignments = jax.jit(jax.vmap(assignment))
