"""Dates are numbers of days or seconds in the model, and come back as they were."""

import datetime
import functools
import zoneinfo

import jax
import narwhals as nw
import numpy as np
import pandas as pd
import pytest
from helpers import optional
from untrained import untrained

from jaxode.tabular import frames
from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.dates import Dates
from jaxode.tabular.columns.modes_of_column import numeric

pytestmark = pytest.mark.usefixtures("default_settings")
KEY, N, RNG = jax.random.key(0), 300, np.random.default_rng(0)
DAYS = pd.Series(pd.Timestamp("2020-02-20") + pd.to_timedelta(RNG.binomial(80, 0.4, N), "D"))
NEW_YORK = "America/New_York"  # which changes its clocks on March 8
TIMES = DAYS + pd.to_timedelta(RNG.integers(0, 86400, N), "s")
HOLES = DAYS.where(RNG.random(N) > 0.1)
LOCAL = TIMES.dt.tz_localize("UTC").dt.tz_convert
TYPES = {
    "days": (DAYS, "D"),
    "days with holes": (HOLES, "D"),
    "in nanoseconds": (HOLES.astype("datetime64[ns]"), "D"),
    "days of New York": (HOLES.dt.tz_localize(NEW_YORK), "D"),
    "seconds of New York": (LOCAL(NEW_YORK), "s"),
    "seconds of an offset": (LOCAL(datetime.timezone(datetime.timedelta(hours=2))), "s"),
    "seconds": (TIMES, "s"),
    "hours": (TIMES.dt.floor("h"), "h"),
    "minutes": (TIMES.dt.floor("min"), "m"),
    "microseconds": (TIMES + pd.to_timedelta(RNG.integers(0, 10**6, N), "us"), "us"),
    "months": (DAYS.dt.to_period("M").dt.to_timestamp(), "M"),
    "date objects": (HOLES.dt.date.where(HOLES.notna(), None).astype(object), "D"),
    **{
        format: (HOLES.dt.strftime(format), "D")
        for format in ("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%y", "%d.%m.%Y", "%Y%m%d", "%b %d, %Y")
    },
    "%Y-%m-%dT%H:%M:%SZ": (TIMES.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), "s"),
    "%d.%m.%Y %H:%M": (TIMES.dt.strftime("%d.%m.%Y %H:%M"), "m"),
}
POLARS = {"days": "D", "seconds": "s", "seconds of New York": "s", "date objects": "D"}


def come_back(native, unit, format=None):
    frame = frames.as_frame("frame", native)
    dates = Dates.from_column("day", frame, None, False)
    assert (dates.unit, dates.format) == (unit, format)
    numbers, missing, _ = dates.values("frame", frame, "day")
    assert (missing == frame["day"].is_null().to_numpy()).all()
    assert (numbers[~missing] % 1 == 0).all()
    assert numbers[~missing].min() <= 0 <= numbers[~missing].max()  # the start is among the data
    objects = dates.objects(np.where(missing, None, numbers))
    back = frames.make(frame.head(0), {"day": objects})
    assert nw.from_native(back).schema == frame.schema
    assert back.equals(native)


@pytest.mark.parametrize("name", TYPES)
def test_dates_come_back_in_their_type(name):
    series, unit = TYPES[name]
    come_back(pd.DataFrame({"day": series}), unit, name if "%" in name else None)


@pytest.mark.parametrize("name", POLARS)
def test_dates_of_polars_come_back_in_their_type(name):
    values = TYPES[name][0].to_list()
    values = [v.to_pydatetime() if isinstance(v, pd.Timestamp) else v for v in values]
    if TYPES[name][0].dtype == LOCAL(NEW_YORK).dtype:
        values = [value.astimezone(zoneinfo.ZoneInfo(NEW_YORK)) for value in values]
    come_back(optional("polars").DataFrame({"day": values}), POLARS[name])


def test_formats_that_read_the_same_are_one():
    frame = pd.DataFrame({"day": [f"{1 + i} May 2020" for i in range(9)]})
    assert (
        Dates.from_column("day", frames.as_frame("frame", frame), None, False).format == "%d %b %Y"
    )


def test_a_time_that_clocks_skip_becomes_the_next():
    frame = frames.as_frame("frame", pd.DataFrame({"day": TYPES["seconds of New York"][0]}))
    dates = Dates.from_column("day", frame, None, False)
    skipped = dates.numbers(np.array(["2020-03-08T02:30"], "M8[us]"))
    assert dates.objects(skipped)[0].isoformat() == "2020-03-08T03:30:00-04:00"


