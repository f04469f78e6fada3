"""Frames of pandas, polars and others, in and out, by narwhals."""

import datetime
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.rounding import LARGEST

# Texts such as 2020-01-31, 31.1.20 and 1/31/2020, also with a time after them.
DATE = re.compile(r"\s*(\d{4}|\d\d?)([-/.])(\d\d?)\2(\d{4}|\d\d?)(?!\d)(.*)")
SOME = 100  # texts, which are dates if all of them look like that
TEXT = ("String", "Categorical", "Enum", "Boolean", "Object")


class Values(NamedTuple):
    """A column of a frame."""

    values: np.ndarray
    """Floats, or objects: strings and booleans."""
    missing: np.ndarray
    text: bool
    """Whether it holds categories, not numbers."""


def as_frame(name: str, frame: Any) -> Any:
    """The frame for narwhals, checked."""
    try:
        import narwhals as nw
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "jaxode.tabular needs narwhals. Install it: pip install 'jaxode[tabular]'."
        ) from None
    names = [str(column) for column in _names(frame)]
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise ValueError(
            f"{arg(name)} must have a name of its own for each column; got {twice} twice."
        )
    try:
        frame = nw.from_native(frame, eager_only=True)
    except TypeError:
        raise TypeError(
            f"{arg(name)} must be a frame of pandas, polars or pyarrow; got "
            f"{type(frame).__name__}. Pass pandas.DataFrame(...)."
        ) from None
    if not all(isinstance(column, str) for column in frame.columns):
        raise TypeError(
            f"{arg(name)} must have column names that are strings; got {frame.columns}. Rename "
            "them: frame.columns = [...]."
        )
    return frame


def _names(frame: Any) -> Any:
    return getattr(frame, "column_names", None) or getattr(frame, "columns", ())  # of pyarrow first


def read(name: str, frame: Any, column: str) -> Values:
    """The values of a column, and which of them are missing."""
    import narwhals as nw

    if column not in frame.columns:
        raise ValueError(f"{arg(name)} must have the column {column!r}; got {frame.columns}.")
    series, start = frame[column], f"{arg(name)} column {column!r} must hold"
    missing = np.array(series.is_null().to_numpy(), bool)
    if missing.all():  # whatever its type
        return Values(np.full(len(missing), np.nan), missing, False)
    if series.dtype.is_numeric():
        values = np.array(series.cast(nw.Float64).to_numpy(), float)
        if series.dtype == nw.Float32:  # 0.1 is 0.10000000149 otherwise
            values = values.astype(np.float32).astype(str).astype(float)
        values += 0.0  # makes -0.0 0.0
        missing |= np.isnan(values)
        if series.dtype.is_integer():
            for row in np.flatnonzero(~missing & (np.abs(values) > LARGEST)):
                raise ValueError(
                    f"{start} integers up to 2**50; got {values[row]:.0f} in row {row}. Leave "
                    "identifiers out; subtract an offset from others."
                )
        for row in np.flatnonzero(np.isinf(values)):
            raise ValueError(
                f"{start} finite numbers; got {values[row]} in row {row}. Leave the row out, or "
                "make it missing."
            )
        return Values(values, missing, False)
    kind = str(series.dtype).split("(")[0]
    named = kind in ("Categorical", "Enum")  # whose categories may be of any type
    if kind not in TEXT:
        is_date = kind in ("Datetime", "Date")
        cure = f" {_as_days(frame, column)}" if is_date else " Convert it, or leave it out."
        raise TypeError(f"{start} numbers, strings or booleans; got {series.dtype}.{cure}")
    values = np.fromiter(series.to_list(), object, len(series))
    missing |= np.array([isinstance(value, float) and value != value for value in values], bool)
    for row in np.flatnonzero(~missing):
        if not named and not isinstance(values[row], str | bool | np.bool_):
            cure = "Convert the column: .astype(str), or to a type of numbers."
            if isinstance(values[row], datetime.date):
                cure = _as_days(frame, column)
            raise TypeError(
                f"{start} strings, booleans or numbers alone; got {values[row]!r} in row {row}. "
                f"{cure}"
            )
    return Values(values, missing, True)


