"""Couplings: a permutation, the exact optimum within each group, and the condition in the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxode.coupling import independent, optimal_transport

KEY = jax.random.key(0)

# Functions that make one. A new one is one row.
COUPLINGS = {"independent": independent, "optimal_transport": lambda: optimal_transport(3)}


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rows_of(chosen, z, x, context=None):
    return np.asarray(jax.jit(chosen.pair)(KEY, z, x, context))


def squared_distances(a, b):
    a, b = (np.asarray(c, np.float64).reshape(len(c), -1) for c in (a, b))
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def costs(cost, rows, sizes):
    """Of the pairs within each block of rows, of these sizes, and of SciPy's there."""
    assert sum(sizes) == len(rows)
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        block = slice(start, start + size)
        own, columns = cost[block, block], rows[block] - start
        assert sorted(columns) == list(range(len(own)))
        i, j = linear_sum_assignment(own)
        yield own[np.arange(len(own)), columns].sum(), own[i, j].sum()


# Batch, group, and the sizes that its groups then have.
@pytest.mark.parametrize(
    ("batch", "group", "sizes", "event"),
    [
        (128, 64, (64, 64), (2,)), (7, 3, (2, 2, 3), (3, 2)),
        (57, 8, (7, 7, 7, 7, 7, 7, 7, 8), (2,)), (1, 64, (1,), ()),
    ],
)  # fmt: skip
def test_exact_within_each_group(batch, group, sizes, event):
    z, x = normal(1, batch, *event), 2 * normal(2, batch, *event) ** 3 + 5
    rows = rows_of(optimal_transport(group), z, x)
    for own, best in costs(squared_distances(x, z), rows, sizes):
        np.testing.assert_allclose(own, best, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(64,), (9, 9, 10)], ids=str)
def test_exact_in_float32_far_from_the_origin(sizes):
    z, x = (normal(seed, sum(sizes), 2, dtype=jnp.float32) + 10_000 for seed in (1, 2))
    rows = rows_of(optimal_transport(max(sizes)), z, x)
    for own, best in costs(squared_distances(x, z), rows, sizes):
        np.testing.assert_allclose(own, best, rtol=1e-5)


def test_exact_with_ties():
    z, x = (jax.random.randint(jax.random.key(seed), (64, 1), 0, 3) for seed in (1, 2))
    z, x = z.astype(jnp.float64), x.astype(jnp.float64)
    ((own, best),) = costs(squared_distances(x, z), rows_of(optimal_transport(64), z, x), [64])
    np.testing.assert_allclose(own, best, atol=1e-12)


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_permutation_whatever_the_data(name):
    z, x = normal(1, 7, 2), normal(2, 7, 2)
    pair = jax.jit(COUPLINGS[name]().pair)
    for number in (0.0, jnp.nan, jnp.inf, 1e300):
        rows = pair(KEY, z, x.at[3, 0].set(number), None)
        assert rows is None or sorted(np.asarray(rows)) == list(range(7))


def test_the_condition_counts_as_much_as_its_weight():
    weight = 0.5
    z, x, c = normal(1, 32, 2), normal(2, 32, 2), {"a": normal(3, 32, 3), "b": normal(4, 32)}
    rows = rows_of(optimal_transport(64, weight), z, x, c)
    condition = sum(squared_distances(leaf, leaf) for leaf in c.values())
    ((own, best),) = costs(squared_distances(x, z) + weight * condition, rows, [32])
    np.testing.assert_allclose(own, best, rtol=1e-12)


@pytest.mark.parametrize(
    ("one_hot", "weight", "dtype"),
    [
        (True, 1e8, jnp.float32),
        (False, 1e300, jnp.float32),
    ],
)
def test_a_large_weight_exchanges_only_within_a_condition(one_hot, weight, dtype):
    labels = jax.random.randint(KEY, (64,), 0, 3)
    z, x = normal(1, 64, 2, dtype=dtype), normal(2, 64, 2, dtype=dtype)
    x = x + 4 * labels[:, None].astype(dtype)
    context = jax.nn.one_hot(labels, 3, dtype=dtype) if one_hot else labels
    rows = rows_of(optimal_transport(64, weight), z, x, context)
    assert (labels[rows] == labels).all()
    plain = rows_of(optimal_transport(64, 0.0), z, x, context)
    assert (labels[plain] != labels).mean() > 0.3
    for label in range(3):
        own = np.flatnonzero(labels == label)
        ((cost, best),) = costs(
            squared_distances(x[own], z[own]), np.searchsorted(own, rows[own]), [len(own)]
        )
        # Costs of single pairs are rounded.
        np.testing.assert_allclose(cost, best, rtol=4 * jnp.finfo(dtype).eps)


def test_equal_settings_are_equal():
    z, x = normal(1, 20, 2), normal(2, 20, 2)
    assert optimal_transport(8, 0.5) == optimal_transport(np.int64(8), np.float32(0.5))
    assert len({optimal_transport(64, 0.0), optimal_transport(64, 0), optimal_transport(32)}) == 2
    assert independent() == independent() != optimal_transport()
    assert independent().pair(KEY, z, x, None) is None


@pytest.mark.slow  # programs of another dtype
def test_a_complex_condition_is_its_real_and_imaginary_part():
    z, x = jax.random.normal(jax.random.key(0), (2, 16, 2))
    angle = jnp.linspace(0.0, 6.0, 16)[:, None]
    pair = optimal_transport(16, 10.0).pair
    parts = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
    expected, on_circle = pair(KEY, z, x, parts), jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_array_equal(pair(KEY, z, x, on_circle), expected)
    assert (pair(KEY, z, x, jnp.arange(16)[:, None]) != expected).any()
