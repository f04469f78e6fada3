"""Columns whose end is their start: cells go around the circle, and no cut shows."""

import functools
import math

import jax
import numpy as np
import pandas as pd
import pytest
from untrained import untrained

from jaxode.tabular.columns.modes_of_column import angular
from jaxode.tabular.columns.periodic import Circle

pytestmark = pytest.mark.usefixtures("default_settings")
KEY, N, RNG = jax.random.key(0), 300, np.random.default_rng(0)
NORTH = np.degrees(RNG.vonmises(0.2, 2.0, N)) % 360
TENS = np.where(RNG.random(N) < 0.5, np.round(NORTH), np.round(NORTH, -1))
CALM = np.where(RNG.random(N) < 0.2, 0.0, TENS)  # an atom, also as 360
NUMBERS = {
    "degrees": (np.floor(NORTH), 360.0),
    "tens": (TENS, 360.0),
    "calms": (CALM, 360.0),
    "signed degrees": (np.round(NORTH - 180), 360.0),
    "hours": (np.round(NORTH / 15, 1), 24.0),
    "days of the year": (np.round(NORTH), 365.25),
    "radians": (np.round(np.radians(NORTH), 2), 2 * math.pi),
    "signed radians": (np.round(np.radians(NORTH - 180), 2), 2 * math.pi),
    "continuous": (NORTH, 360.0),
    # Twice each: decimals that hardly repeat count as continuous.
    "more than one turn": (np.round(np.tile(NORTH[: N // 2], 2) * 3, 1), 360.0),
}


def column_of(name):
    x, period = NUMBERS[name]
    circle = Circle.from_values("x", x, period)
    return angular("x", x, np.zeros(len(x), bool), circle), x


@pytest.mark.parametrize("name", NUMBERS)
def test_values_come_back_in_one_period(name):
    column, x = column_of(name)
    _, period = NUMBERS[name]
    mode, wrapped = column.encode(x, np.zeros(len(x), bool))
    assert (mode >= 0).all()
    turns = (x - wrapped) / period
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-9)
    assert ((wrapped >= column.circle.start) & (wrapped < column.circle.end)).all()
    low, width, _ = column.cells(mode, wrapped)
    for part in (1e-6, 0.5, 1 - 1e-6):
        scaled = (low + part * width) % (2 * np.pi)  # as the flow draws them
        back = column.decode(mode, scaled, np.random.default_rng(0)).astype(float)
        error = np.abs(back - wrapped)
        rounded = column.resolution and not column.circle.is_divided_by(column.resolution)
        # Numbers of more turns than one lie between those of the first.
        atol = column.resolution if rounded else 1e-9
        assert (np.minimum(error, period - error) <= atol).all()


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "continuous"])
def test_cells_of_each_grid_go_around_once(name):
    column, _ = column_of(name)
    period = column.circle.period
    assert name != "calms" or 0.0 in column.values
    assert name not in ("tens", "calms") or column.grids == (10.0, 1.0)
    for i in range(len(column.grids)):
        x = np.linspace(column.circle.start, column.circle.end, 20_011)[:-1]
        low, width = column.cell(x, i)
        behind = (x - low + 1e-6) % period
        assert (behind <= width + 2e-6).all()
        numbers, first = np.unique(low, return_index=True)
        assert ((numbers >= column.circle.start) & (numbers < column.circle.end)).all()
        np.testing.assert_allclose(width[first].sum(), period)


def test_usual_periods():
    periods = {
        1.0: [0.1, 0.9], 2 * math.pi: [-3.1, 3.0], 7.0: [0, 6], 12.0: [1, 12], 24.0: [8, 19],
        60.0: [-30, 29], 360.0: [0, 360],
    }  # fmt: skip
    for period, values in periods.items():
        circle = Circle.from_values("x", np.array(values, float), None)
        assert circle.period == period
        assert circle.start == (-period / 2 if values[0] < 0 else values == [1, 12])


def test_days_of_the_year_stay_from_1():
    circle = Circle.from_values("day", np.arange(1.0, 367), 365.25)
    days = np.array([1.0, 365, 366, 367, 0.0])
    np.testing.assert_allclose(circle.wrapped(days, 1.0), [1, 365, 366, 1.75, 365.25])


def test_months_stay_from_1_to_12():
    circle = Circle.from_values("month", np.arange(1.0, 13), 12)
    np.testing.assert_array_equal(circle.wrapped(np.array([0.0, 12, 13, 24]), 1.0), [12, 12, 1, 12])


FRAMES = {
    "calms": pd.DataFrame(
        {
            "wind": np.where(RNG.random(N) < 0.1, np.nan, CALM),
            "group": np.where((TENS < 90) ^ (RNG.random(N) < 0.2), "a", "b"),
        }
    ),
    "phases": pd.DataFrame(
        {
            "phase": np.radians(NORTH - 180),
            "speed": RNG.gamma(3.0, 200.0, N),
            "hour": RNG.integers(0, 240, N) / 10,
        }
    ),
}
OPTIONS = {
    "calms": {"kinds": {"wind": "periodic"}},
    "phases": {
        "kinds": {"phase": "periodic", "hour": ("periodic", 24)}, "given": "hour",
        "bounds": {"speed": (0, None)},
    },
}  # fmt: skip


@functools.cache
def table(name, flow=False):
    return untrained(FRAMES[name], flow=flow, **OPTIONS[name])


def test_rounded_winds_sum_to_one():
    winds = np.append(np.arange(360.0), np.nan)
    frame = pd.DataFrame({"wind": np.tile(winds, 2), "group": np.repeat(["a", "b"], 361)})
    # Angles that stand in for calms and missing winds need more draws than the noise of a degree.
    p, stands_in = np.zeros(len(frame)), (frame.wind.isna() | (frame.wind == 0)).to_numpy()
    for rows, draws in ((stands_in, 2048), (~stands_in, 8)):
        p[rows] = np.exp(table("calms").log_prob(frame[rows], draws=draws))
    assert abs(p.sum() - 1) < 0.02  # the noise of 8 draws is up to 0.002, by the seed
    # An imputed wind has the conditional probability.
    row = pd.DataFrame({"wind": [np.nan], "group": ["a"]})
    drawn = table("calms").impute(KEY, row, 200).wind
    assert drawn.between(0, 360, inclusive="left").all()
    p, angle = p[:360] / p[:360].sum(), np.radians(winds[:360])
    for f in (np.sin, np.cos):
        mean, of_drawn = np.sum(p * f(angle)), f(np.radians(drawn))
        assert abs(of_drawn.mean() - mean) < 4 * of_drawn.std() / np.sqrt(200)


@pytest.mark.parametrize(("period", "digits"), [(24.0, 1), (2 * math.pi, 2)])
def test_log_prob_of_rounded_numbers_is_a_density(period, digits):
    x = np.round(RNG.uniform(0, period, 2000), digits)
    fitted = untrained(pd.DataFrame({"x": x}), kinds={"x": ("periodic", period)})
    every = pd.DataFrame({"x": np.arange(round(period * 10**digits)) / 10**digits})
    total = np.exp(fitted.log_prob(every)).sum() / 10**digits
    assert abs(total - 1) < 0.005  # the cell of 6.28 ends before 6.29


def test_both_ends_of_a_period_are_one_value():
    # Row by row, which draws the same noise for each.
    frames = [pd.DataFrame({"wind": [x], "group": "a"}) for x in (0.0, 360.0, -720.0, 5.0, 365.0)]
    log_prob = np.concatenate([table("calms").log_prob(frame) for frame in frames])
    assert np.isfinite(log_prob).all()
    assert (log_prob[:3] == log_prob[0]).all()
    assert log_prob[3] == log_prob[4]
    assert table("calms").kinds == {"wind": ("periodic", 360.0), "group": "categorical"}


def test_samples_are_in_the_period():
    winds = table("calms").sample(KEY, 400).wind
    assert winds.dropna().between(0, 360, inclusive="left").all()
    assert (winds.dropna() % 1 == 0).all()
    # The first column starts at its shares.
    assert abs(winds.isna().mean() - FRAMES["calms"].wind.isna().mean()) < 0.1
    assert abs((winds == 0).mean() - (CALM % 360 == 0).mean()) < 0.1
    hours = pd.DataFrame({"hour": [1.0, 12.0]})
    samples = table("phases").sample(KEY, 100, given=hours)
    assert samples.phase.between(-np.pi, np.pi).all()
    assert (samples.phase < 0).any()
    assert (samples.speed > 0).all()


def test_an_angle_beside_a_bounded_number_has_a_density():
    phases, logs = np.arange(-12, 12) * np.pi / 12, np.linspace(0.0, 10.0, 50)
    frame = pd.MultiIndex.from_product([phases, np.exp(logs)], names=["phase", "speed"])
    frame = frame.to_frame(index=False).assign(hour=23.9)
    log_prob = table("phases", flow=True).log_prob(frame)
    total = np.exp(log_prob) * frame.speed * np.pi / 12 * (logs[1] - logs[0])
    assert abs(total.sum() - 1) < 0.005
    # The base is uniform on a circle, which a flow as drawn changes by some parts.
    assert total.groupby(frame.phase).sum().min() > 1 / 24 / 3
    moved = frame.assign(phase=frame.phase + 2 * np.pi, hour=-0.1)
    again = table("phases", flow=True).log_prob(moved)
    np.testing.assert_allclose(again, log_prob, atol=1e-3)


def test_given_angles_are_seen_as_points_on_a_circle():
    encoder = table("phases").encoder
    assert [column.width for column in encoder.given] == [2]
    before, after = (
        table("phases").log_prob(pd.DataFrame({"phase": [0.1], "speed": [500.0], "hour": [hour]}))
        for hour in (0.0, 24.0)
    )
    assert before == after


@pytest.mark.parametrize("method", ["cdf", "mean", "crps"])
def test_a_circle_has_no_order(method):
    frame = pd.DataFrame({"wind": np.arange(N) % 8 * 45.0})
    fitted = untrained(frame, kinds={"wind": "periodic"})
    with pytest.raises(ValueError, match="need an ordered column; "):
        getattr(fitted, method)(frame)
    with pytest.raises(ValueError, match="need an ordered column"):
        fitted.quantile(0.5, frame)
    with pytest.raises(ValueError, match="need an ordered column"):
        fitted.interval(0.9, frame)