def cure_of_dates(frame: Any, column: str) -> str:
    """How to turn texts that are dates into numbers, or nothing if they are none."""
    texts = (v for v in frame[column].drop_nulls().to_list() if not isinstance(v, bool))
    found = [DATE.match(str(text)) for text in itertools.islice(texts, SOME)]
    dates = [date for date in found if date]
    return _as_days(frame, column, dates) if dates and len(dates) == len(found) else ""


def _format(dates: list[re.Match[str]]) -> tuple[str, str]:
    """The format of dates in text, none if years come first, and a warning if it may be another."""
    first, between, _, last, time = dates[0].groups()
    if len(first) == 4:
        return "", ""
    largest = [max(int(date[i]) for date in dates) for i in (1, 3)]
    days_first = largest[0] > 12 or largest[1] <= 12
    parts = [*(("%d", "%m") if days_first else ("%m", "%d")), "%Y" if len(last) == 4 else "%y"]
    clock = ("", " %H:%M", " %H:%M:%S")[min(time.count(":"), 2)]
    unsure = "" if max(largest) > 12 else " If months come first, swap %d and %m."
    return between.join(parts) + clock, unsure


def _as_days(frame: Any, column: str, texts: list[re.Match[str]] | None = None) -> str:
    """The line that makes the dates of a column numbers."""
    dtype = frame[column].dtype
    how, unsure = _format(texts) if texts else ("", "")
    if frame.implementation.is_polars():
        cast = ".cast(str)" if texts and str(dtype) != "String" else ""
        parsed = f".str.to_datetime({repr(how) if how else ''})" if texts else ""
        dates = f"polars.col({column!r}){cast}{parsed}"
        line = f"frame = frame.with_columns(({dates} - polars.date(2020, 1, 1)).dt.total_days())"
    else:
        start = "" if frame.implementation.is_pandas_like() else "frame = frame.to_pandas(); "
        local = ".dt.tz_localize(None)" if getattr(dtype, "time_zone", None) else ""
        of_text = f", format={how!r}" if how else ""
        days = f"pandas.to_datetime(frame[{column!r}]{of_text}){local}"
        line = f"{start}frame[{column!r}] = ({days} - pandas.Timestamp('2020-01-01')).dt.days"
    return f"Make dates numbers: {line}.{unsure}"


def make(
    like: Any, data: dict[str, np.ndarray], rows: np.ndarray | None = None, fallback: Any = None
) -> Any:
    """Make a frame of these columns, of the kind of the frame `like`, with the index of its `rows`.

    Columns have the types of `like`; those that are all missing there, of `fallback`. Decimals, and
    integers that would lose fractions, become floats.
    """
    import narwhals as nw

    def of(name: str) -> Any:
        if fallback is None or name not in fallback.columns:
            return like
        same = fallback.implementation == like.implementation
        return fallback if same and len(like) and like[name].is_null().all() else like

    schema = {name: of(name).schema[name] for name in data}
    fraction = lambda v: isinstance(v, float) and v % 1 > 0
    loses = lambda name: schema[name].is_integer() and any(map(fraction, data[name]))
    floats = [name for name in data if schema[name] == nw.Decimal or loses(name)]
    schema |= dict.fromkeys(floats, nw.Float64())
    whole = lambda v: round(v) if isinstance(v, float) and v == v else v
    columns = {
        name: [*map(whole, values)] if schema[name].is_integer() else [*values]
        for name, values in data.items()
    }
    if like.implementation.is_pandas_like():
        native = nw.to_native(like)
        frame = native.__class__(columns, index=None if rows is None else native.index[rows])
        dtypes = {
            name: _holding(nw.to_native(of(name))[name].dtype, frame[name])
            for name in data
            if name not in floats
        }
        return frame.astype(dtypes | dict.fromkeys(floats, float))
    return nw.from_dict(columns, schema=schema, backend=like.implementation).to_native()


def _holding(dtype: Any, column: Any) -> Any:
    """The dtype of pandas; one of categories with those of the column, too."""
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return dtype
    more = [value for value in column.dropna().unique() if value not in categories]
    return type(dtype)([*categories, *more], dtype.ordered) if more else dtype