def test_round_times_are_round_from_midnight():
    days = DAYS + pd.to_timedelta(
        np.where(RNG.random(N) < 0.5, 0, RNG.integers(0, 96, N) * 900), "s"
    )
    some = days.where(RNG.random(N) < 0.9, TIMES)
    frame = frames.as_frame("frame", pd.DataFrame({"day": some, "date": DAYS}))
    dates = Dates.from_column("day", frame, None, False)
    assert numeric("day", "date", *dates.values("frame", frame, "day")[:2], dates=dates).grids == (
        86400.0, 900.0, 1.0,
    )  # fmt: skip
    dates = Dates.from_column("date", frame, None, False)  # a fifth day from the start is not round
    column = numeric("date", "date", *dates.values("frame", frame, "date")[:2], dates=dates)
    assert (column.grids, column.values) == ((1.0,), ())


def test_given_dates_are_a_number_and_angles():
    days = pd.to_datetime(["2020-01-01 06:00", "2020-07-01 18:00", "2021-01-04 00:00", None])
    frame = frames.as_frame("frame", pd.DataFrame({"day": days}))
    dates = Dates.from_column("day", frame, None, True)
    assert dates.turns == ("year", "week", "day")
    values, missing, _ = dates.values("frame", frame, "day")
    column = Column("day", "date", (), (0.0,), True, scale=100.0, dates=dates)
    found = column.features(*column.encode(values, missing))
    assert found.shape == (4, column.width) == (4, 8)
    # Two Wednesdays and a Monday; a week of NumPy starts on Thursday.
    turns = np.array([[0, 6 / 7, 1 / 4], [182 / 365.25, 6 / 7, 3 / 4], [3 / 365.25, 4 / 7, 0]])
    angles = np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], 2)
    expected = np.zeros((4, 8))
    expected[:3, 0] = np.array([-181.75, 0.75, 187]) / 100  # days from July 1
    expected[:3, 1:7] = angles.reshape(3, 6)
    expected[3, 7] = 1
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("days", "turns"),
    [
        (["2020-01-01", "2020-01-02"], ("week",)),
        (["2020-01-01", "2020-02-05"], ("year",)),
        (["2020-01-01", "2020-02-01"], ("year",)),  # counted in months
        (["2020-01-01", "2021-01-06"], ()),
        (["2020-01-01 10:00", "2020-01-01 11:00"], ("day",)),
        (["2020-01-01 10:00", "2020-01-01 10:30"], ()),
    ],
)
def test_angles_are_those_that_the_data_show(days, turns):
    frame = frames.as_frame("frame", pd.DataFrame({"day": pd.to_datetime(days)}))
    assert Dates.from_column("day", frame, None, True).turns == turns


GROUP = np.where(RNG.random(N) < 0.3, "a", "b")
LOCAL_DAYS = HOLES.dt.tz_localize(NEW_YORK)
AMOUNT = np.round(RNG.gamma(3.0, 100.0, N), 2)
TABLES = {
    "local": (pd.DataFrame({"day": LOCAL_DAYS, "group": GROUP}), {}),
    "target": (
        pd.DataFrame({"day": DAYS.dt.strftime("%d/%m/%Y"), "amount": AMOUNT}),
        {
            "given": "amount", "kinds": {"day": "date"},
            "bounds": {"day": ("2020-02-01", datetime.date(2020, 6, 1))},
        },
    ),
    "given": (pd.DataFrame({"day": TIMES, "amount": AMOUNT}), {"given": "day"}),
}  # fmt: skip


@functools.cache
def table(name):
    frame, options = TABLES[name]
    return untrained(frame, **options)


def test_days_sum_to_one():
    days = pd.date_range("2020-02-15", "2020-04-30", tz=NEW_YORK)
    days = [*days, pd.NaT]
    frame = pd.DataFrame({"day": days * 2, "group": np.repeat(["a", "b"], len(days))})
    assert table("local").kinds == {"day": "date", "group": "categorical"}
    p = np.exp(table("local").log_prob(frame, draws=128))
    assert abs(p.sum() - 1) < 0.01  # the noise of the draws
    # The same instants in another zone and unit.
    again = frame.assign(day=frame.day.dt.tz_convert("UTC").astype("datetime64[ns, UTC]"))
    np.testing.assert_array_equal(np.exp(table("local").log_prob(again, draws=128)), p)


