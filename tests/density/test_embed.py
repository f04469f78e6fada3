"""A network that maps contexts of any shape to vectors, once, before the solve."""

import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxode
from jaxode.flows import embedding
from jaxode.training import dataset, files

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


class Mean(eqx.Module):
    """The mean of the points of a set, times a factor."""

    factor: jax.Array

    def __call__(self, points):
        there = jnp.isfinite(points)
        total = jnp.sum(jnp.where(there, points, 0.0), axis=0)
        return self.factor * total / jnp.sum(there, axis=0).astype(points.dtype)


def moving(t, z, args):
    rate, context = args
    return rate * z + context


RATE, FACTOR = jnp.asarray(0.3), jnp.asarray(2.0)
# Equal steps, where results are compared with those of the same steps: they compile sooner.
FLOW = jaxode.cnf(moving, jaxode.standard_normal(1), steps=2)
FIELD = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(1), steps=2)
SETS = RANDOM.normal(size=(3, 4, 1))
SETS[1, 2:] = np.nan
VECTORS = 2 * np.nanmean(SETS, axis=1)
DENSITY = jaxode.bind(FLOW, RATE, context_shape=(4, 1), embed=Mean(FACTOR))
BY_HAND = jaxode.bind(FLOW, RATE, context_shape=(1,))
X = RANDOM.normal(size=(3, 1))

