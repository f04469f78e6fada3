"""Rows that count more than others."""

import jax
import numpy as np
import pytest
from fitting import BENT, OTHERS, cheap, equal, fit, number
from scipy import stats

from jaxode.training.dataset import DataArguments, datasets_of_members, set_aside
from jaxode.training.files import Without
from jaxode.training.sources import InFile, InMemory, Rows, drawn_by

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)
WEIGHTS = np.array([0.0, 1.0, 3.0, 0.0, 4.0, 0.0])
X = np.arange(6.0)[:, None]
COUNT = 40_000


def test_rows_are_drawn_in_proportion():
    """The share of a row of weight `p` strays by `sqrt(p (1 - p) / n)`; here by up to five."""
    share = WEIGHTS / WEIGHTS.sum()
    error = 5 * np.sqrt(share * (1 - share) / COUNT)
    counts = np.bincount(drawn_by(WEIGHTS, KEY, COUNT), minlength=6)
    assert (np.abs(counts / COUNT - share) <= error).all()


def test_sources_give_rows_by_their_weights():
    rows = Rows(X, None)
    large = Rows(Without(X, np.array([1]), X.dtype), None)
    for source, left in (
        (InMemory(rows, weights=WEIGHTS), [1, 2, 4]),
        (InFile(large, weights=np.delete(WEIGHTS, 1)), [2, 4]),
    ):
        assert source.whole() is None
        assert sorted(set(source.take(KEY, 300).x[:, 0])) == left
        assert set(source.sample(300).x[:, 0]) <= set(left)  # of six rows in memory, six


def test_parts_keep_their_weights():
    weights = np.arange(1.0, len(BENT) + 1)
    rows = Rows(BENT, weights[:, None])
    for source, aside, of_aside in set_aside(rows, 0.2, KEY, members=3, weights=weights):
        np.testing.assert_array_equal(of_aside, aside.context[:, 0])
        np.testing.assert_array_equal(source.weights, source.rows.context[:, 0])


def test_a_row_without_weight_is_left_out():
    """Whatever it holds. Equal weights are one."""
    x, weights = BENT.copy(), np.full(len(BENT), 8.0)
    x[::5], weights[::5] = np.nan, 0.0
    run = lambda x, weights: fit(cheap(), x, weights=weights, steps=50, validation=OTHERS)
    density, history = run(x, weights)
    alike, points = run(BENT[weights > 0], weights[weights > 0] / 8)
    assert equal(density, alike)
    # Means of other weights round differently in float32.
    np.testing.assert_allclose(history[-1].nats, points[-1].nats, rtol=1e-6)


def test_validations_are_weighted_means():
    """With a field of zero, as at the start of a parameter of zero."""
    start = cheap(params=number(0.0))
    weights = np.where(BENT[:, 0] > 0, 1.0, 1e-6)
    _, history = fit(start, BENT, weights=weights, steps=1)
    key = jax.random.split(jax.random.key(1), 6)[0]
    (dataset,) = datasets_of_members(start, DataArguments(BENT, weights=weights), key)
    z, log_det = start.to_flow(dataset.validation.x), start.log_det(dataset.validation.x)
    log_probs = np.asarray(stats.norm.logpdf(z).sum(axis=1) + log_det)
    expected = -np.average(log_probs, weights=dataset.weights)
    assert abs(expected + np.mean(log_probs)) > 0.05
    np.testing.assert_allclose(history[0].nats, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (BENT, np.ones(3), "must have one weight per sample"),
        (BENT, -np.ones(len(BENT)), "must be finite, at least 0, and not all zero"),
        (BENT, "equal", "must be real numbers"),
        ([BENT, BENT], np.ones(len(BENT)), "must be left out where x is an iterable"),
    ],
)
def test_wrong_weights(x, weights, message):
    with pytest.raises((TypeError, ValueError), match=rf"^fit\(weights=...\): {message}"):
        fit(x=x, weights=weights, validation=OTHERS)