def test_samples_and_imputed_dates_are_those_of_training():
    frame, _ = TABLES["local"]
    drawn = table("local").sample(KEY, 300)
    assert drawn.dtypes.equals(frame.dtypes)
    days = drawn.day.dropna()
    assert days.between(frame.day.min(), frame.day.max()).all()
    assert (days.dt.normalize() == days).all()
    assert abs(drawn.day.isna().mean() - 0.1) < 0.07  # four standard errors
    filled = table("local").impute(KEY, frame[:50])
    assert filled.dtypes.equals(frame.dtypes)
    assert filled.day.notna().all()
    known = frame.day[:50].notna()
    assert (filled.day[known] == frame.day[:50][known]).all()


def test_dates_are_predicted():
    frame = TABLES["target"][0][:20]
    low, high = table("target").interval(0.8, frame)
    median = table("target").quantile(0.5, frame)
    assert median.dtype == low.dtype == np.dtype("datetime64[D]")
    assert ((low < median) & (median < high)).all()
    assert (low >= np.datetime64("2020-02-01")).all()
    of_median = frame.assign(day=pd.Series(median).dt.strftime("%d/%m/%Y"))
    of_day_before = frame.assign(
        day=pd.Series(median - np.timedelta64(1, "D")).dt.strftime("%d/%m/%Y")
    )
    assert (table("target").cdf(of_median) > 0.4999).all()
    assert (table("target").cdf(of_day_before) < 0.5001).all()  # the error of a solve
    for method in ("mean", "crps"):
        with pytest.raises(ValueError, match="need a column of numbers; got the dates 'day'"):
            getattr(table("target"), method)(frame)


def test_given_dates_condition():
    frame = TABLES["given"][0]
    assert table("given").kinds == {"amount": "continuous", "day": "date"}
    later = pd.DataFrame({"day": pd.to_datetime(["2021-01-01 00:00", "2020-03-01 12:00"])})
    drawn = table("given").sample(KEY, 2, given=later)
    assert drawn.dtypes.equals(frame.dtypes)
    assert drawn.day.to_list() == later.day.repeat(2).to_list()
    at_midnight = frame[:5].assign(day=frame.day[:5].dt.normalize())
    as_objects = at_midnight.assign(day=at_midnight.day.dt.date.astype(object))
    log_prob = table("given").log_prob(at_midnight)
    np.testing.assert_array_equal(table("given").log_prob(as_objects), log_prob)
    assert (log_prob != table("given").log_prob(frame[:5])).all()


TARGET, LOCAL_FRAME = TABLES["target"][0][:3], TABLES["local"][0][:3]
WRONG = [
    ("local", LOCAL_FRAME.assign(day="2020-03-01"), "must have the type it had in training, dates"),
    ("local", LOCAL_FRAME.assign(day=DAYS[:3]), "must have America/New_York time zone, as in trai"),
    ("local", LOCAL_FRAME.assign(day=pd.Timestamp("2020-03-01 10:00", tz=NEW_YORK)),
     "must hold whole days, as in training; got 2020-03-01 10:00:00-05:00 in row 0. Round it dow"),
    ("target", TARGET.assign(day=DAYS[:3]), "must have the type it had in training, texts of for"),
    ("target", TARGET.assign(day="1.2.2020"), "must hold dates of format '%d/%m/%Y'; got '1.2.20"),
    ("target", TARGET.assign(day="01/01/2021"), "must lie within its bounds, 2020-02-01 to 2020-0"
     "6-01; got 01/01/2021 in row 0."),
    ("target", TARGET.assign(day=None), "had no missing values in training; got a missing one in "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "frame", "words"), WRONG, ids=[row[2][:40] for row in WRONG])
def test_dates_that_are_not_as_in_training(name, frame, words):
    with pytest.raises((TypeError, ValueError)) as error:
        table(name).log_prob(frame)
    assert str(error.value).startswith(f"Table.log_prob(frame=...): column 'day' {words}")


def test_a_date_far_away_is_named():
    frame = pd.DataFrame({"day": [*DAYS, pd.Timestamp("0001-01-01")], "n": 1})
    with pytest.warns(UserWarning, match="far from all others, such as 0001-01-01, beside"):
        untrained(frame)