CALLS = {
    "log_prob": lambda density, context: density.log_prob(X, context=context),
    "log_prob of one context": lambda density, context: density.log_prob(X, context=context[0]),
    "log_prob of many": lambda density, context: density.log_prob(X[None], context=context),
    "sample": lambda density, context: density.sample(KEY, context=context),
    "samples of each": lambda density, context: density.sample(KEY, (2, 3), context=context),
    "both": lambda density, context: density.sample_and_log_prob(KEY, context=context),
    "cdf": lambda density, context: density.cdf(X, context=context),
    "quantile": lambda density, context: density.quantile([0.2, 0.7], context=context),
    "nll": lambda density, context: density.flow.nll(density.params, X, context=context),
    "matching": lambda density, context: density.flow.matching_loss(
        density.params, X, key=KEY, context=context
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_it_is_the_density_of_the_vectors(call):
    found, expected = (CALLS[call](*case) for case in ((DENSITY, SETS), (BY_HAND, VECTORS)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_maps_of_standardize_are_refused_for_sets():
    """They are of one place each, and a set has none."""
    given = jaxode.standardize.normal(SETS)
    with pytest.raises(ValueError, match=r"standardize_context=.*several axes.*Pass the data"):
        jaxode.bind(FLOW, RATE, context_shape=(4, 1), embed=Mean(FACTOR), standardize_context=given)


def test_each_context_is_seen_once():
    """Whatever the number of samples and of steps."""
    seen = []

    def embed(points):
        jax.debug.callback(lambda points: seen.append(points), points)
        return points[0]

    density = jaxode.bind(FLOW, RATE, context_shape=(4, 1), embed=embed)
    density.sample(KEY, (2, 3), context=SETS)
    jax.effects_barrier()
    assert len(seen) == 3
    density.log_prob(X, context=SETS[0])
    jax.effects_barrier()
    assert len(seen) == 4
    density.flow.matching_loss(density.params, X, key=KEY, context=SETS)
    jax.effects_barrier()
    assert len(seen) == 7


def test_many_contexts_are_embedded_in_parts(monkeypatch):
    monkeypatch.setattr(embedding, "MOST_EMBEDDED_ROWS", 2)
    _, vectors = embedding.embedded(embedding.Embedded(None, Mean(FACTOR)), SETS)
    np.testing.assert_allclose(vectors, VECTORS, rtol=1e-12)


def test_both_parts_of_the_parameters_have_gradients():
    z, context = DENSITY.to_flow(X, SETS)
    loss = lambda params: DENSITY.flow.nll(params, z, context=context)
    by_hand = lambda rate, factor: FLOW.nll(rate, X, context=factor * VECTORS / 2)
    found = jax.grad(loss)(DENSITY.params)
    expected = jax.grad(by_hand, (0, 1))(RATE, FACTOR)
    np.testing.assert_allclose((found.params, found.embed.factor), expected, rtol=1e-9)


def test_units_are_those_of_the_last_axis_without_gaps():
    sets = RANDOM.normal([5.0, -3.0], [2.0, 0.1], (50, 4, 2))
    sets[::2, 3] = np.nan
    take = lambda points: points[0]
    flow = jaxode.cnf(moving, jaxode.standard_normal(2))
    density = jaxode.bind(flow, RATE, standardize_context=sets, embed=take)
    _, seen = density.to_flow(np.zeros((50, 2)), sets)
    flat = np.asarray(seen).reshape(-1, 2)
    np.testing.assert_allclose(np.nanmean(flat, axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.nanstd(flat, axis=0), 1.0, rtol=1e-12)


def network():
    return jaxode.nn.DeepSet(2, 3, 8, key=KEY)


POINTS = RANDOM.normal(size=(5, 2))


@jax.jit
def embedded(embed, points):
    return embed(points)


def test_a_deep_set_sees_neither_the_order_of_points_nor_those_that_are_missing():
    """Other sets are padded to ten points, by points that are missing or lack a number."""
    embed = functools.partial(embedded, network())
    missing = np.where(np.arange(20).reshape(10, 2) % 4 == 3, 1.0, np.nan)
    padded = lambda points: np.concatenate([points, missing[len(points) :]])
    value = embed(POINTS)
    assert value.shape == (3,)
    np.testing.assert_allclose(embed(padded(POINTS)), value, rtol=1e-12)
    np.testing.assert_allclose(embed(padded(POINTS[::-1])), value, rtol=1e-12)
    counts = np.arange(10).reshape(5, 2)
    np.testing.assert_array_equal(embed(counts), embed(counts.astype(float)))
    assert (np.abs(embed(padded(POINTS[:4])) - value) > 1e-6).all()
    twice = embed(np.concatenate([POINTS, POINTS]))  # as many points count
    assert (np.abs(twice - value) > 1e-6).all()
    assert np.isfinite(embed(np.full((10, 2), np.nan))).all()


@pytest.mark.parametrize("far", [1e6, 1e30])
def test_a_vector_of_a_deep_set_is_finite_for_points_at_any_distance(far, default_settings):
    embed, points = functools.partial(embedded, network()), (far * POINTS).astype(np.float32)
    assert np.isfinite(embed(points)).all()
    points[2, 0] = -np.inf  # which nobody measured
    assert np.isnan(embed(points)).all()


def test_a_deep_set_tells_small_sets_apart_by_their_spread():
    """Not by their points alone, whose difference is about 1e-4 in the vector."""
    close = lambda spread: embedded(network(), 1.0 + spread * POINTS)
    assert np.abs(close(0.02) - close(0.01)).max() > 0.1


def test_gradients_of_a_deep_set_are_finite_with_gaps():
    sets = np.stack([POINTS, np.full((5, 2), np.nan)])
    loss = lambda embed, sets: jnp.sum(jax.vmap(embed)(sets))
    by_network, by_points = jax.jit(jax.grad(loss, (0, 1)))(network(), sets)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_network))
    assert np.isfinite(by_points[0]).all()
    assert not by_points[1].any()


@pytest.mark.slow  # a whole training
def test_fit_learns_the_mean_of_sets_of_unequal_size(default_settings):
    """Of a normal prior and noise of 1: the posterior is `N(sum / (n + 1), 1 / (n + 1))`."""
    random = np.random.default_rng(0)
    theta = random.normal(size=(2000, 1))
    sets = theta[:, None] + random.normal(size=(2000, 6, 1))
    count = random.integers(1, 7, 2000)
    sets[np.arange(6)[None] >= count[:, None]] = np.nan
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(1))
    density = jaxode.bind(
        flow, jaxode.nn.Residual(1, 32, 2, key=KEY, context_size=4), standardize=theta,
        standardize_context=sets, embed=jaxode.nn.DeepSet(1, 4, 32, key=KEY),
    )  # fmt: skip
    density, _ = jaxode.fit(density, theta, context=sets, key=KEY, steps=400, progress=False)
    sets, scale = sets[:500], 1 / np.sqrt(count[:500] + 1)
    mean = np.nansum(sets[..., 0], axis=1) * scale**2
    exact = stats.norm(mean, scale)
    draws = exact.rvs(random_state=random)
    nats = exact.logpdf(draws) - density.log_prob(draws[:, None], context=sets)
    # The divergence from the exact posterior: with one deviation for all it is above 0.04.
    assert np.mean(nats) < 0.03


def test_rows_of_large_data_are_checked_part_by_part(monkeypatch):
    for module in (dataset, files):
        monkeypatch.setattr(module, "MAX_ROWS_COPIED", 2)
    found = dataset.checked_rows("x", DENSITY, X, SETS, dequantize=False, least=1)
    np.testing.assert_array_equal(found.context, SETS)
    nowhere = SETS.copy()
    nowhere[2] = np.nan
    with pytest.raises(ValueError, match=r"context=.*finite; got NaN .*first in row 2"):
        dataset.checked_rows("x", DENSITY, X, nowhere, dequantize=False, least=1)


def test_pickle_writes_both():
    again = pickle.loads(pickle.dumps(OF_SETS))
    log_prob = lambda density: density.log_prob(X, context=POINTS)
    np.testing.assert_array_equal(log_prob(again), log_prob(OF_SETS))


ENSEMBLE = jaxode.nn.Ensemble(
    lambda key: jaxode.nn.Residual(1, 4, 1, key=key, context_size=1), 2, key=KEY
)
OF_SETS = jaxode.bind(
    FIELD, jaxode.nn.Residual(1, 4, 1, key=KEY, context_size=3),
    context_shape=(5, 2), embed=network(),
)  # fmt: skip
REFUSED = {
    "no function": (lambda: jaxode.bind(FLOW, RATE, embed=3),
                    TypeError, r"bind\(embed=...\): must be a function .*; got 3"),
    "a class": (lambda: jaxode.bind(FLOW, RATE, embed=Mean), TypeError, r"bind\(embed=...\)"),
    "no context": (lambda: jaxode.bind(FLOW, RATE, embed=Mean(FACTOR)).log_prob(X),
                   ValueError, r"log_prob\(context=...\): must be given"),
    "another number of rows": (lambda: DENSITY.log_prob(X, context=SETS[:2]),
                               ValueError, r"log_prob\(context=...\): must be one of shape"),
    "infinite numbers in a density": (
        lambda: OF_SETS.log_prob(X, context=jnp.full((5, 2), -jnp.inf)),
        jaxode.SolveError, r"log_prob.*must be finite"),
    "infinite numbers in samples": (
        lambda: OF_SETS.sample(KEY, (3,), context=jnp.full((5, 2), -jnp.inf)),
        jaxode.SolveError, r"sample.*must be finite"),
    "infinite numbers in training": (
        lambda: jaxode.fit(
            OF_SETS, np.zeros((20, 1)), key=KEY, context=np.full((20, 5, 2), np.inf)),
        ValueError, r"fit\(context=...\): must be finite"),
    "a shorter set": (lambda: DENSITY.log_prob(X, context=SETS[:, :3]),
                      ValueError, r"got shape \(3, 3, 1\). Pad sets to 4 points, by NaN for jax"),
    "one part": (lambda: DENSITY.with_params(RATE), TypeError, "with_params.*must be a pair"),
    "an energy": (lambda: DENSITY.reverse_kl_loss(lambda x: -x[0], 3, key=KEY, context=SETS),
                  ValueError, "come without embed="),
    "an ensemble": (lambda: jaxode.fit(
        jaxode.bind(FIELD, ENSEMBLE, embed=Mean(FACTOR)), np.zeros((20, 1)), key=KEY,
        context=np.ones((20, 4, 1))), ValueError, r"fit\(density=...\): must have one network"),
    "gaps that it cannot read": (lambda: jaxode.fit(
        jaxode.bind(FLOW, RATE, embed=lambda points: points[0]), RANDOM.normal(size=(20, 1)),
        context=np.full((20, 4, 1), np.nan), key=KEY), ValueError, r"fit\(context=...\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
