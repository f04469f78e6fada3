"""Frames of pandas, polars and others, in and out, by narwhals."""

import datetime
from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.caller import arg
from jaxode._checks.errors import first_row
from jaxode.tabular.columns.multiples import LARGEST_MULTIPLE

CATEGORICAL_TYPES = ("String", "Categorical", "Enum", "Boolean", "Object")  # of narwhals


class Values(NamedTuple):
    """A column of a frame."""

    values: np.ndarray
    """Floats, or categories as objects."""
    missing: np.ndarray
    text: bool
    """Whether the column holds categories, not numbers."""


def as_frame(name: str, frame: Any) -> Any:
    """Check a frame, and wrap it by narwhals."""
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
    # Pyarrow has `column_names`, and its `columns` are arrays.
    return getattr(frame, "column_names", None) or getattr(frame, "columns", ())


def column_of(name: str, frame: Any, column: str) -> Any:
    """A column of a frame. Raises if there is none of this name."""
    if column not in frame.columns:
        raise ValueError(f"{arg(name)} must have the column {column!r}; got {frame.columns}.")
    return frame[column]


def read(name: str, frame: Any, column: str) -> Values:
    """The values of a column, and which of them are missing."""
    import narwhals as nw

    series, start = column_of(name, frame, column), f"{arg(name)} column {column!r} must hold"
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
            first_row(
                ~missing & (np.abs(values) > LARGEST_MULTIPLE),
                lambda row: (
                    f"{start} integers up to 2**50; got {values[row]:.0f} in row {row}. Leave "
                    "identifiers out; subtract an offset from others."
                ),
            )
        first_row(
            np.isinf(values),
            lambda row: (
                f"{start} finite numbers; got {values[row]} in row {row}. Leave the row out, or "
                "make it missing."
            ),
        )
        return Values(values, missing, False)
    kind = str(series.dtype).split("(")[0]
    if kind not in CATEGORICAL_TYPES:
        raise TypeError(
            f"{start} numbers, strings or booleans; got {series.dtype}. Convert it, or leave it "
            "out."
        )
    values = np.fromiter(series.to_list(), object, len(series))
    missing |= np.array([isinstance(value, float) and value != value for value in values], bool)
    if kind not in ("Categorical", "Enum"):  # whose categories may be of any type
        is_category = [isinstance(value, str | bool | np.bool_) for value in values]
        first_row(
            ~missing & ~np.array(is_category, bool),
            lambda row: (
                f"{start} strings, booleans or numbers alone; got {values[row]!r} in row {row}. "
                "Convert the column: .astype(str), or to a type of numbers or dates."
            ),
            TypeError,
        )
    return Values(values, missing, True)


def make(
    like: Any, data: dict[str, np.ndarray], rows: np.ndarray | None = None, fallback: Any = None
) -> Any:
    """Make a frame of these columns, of the kind of the frame `like`, with the index of its `rows`.

    Columns have the types that they have in `like`, or in `fallback` where `like` has missing
    values alone. Decimals, and integers that would lose fractions, become floats.
    """
    import narwhals as nw

    def typed(name: str) -> Any:
        """The frame that has the type of a column."""
        if fallback is None or name not in fallback.columns:
            return like
        same = fallback.implementation == like.implementation
        return fallback if same and len(like) and like[name].is_null().all() else like

    schema = {name: typed(name).schema[name] for name in data}

    def fraction(v):
        return isinstance(v, float) and v % 1 > 0

    def loses(name):
        return schema[name].is_integer() and any(map(fraction, data[name]))

    floats = [name for name in data if schema[name] == nw.Decimal or loses(name)]
    schema |= dict.fromkeys(floats, nw.Float64())

    def whole(v):
        return round(v) if isinstance(v, float) and v == v else v

    columns = {
        name: [*map(whole, values)] if schema[name].is_integer() else _dated(schema[name], values)
        for name, values in data.items()
    }
    if like.implementation.is_pandas_like():
        native = nw.to_native(like)
        frame = native.__class__(columns, index=None if rows is None else native.index[rows])
        dtypes = {
            name: _holding(nw.to_native(typed(name))[name].dtype, frame[name])
            for name in data
            if name not in floats
        }
        return frame.astype(dtypes | dict.fromkeys(floats, float))
    return nw.from_dict(columns, schema=schema, backend=like.implementation).to_native()


def _dated(dtype: Any, values: Any) -> list[Any]:
    """The values, of which dates have a time if the type has one, and none otherwise."""
    if str(dtype) == "Date":
        return [v.date() if isinstance(v, datetime.datetime) else v for v in values]
    if str(dtype).startswith("Datetime"):
        midnight = datetime.time()
        return [
            datetime.datetime.combine(v, midnight) if type(v) is datetime.date else v
            for v in values
        ]
    return [*values]


def _holding(dtype: Any, column: Any) -> Any:
    """The dtype of pandas. If it is categorical, add the categories of the column."""
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return dtype
    more = [value for value in column.dropna().unique() if value not in categories]
    return type(dtype)([*categories, *more], dtype.ordered) if more else dtype
