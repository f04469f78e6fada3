"""Levels of one number that hold on rows which trained no network."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.special import ndtr
from tables import FRAMES, KEY, OPTIONS
from untrained import untrained

import jaxode
from jaxode import tabular
from jaxode.nn import Ensemble
from jaxode.tabular import fit_table
from jaxode.tabular.predictions.level_calibration import calibrated

pytestmark = pytest.mark.usefixtures("default_settings")
ROWS = 4000
DRAWN = scipy.stats.gamma(3).rvs((ROWS, 1), random_state=1)


def still(t, z, p):
    return p * z


@functools.cache
def of_gamma():
    """A normal density, and what makes it that of gamma variables."""
    flow = jaxode.cnf(still, jaxode.standard_normal(1), rtol=1e-5, atol=1e-5)
    start = jaxode.bind(flow, jnp.zeros(()), standardize=(3.0, 3.0))
    return start, calibrated(start, start.cdf(DRAWN))


def test_levels_are_those_of_the_rows():
    """Up to five times `1 / (2 sqrt(rows))`, the error of the share of rows at a median."""
    _, density = of_gamma()
    x = scipy.stats.gamma(3).ppf([0.01, 0.1, 0.5, 0.9, 0.99])
    expected = scipy.stats.gamma(3).cdf(x)
    error = 5 / (2 * np.sqrt(ROWS))
    np.testing.assert_allclose(density.cdf(x[:, None]), expected, atol=error)
    np.testing.assert_allclose(
        density.cdf(density.quantile(expected)[:, None]), expected, atol=1e-4
    )


def test_levels_are_those_of_the_weighted_rows():
    """With weights of `exp(-x / 2)`, the rows are gamma of two thirds of the scale, and 70% as
    many."""
    start, _ = of_gamma()
    weights = 1e9 * np.exp(-DRAWN[:, 0] / 2)
    density = calibrated(start, start.cdf(DRAWN), weights)
    weighted = scipy.stats.gamma(3, scale=2 / 3)
    levels = np.array([0.01, 0.1, 0.5, 0.9, 0.99])
    found = density.cdf(weighted.ppf(levels)[:, None])
    np.testing.assert_allclose(found, levels, atol=5 / (2 * np.sqrt(0.7 * ROWS)))


def test_equal_weights_are_none():
    start, density = of_gamma()
    weighted = calibrated(start, start.cdf(DRAWN), np.full(ROWS, 0.3))
    pairs = (jax.tree.leaves(d.flow.base) for d in (weighted, density))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    one = np.where(np.arange(ROWS) == 7, 1.0, 1e-9)
    with pytest.raises(ValueError, match=r"\(weights=...\): must count at least 10 .* worth 1 of"):
        calibrated(start, start.cdf(DRAWN), one)


def test_it_is_one_distribution():
    start, density = of_gamma()
    x = np.linspace(-30, 60, ROWS)
    p = np.exp(density.log_prob(x[:, None]))
    np.testing.assert_allclose(np.trapezoid(p, x), 1, atol=2e-3)
    below = np.trapezoid(p[x <= 2.0], x[x <= 2.0])
    drawn = np.asarray(density.sample(KEY, (ROWS - 1,)))
    level, *levels = density.cdf(np.append(np.full((1, 1), x[x <= 2.0][-1]), drawn, axis=0))
    np.testing.assert_allclose(level, below, atol=2e-3)
    # Kolmogorov and Smirnov's distance is beyond this once in 10,000 times.
    assert scipy.stats.kstest(levels, "uniform").statistic < 2.2 / np.sqrt(ROWS)
    gain = density.log_prob(DRAWN).mean() - start.log_prob(DRAWN).mean()
    assert gain > 0.05


@dataclasses.dataclass(frozen=True)
class OfNetworks:
    """A density of several networks, whose levels move by one number each."""

    params: Any

    def with_params(self, network):
        return OfNetworks(network)

    def cdf(self, x, *, context=None):
        return ndtr(np.asarray(x, float)[..., 0] - self.params)


def test_rows_aside_are_judged_by_networks_that_did_not_see_them(monkeypatch):
    """Levels of the networks' own training rows would be another."""
    density, seen = OfNetworks(Ensemble.of([0.0, 0.3, 1.0])), []
    monkeypatch.setattr(fit_table, "_train_numbers", lambda *_: (density, []))
    monkeypatch.setattr(
        fit_table, "calibrated", lambda density, *aside: seen.append(aside) or density
    )
    frame = FRAMES["continuous"]
    weights = 1.0 + np.arange(len(frame)) % 7
    options = {"key": KEY, "members": 3, "calibrate": True, "progress": False, "weights": weights}
    table, _ = tabular.fit(frame, **OPTIONS["continuous"] | options)
    ((levels, weights_aside),) = seen
    assert len(levels) == 3 * 30
    of = lambda network: dataclasses.replace(table, density=OfNetworks(network))
    each = np.stack([of(network).cdf(frame) for network in density.params.members])
    sides, aside = [], np.stack([levels, weights_aside])
    for i, (part, own) in enumerate(np.split(aside, 3, axis=1)):
        apart = np.abs(each[i][:, None] - part)
        assert apart.min(axis=0).max() < 1e-6
        assert np.abs(each[i - 1][:, None] - part).min(axis=0).max() > 1e-3
        sides.append(set(apart.argmin(axis=0)))
        np.testing.assert_array_equal(own, weights[apart.argmin(axis=0)])
    assert len(set.union(*sides)) > 60  # each has other rows aside


def test_a_table_uses_them():
    frame, options = FRAMES["continuous"], OPTIONS["continuous"] | {"members": 1, "flow": True}
    table = untrained(frame, calibrate=True, **options)
    plain = untrained(frame, **options)
    some = frame.head(30)  # as many as are set aside
    assert np.abs(table.cdf(some) - plain.cdf(some)).max() > 0.01
    q = np.array([0.1, 0.5, 0.9])
    levels = [table.cdf(some.assign(y=y)) for y in table.quantile(q, some).T]
    np.testing.assert_allclose(np.stack(levels, 1), np.tile(q, (30, 1)), atol=1e-3)


def test_what_cannot_be_calibrated():
    both = pd.DataFrame({"x": np.arange(20.0), "y": np.arange(20.0) ** 2})
    with pytest.raises(ValueError, match=r"^tabular.fit\(calibrate=...\): needs one mod"):
        tabular.fit(both, key=KEY, calibrate=True)
    with pytest.raises(ValueError, match=r"^tabular.fit\(calibrate=...\): needs a number"):
        tabular.fit(both, key=KEY, given="y", kinds={"x": ("periodic", 24)}, calibrate=True)
    with pytest.raises(TypeError, match=r"^tabular.fit\(calibrate=...\): must be True or False"):
        tabular.fit(both, key=KEY, calibrate=cast(Any, "yes"))
