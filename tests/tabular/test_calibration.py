"""Levels of one number that hold on rows which trained no network."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from trained import FRAMES, KEY, OPTIONS

import jaxode
from jaxode import tabular
from jaxode.tabular import training
from jaxode.tabular.calibration import calibrated

pytestmark = pytest.mark.usefixtures("default_settings")
ROWS = 4000
DRAWN = scipy.stats.gamma(3).rvs((ROWS, 1), random_state=1)


def still(t, z, p):
    return p * z


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


def test_it_is_one_distribution():
    start, density = of_gamma()
    x = np.linspace(-30, 60, 9001)
    p = np.exp(density.log_prob(x[:, None]))
    np.testing.assert_allclose(np.trapezoid(p, x), 1, atol=2e-3)
    below = np.trapezoid(p[x <= 2.0], x[x <= 2.0])
    np.testing.assert_allclose(density.cdf([[2.0]]), below, atol=2e-3)
    drawn = np.asarray(density.sample(KEY, (4000,)))[:, 0]
    # Kolmogorov and Smirnov's distance is beyond this once in 10,000 times.
    assert scipy.stats.kstest(density.cdf(drawn[:, None]), "uniform").statistic < 2.2 / np.sqrt(
        4000
    )
    gain = density.log_prob(DRAWN).mean() - start.log_prob(DRAWN).mean()
    assert gain > 0.05


def test_rows_aside_are_judged_by_networks_that_did_not_see_them(monkeypatch):
    """Levels of the networks' own training rows would be another."""
    seen = []
    monkeypatch.setattr(
        training, "calibrated", lambda density, levels: seen.append(levels) or density
    )
    options = OPTIONS["continuous"] | {"key": KEY, "steps": 1, "members": 3, "progress": False}
    table, _ = tabular.fit(FRAMES["continuous"], calibrate=True, **options)
    (levels,) = seen
    assert len(levels) == 3 * 30
    networks = table.density.params.members
    assert len(networks) == 3
    of = lambda network: dataclasses.replace(table, density=table.density.with_params(network))
    each = np.stack([of(network).cdf(FRAMES["continuous"]) for network in networks])
    for i, part in enumerate(np.split(levels, 3)):
        near = np.abs(each[i][:, None] - part).min(axis=0)
        assert near.max() < 1e-4
        assert np.abs(each[i - 1][:, None] - part).min(axis=0).max() > 1e-4


def test_a_table_uses_them():
    options = OPTIONS["continuous"] | {"key": KEY, "steps": 50, "members": 1, "progress": False}
    frame = FRAMES["continuous"]
    table, _ = tabular.fit(frame, calibrate=True, **options)
    plain, _ = tabular.fit(frame, **options)
    some = frame.head(20)
    assert np.abs(table.cdf(some) - plain.cdf(some)).max() > 0.01
    q = np.array([0.1, 0.5, 0.9])
    levels = [table.cdf(some.assign(y=y)) for y in table.quantile(q, some).T]
    np.testing.assert_allclose(np.stack(levels, 1), np.tile(q, (20, 1)), atol=1e-3)


def test_what_cannot_be_calibrated():
    both = pd.DataFrame({"x": np.arange(20.0), "y": np.arange(20.0) ** 2})
    with pytest.raises(ValueError, match=r"^tabular.fit\(calibrate=...\): needs one mod"):
        tabular.fit(both, key=KEY, calibrate=True)
    with pytest.raises(ValueError, match=r"^tabular.fit\(calibrate=...\): needs a number"):
        tabular.fit(both, key=KEY, given="y", kinds={"x": ("periodic", 24)}, calibrate=True)
    with pytest.raises(TypeError, match=r"^tabular.fit\(calibrate=...\): must be True or False"):
        tabular.fit(both, key=KEY, calibrate=cast(Any, "yes"))
