"""Predictions of one number, against sums of its probabilities and against samples."""

import numpy as np
import pandas as pd
import pytest
from trained import FRAMES, KEY, table

pytestmark = pytest.mark.usefixtures("default_settings")
TARGETS = {"atom": "count", "continuous": "y", "few": "n"}
VALUES = {"atom": np.arange(-30.0, 71.0), "few": np.arange(5.0)}
# Probability between two of the points that stand for a distribution, and of solves.
COARSE = 0.005


def rows(name, n=4):
    return FRAMES[name][:n].reset_index(drop=True)


def probabilities(name, frame):
    """`[rows, values]`, from `log_prob`."""
    values = VALUES[name]
    every = frame.loc[np.repeat(frame.index, len(values))]
    every = every.assign(**{TARGETS[name]: np.tile(values, len(frame))})
    p = np.exp(table(name).log_prob(every, draws=12 if name == "atom" else 1))
    return p.reshape(len(frame), -1)


@pytest.mark.parametrize("name", VALUES)
def test_predictions_are_those_of_the_probabilities(name):
    fitted, frame, values = table(name), rows(name), VALUES[name]
    p, y = probabilities(name, frame), rows(name)[TARGETS[name]].to_numpy(float)
    p /= p.sum(axis=1, keepdims=True)
    spread = FRAMES[name][TARGETS[name]].std()
    np.testing.assert_allclose(fitted.mean(frame), p @ values, atol=0.01 * spread)
    below = np.cumsum(p, axis=1)
    at = np.argmax(values == y[:, None], axis=1)
    np.testing.assert_allclose(fitted.cdf(frame), below[np.arange(len(y)), at], atol=0.01)
    # The score by its other definition, the integral of the squared error of the distribution.
    score = np.sum((below - (values >= y[:, None])) ** 2, axis=1)
    np.testing.assert_allclose(fitted.crps(frame), score, atol=0.01 * spread)
    for q in (0.05, 0.4, 0.93):
        quantile = fitted.quantile(q, frame)
        at = np.argmax(values == quantile[:, None], axis=1)
        reached = below[np.arange(len(y)), at]
        assert (values[at] == quantile).all()
        assert (reached > q - 0.01).all()
        assert (reached - p[np.arange(len(y)), at] < q + 0.01).all()


def test_predictions_are_those_of_samples():
    fitted, frame = table("continuous"), rows("continuous", 3)
    samples = fitted.sample(KEY, 1600, frame).y.to_numpy().reshape(3, -1)
    error = 4 * samples.std() / 40
    np.testing.assert_allclose(fitted.mean(frame), samples.mean(axis=1), atol=error)
    y = frame.y.to_numpy()[:, None]
    pairs = np.abs(samples[:, :800] - samples[:, 800:]).mean(axis=1)
    score = np.abs(samples - y).mean(axis=1) - pairs / 2
    np.testing.assert_allclose(fitted.crps(frame), score, atol=error)
    np.testing.assert_allclose(fitted.cdf(frame), (samples <= y).mean(axis=1), atol=0.05)
    low, high = fitted.interval(0.8, frame)
    inside = (samples >= low[:, None]) & (samples <= high[:, None])
    np.testing.assert_allclose(inside.mean(axis=1), 0.8, atol=0.04)


def test_the_quantile_is_the_inverse_of_the_distribution():
    fitted, frame = table("continuous"), rows("continuous")
    quantiles = fitted.quantile([0.03, 0.5, 0.9], frame)
    assert quantiles.shape == (4, 3)
    np.testing.assert_array_equal(quantiles[:, 1], fitted.quantile(0.5, frame))
    for q, y in zip((0.03, 0.5, 0.9), quantiles.T, strict=True):
        np.testing.assert_allclose(fitted.cdf(frame.assign(y=y)), q, atol=COARSE)


def test_the_distribution_ends_at_zero_and_one():
    frame = rows("atom").assign(count=[-1e6, 1e6, *[0.0] * 2])
    cdf = table("atom").cdf(frame)
    np.testing.assert_allclose(cdf[:2], [0, 1], atol=1e-6)
    # The atom counts at its value, which is more than just below it.
    below = table("atom").cdf(frame.assign(count=-1.0))
    assert (cdf[2:] - below[2:] > 0.2).all()


def test_one_bounded_number_without_others():
    """A column alone has the same predictions in each row, within its bounds."""
    fitted, frame = table("one"), FRAMES["one"][:5]
    quantiles = fitted.quantile([0.001, 0.5, 0.99], frame)
    assert (quantiles == quantiles[0]).all()
    assert (quantiles >= 0).all()
    cdf = fitted.cdf(pd.DataFrame({"x": quantiles[0]}))
    np.testing.assert_allclose(cdf, [0.001, 0.5, 0.99], atol=COARSE)
    assert np.ptp(fitted.mean(frame)) == 0


def test_rows_are_predicted_in_parts(monkeypatch):
    monkeypatch.setattr("jaxode.tabular.predictions.ROWS", 4)
    whole, parts = (table("few").crps(rows("few", n)) for n in (4, 10))
    np.testing.assert_allclose(parts[:4], whole, rtol=1e-5)
    assert len(parts) == 10
    assert table("few").mean(rows("few", 0)).shape == (0,)
