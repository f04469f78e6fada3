"""Rows of a table that count more than others."""

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import optional, with_slow
from untrained import small_networks

from jaxode import tabular
from jaxode.tabular import fit_table

pytestmark = pytest.mark.usefixtures("default_settings")
KEY = jax.random.key(0)
N, COUNT = 400, 4000
RNG = np.random.default_rng(0)
CLASS = RNG.integers(0, 2, N)
DATA = {
    "class": np.array(["a", "b"])[CLASS].tolist(),
    "y": (RNG.normal(size=N) + 3 * CLASS).tolist(),
}
WEIGHTS = np.where(CLASS == 1, 4.0, 1.0) * (np.arange(N) >= 10)


@pytest.mark.parametrize("library", with_slow(["pandas", "polars"], ["polars"]))  # train the same
def test_samples_have_the_weighted_shares(library, monkeypatch):
    """Those of categories and of numbers, whose proposals see the weights, too.

    The share of 4,000 samples strays by 0.006; that of the network, by its smoothing and training,
    by about 0.01. Without weights it would be 0.5.
    """
    datasets = []
    # The numbers are trained by `jaxode.fit`, whose tests draw by weights.
    take = lambda density, parts, *_: datasets.extend(parts) or (density, [])
    monkeypatch.setattr(fit_table, "train", take)
    frame = optional(library).DataFrame(DATA)
    options = {"steps": 200, "members": 1, "progress": False}
    with small_networks():
        table, _ = tabular.fit(frame, key=KEY, weights=WEIGHTS, **options)
    drawn = np.array(table.sample(KEY, COUNT)["class"].to_list()) == "b"
    share = np.average(CLASS, weights=WEIGHTS)
    assert abs(drawn.mean() - share) < 0.04
    (mean,), _ = table.moments
    column = table.encoder.columns[1]
    expected = np.average(DATA["y"], weights=WEIGHTS)
    # Of the training rows, a part of all.
    np.testing.assert_allclose(mean * column.scale + column.center, expected, atol=0.1)
    (dataset,) = datasets
    sides = (dataset.source.rows, dataset.source.weights), (dataset.validation, dataset.weights)
    for rows, weights in sides:  # each with its own
        np.testing.assert_array_equal(weights, np.where(rows.context[:, 1] == 1, 4.0, 1.0))


def test_wrong_weights():
    frame = pd.DataFrame(DATA)
    with pytest.raises(ValueError, match=r"^tabular.fit\(weights=...\): must have one weight per"):
        tabular.fit(frame, key=KEY, weights=np.ones(3))
    with pytest.raises(
        ValueError, match=r"^tabular.fit\(frame=...\): must have at least 10 rows; got 3"
    ):
        tabular.fit(frame, key=KEY, weights=(np.arange(N) < 3).astype(float))
