"""Each wrong input gets its sentence: function, argument, rule and value."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
from tables import FRAMES, KEY, table
from untrained import untrained, without_training

from jaxode import tabular

pytestmark = pytest.mark.usefixtures("default_settings")
N = 40
RNG = np.random.default_rng(0)
GOOD = pd.DataFrame({"x": RNG.normal(size=N), "k": np.arange(N) % 3, "c": [*"abca"] * 10})
BAD = {
    "infinity": GOOD.assign(x=[*GOOD.x[:-1], np.inf]),
    "dates": GOOD.assign(x=pd.date_range("2020", periods=N)),
    "spans": GOOD.assign(x=pd.timedelta_range("1s", periods=N)),
    "lists": GOOD.assign(x=[[1, 2]] * N),
    "texts and numbers": GOOD.assign(c=["a", 2] * 20),
    "twice": pd.concat([GOOD, GOOD[["x"]]], axis=1),
    "numbers as names": GOOD.rename(columns={"x": 0}),
    "nothing": GOOD.assign(x=np.nan),
    "text dates": GOOD.assign(c=pd.date_range("2020", periods=N).strftime("%d/%m/%Y")),
    "months or days": GOOD.assign(c=[f"{1 + i % 9:02}/{1 + i % 7:02}/2020" for i in range(N)]),
    "fine times": GOOD.assign(x=pd.date_range("1950", "2150", periods=N).astype("datetime64[us]")),
    "numbers as text": GOOD.assign(c=["n/a", "n/a", *[f"{i}.5" for i in range(N - 2)]]),
    "ids": GOOD.assign(c=[f"id{i}" for i in range(N)]),
}
OF_FIT = [
    ({"frame": GOOD.to_numpy()}, "must be a frame of pandas, polars or pyarrow; got ndarray. Pass"),
    ({"frame": {"x": [1, 2]}}, "must be a frame of pandas, polars or pyarrow; got dict. Pass"),
    ({"frame": GOOD[:0]}, "must have at least 10 rows; got 0."),
    ({"frame": GOOD[:1]}, "must have at least 10 rows; got 1."),
    ({"frame": GOOD[[]]}, "must have at least one column; got none."),
    ({"frame": BAD["twice"]}, "must have a name of its own for each column; got ['x'] twice."),
    ({"frame": BAD["numbers as names"]}, "must have column names that are strings; got [0, 'k', "),
    ({"frame": BAD["infinity"]}, "column 'x' must hold finite numbers; got inf in row 39. Leave "),
    ({"frame": BAD["spans"]}, "column 'x' must hold numbers, strings or booleans; got Duration"),
    ({"frame": BAD["fine times"]}, "column 'x' must span at most 2**50 of the units that its times"
     " are rounded to; got microseconds from 1950"),
    ({"frame": BAD["text dates"]}, "column 'c' must ~Read it as dates: kinds={'c': 'date'}."),
    ({"frame": BAD["months or days"]}, "column 'c' must ~ Read it as dates: kinds={'c': ('date', '"
     "%d/%m/%Y')}."),
    ({"kinds": {"c": "date"}, "frame": BAD["months or days"]}, "column 'c' must hold texts of one "
     "format of dates; got ['01/01/2020', ~, which %d/%m/%Y and %m/%d/%Y read. Pass one: kinds={'c'"
     ": ('date', '%d/%m/%Y')}."),
    ({"kinds": {"c": "date"}}, "column 'c' must hold texts of one format of dates; got ['a', "),
    ({"kinds": {"x": "date"}}, "column 'x' must hold dates, or texts of dates, to be a date; "),
    ({"kinds": {"c": ("date", 3)}}, "must be one of ~, ('periodic', period) or ('date', form"),
    ({"kinds": {"x": ("date", "%Y")}, "frame": BAD["dates"]}, "column 'x' holds dates, not text"),
    ({"kinds": {"x": "integer"}, "frame": BAD["dates"]}, "column 'x' holds dates; got 'integer'"),
    ({"bounds": {"x": ("May", None)}, "frame": BAD["dates"]}, "column 'x' must have dates as bounds"
     ", or texts such as '2020-01-31', without a time zone if it has none; got 'May'."),
    ({"bounds": {"x": ("2020-02-01", None)}, "frame": BAD["dates"]}, "must contain the values of 'x"
     "', from 2020-01-01 to 2020-02-09; got (2020-02-01, inf)."),
    ({"frame": BAD["lists"]}, "column 'x' must hold strings, booleans or numbers alone; got [1, 2]"
     " in row 0. Convert the column"),
    ({"frame": BAD["texts and numbers"]}, "column 'c' must hold strings, ~; got 2 in row 1. Conve"),
    ({"frame": BAD["nothing"]}, "column 'x' must have a value; got none. Leave it out."),
    ({"frame": BAD["numbers as text"]}, "column 'c' must repeat its categories; got 39 of them ~. I"
     "f it holds numbers, pass pandas.to_numeric(frame['c'], errors='coerce'). Drop the column"),
    ({"kinds": {"c": "integer"}, "frame": BAD["numbers as text"]}, "column 'c' holds categories; go"
     "t 'integer'. If it holds numbers, pass pandas.to_numeric(frame['c'], errors='coerce')."),
    ({"frame": BAD["ids"]}, "column 'c' must repeat its categories; got 40 of them in 40 rows. Dr"),
    ({"given": "z"}, "must name columns of ['x', 'k', 'c']; got ['z']."),
    ({"given": ["x", "k", "c"]}, "must leave a column to model; got all of them."),
    ({"given": 3}, "must be a list of names of columns; got 3."),
    ({"kinds": {"z": "integer"}}, "must name columns of ['x', 'k', 'c']; got ['z']."),
    ({"kinds": {"x": "real"}}, "must be one of ('categorical', 'integer', 'continuous', 'period"),
    ({"kinds": {"x": ("periodic", 0)}}, "must be one of ~, ('periodic', period) or ('date', for"),
    ({"kinds": {"x": ("periodic", np.nan)}}, "must be one of ~, ('periodic', period) or ('date'"),
    ({"kinds": {"x": ("integer", 7)}}, "must be one of ~, ('periodic', period) or ('date', for"),
    ({"kinds": {"x": "periodic"}, "frame": GOOD.assign(x=np.arange(N) * 10.0)},
     "column 'x' must have a period that is given, since its values, from 0 to 390, fit no "),
    ({"kinds": {"c": ("periodic", 7)}}, "column 'c' holds categories; got 'periodic'. Convert it"),
    ({"bounds": {"k": (0, 7)}, "kinds": {"k": "periodic"}}, "must leave periodic columns out; go"),
    ({"kinds": ["x"]}, "must be a dict, by names of columns; got ['x']."),
    ({"kinds": {"c": "integer"}}, "column 'c' holds categories; got 'integer'. Convert it to numb"),
    ({"kinds": {"x": "integer"}}, "column 'x' must hold whole numbers up to 2**50 to be an integ"),
    ({"bounds": {"z": (0, 1)}}, "must name columns of ['x', 'k', 'c']; got ['z']."),
    ({"bounds": {"k": (0, 1)}}, "must contain the values of 'k', from 0 to 2; got (0, 1)."),
    ({"bounds": {"k": 1}}, "must be pairs (low, high); got 1 for 'k'."),
    ({"bounds": {"k": ("a", 1)}}, "must be a real number; got 'a'."),
    ({"bounds": {"k": (np.nan, 9)}}, "must contain the values of 'k', from 0 to 2; got (nan, 9)."),
    ({"bounds": {"c": (0, 1)}}, "must be of columns of numbers that are modelled; got 'c'."),
    ({"bounds": {"x": (-9, 9)}, "given": "x"}, "must be of columns of numbers that are modelled;"),
    ({"other": 1}, "must be an integer of at least 2; got 1."),
    ({"validation": 1.5}, "must be between 0 and 1; got 1.5"),
    ({"validation": GOOD[["x", "k"]]}, "must have the column 'c'; got ['x', 'k']."),
    ({"validation": GOOD[:0]}, "must have at least one row whose values were in training; got "),
    ({"validation": True}, "must be a frame of pandas, polars or pyarrow; got bool."),
    ({"steps": 0}, "must be a positive integer; got 0."),
    ({"seconds": -1}, "must be a Python number, finite and at least 0; got -1."),
    ({"key": 0}, "must be a key of jax.random; got int."),
    ({"mesh": 2}, "must be a mesh of JAX, or None; got int. Pass jax.sharding.Mesh(jax.dev"),
    ({"progress": 1}, "must be True or False; got 1."),
]  # fmt: skip
MIXED, ATOM = FRAMES["mixed"][:4], FRAMES["atom"][:4]
OF_TABLE = [
    ("mixed", "log_prob", {"frame": [1]}, "must be a frame of pandas, polars or pyarrow; got list"),
    ("mixed", "log_prob", {"frame": MIXED[["age"]]}, "must have the column 'group'; got ['age']."),
    ("mixed", "log_prob", {"frame": MIXED.assign(group=1)}, "column 'group' must have the type it "
     "had in training, categories; got Int64."),
    ("mixed", "log_prob", {"frame": MIXED.assign(age="old")}, "column 'age' must have the type it "
     "had in training, numbers; got String."),
    ("mixed", "log_prob", {"frame": MIXED.assign(group=["a", "b", "new", "a"])}, "column 'group' "
     "must hold categories that were in training; got 'new' in row 2. Train with other="),
    ("mixed", "log_prob", {"frame": MIXED.assign(count=[1, 2, np.nan, 3])}, "column 'count' had no "
     "missing values in training; got a missing one in row 2. Leave it out, or fill it in."),
    ("mixed", "log_prob", {"frame": MIXED.assign(count=[1, 2, 41, 3])}, "column 'count' must lie "
     "within its bounds, 0 to 40; got 41.0 in row 2. Train with wider bounds"),
    ("mixed", "log_prob", {"frame": MIXED.assign(count=[1, 2.5, 4, 3])}, "column 'count' must hold "
     "whole numbers, as in training; got 2.5 in row 1. Train with kinds={'count': 'continuous'}"),
    ("mixed", "log_prob", {"draws": 0, "frame": MIXED}, "must be a positive integer; got 0."),
    ("mixed", "sample", {"key": 1}, "must be a key of jax.random; got int."),
    ("mixed", "sample", {"key": 10, "n": KEY}, "must be a key of jax.random; got int."),
    ("mixed", "sample", {"n": -1, "key": KEY}, "must be an integer of at least 0; got -1."),
    ("mixed", "sample", {"given": MIXED, "key": KEY}, "must be a frame with the given columns [],"),
    ("atom", "sample", {"given": None, "key": KEY}, "must be a frame with the given columns ['group"
     "', 'age'], and is left out where there are none; got NoneType."),
    ("atom", "sample", {"given": ATOM[["age"]], "key": KEY}, "must have the column 'group'; got ["),
    ("mixed", "impute", {"frame": MIXED[["age"]], "key": KEY}, "must have the column 'group'; got"),
    ("one integer", "impute", {"frame": pd.DataFrame({"n": [9], "group": [None]}), "key": KEY},
     "column 'n' must hold numbers that were in training; got 9.0 in row 0. Make it missing"),
    ("mixed", "impute", {"n": 0, "key": KEY, "frame": MIXED}, "must be a positive integer; got 0."),
    *(("mixed", name, {"frame": MIXED}, "predictions need one modelled column, of numbers; got {'gr"
       "oup': 'categorical', 'count': 'integer', 'age': 'continuous'}. Train with given=")
      for name in ("cdf", "mean", "crps")),
    *(("atom", "quantile", {"q": q, "frame": ATOM}, "must be levels between 0 and 1, a number")
      for q in (0, 1.0, [0.2, -0.1], [[0.1]], np.nan)),
    ("atom", "interval", {"level": 1, "frame": ATOM}, "must be between 0 and 1; got 1."),
    ("atom", "interval", {"level": "a", "frame": ATOM}, "must be a Python number, finite and at l"),
    ("atom", "mean", {"frame": ATOM[["age"]]}, "must have the column 'group'; got ['age']."),
    ("atom", "cdf", {"frame": ATOM[["age", "group"]]}, "must have the column 'count'; got ['age',"),
    ("atom", "crps", {"frame": ATOM.assign(count=[1, np.nan, 2, 3])}, "column 'count' must have a v"
     "alue in each row; got a missing one in row 1. Leave the row out."),
]  # fmt: skip


def said(start, words):
    return "^" + re.escape(start + words).replace(r"\~", ".*")


@pytest.mark.parametrize(("given", "words"), OF_FIT, ids=[words[:50] for _, words in OF_FIT])
def test_what_is_wrong_with_a_training(given, words):
    name = next(iter(given))
    options = {"frame": GOOD, "key": KEY, "steps": 1, "members": 1, "progress": False} | given
    with pytest.raises((TypeError, ValueError), match=said(f"tabular.fit({name}=...): ", words)):
        tabular.fit(**options)


@pytest.mark.parametrize(("name", "method", "given", "words"), OF_TABLE)
def test_what_is_wrong_with_a_call(name, method, given, words):
    start = f"Table.{method}({next(iter(given))}=...): "
    with pytest.raises((TypeError, ValueError), match=said(start, words)):
        getattr(table(name), method)(**given)


def test_a_category_is_no_number_to_predict():
    frame = FRAMES["categories"]
    fitted = untrained(frame, given="old")
    with pytest.raises(ValueError, match="predictions need one modelled column, of numbers"):
        fitted.mean(frame)


def test_more_columns_are_left_alone():
    frame = FRAMES["mixed"][:4]
    more = frame.assign(date=pd.Timestamp("2020"))
    log_prob = table("mixed").log_prob(frame)
    np.testing.assert_array_equal(table("mixed").log_prob(more), log_prob)
    filled = table("mixed").impute(KEY, more)
    assert filled.dtypes.equals(more.dtypes)
    assert (filled.date == more.date).all()


def test_a_target_that_is_given_warns():
    frame = GOOD.assign(y=RNG.normal(size=N))
    frame["z"] = 2 * frame.x - frame.y + 1
    with pytest.warns(
        UserWarning, match=r"columns \['z', 'x', 'y'\] depend on each other linearly"
    ):
        untrained(frame, given=["x", "y", "k", "c"])


def test_given_columns_that_depend_on_each_other_do_not_matter():
    frame = pd.DataFrame({"n": np.arange(N) % 2, "x": GOOD.x, "y": 2 * GOOD.x})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untrained(frame, given=["x", "y"])


def test_too_many_categories_warn():
    frame = pd.DataFrame({"c": [f"c{i % 31}" for i in range(300)]})
    words = r"'c' must repeat its categories; got 31 of them in 300 rows. Drop the .* by other=10\."
    with pytest.warns(UserWarning, match=words) as caught, without_training():
        tabular.fit(frame, key=KEY, steps=1, members=1, progress=False)
    assert caught[0].filename == __file__


def test_a_constant_column_has_nothing_to_learn():
    frame = pd.DataFrame({"one": 1, "pi": np.pi, "n": np.arange(N) % 2, "given": 3.5})
    frame["half"] = 0.5
    fitted = untrained(frame, given="given")
    alone = untrained(frame[["n"]])
    assert abs(np.exp(fitted.log_prob(frame[:2])).sum() - 1) < 1e-5
    assert abs(np.exp(alone.log_prob(frame[:2])).sum() - 1) < 1e-5
    constant, points = tabular.fit(frame[["pi"]], key=KEY, steps=1, members=1, progress=False)
    assert points == []
    assert (constant.log_prob(frame) == 0).all()
    assert (constant.sample(KEY, 3).pi == np.pi).all()
    assert (constant.mean(frame) == np.pi).all()
