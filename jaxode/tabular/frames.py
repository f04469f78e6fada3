"""Frames of pandas, polars and others, in and out, by narwhals."""

from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.caller import arg

CATEGORIES = ("String", "Categorical", "Enum", "Boolean", "Object")


class Values(NamedTuple):
    """A column of a frame."""

    values: np.ndarray
    missing: np.ndarray
    dtype: str


def as_frame(name: str, frame: Any) -> Any:
    """The frame for narwhals, checked."""
    try:
        import narwhals as nw
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "jaxode.tabular needs narwhals. Install it: pip install 'jaxode[tabular]'."
        ) from None
    columns = [str(column) for column in getattr(frame, "columns", ())]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
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


def read(name: str, frame: Any, column: str) -> Values:
    """The values of a column, which of them are missing, and their type."""
    series = frame[column]
    dtype = str(series.dtype).split("(")[0]
    numeric = series.dtype.is_numeric()
    if not numeric and dtype not in CATEGORIES:
        raise TypeError(
            f"{arg(name)} column {column!r} must hold numbers, strings, categories or booleans; "
            f"got {series.dtype}. Convert it, or leave it out."
        )
    missing = np.array(series.is_null().to_numpy(), bool)
    if numeric:
        values = np.array(series.cast(_float()).to_numpy(), float)
        missing |= np.isnan(values)
        if (infinite := np.isinf(values)).any():
            row = int(np.flatnonzero(infinite)[0])
            raise ValueError(
                f"{arg(name)} column {column!r} must hold finite numbers; got {values[row]} in "
                f"row {row}. Leave the row out, or make it missing."
            )
        return Values(values, missing, "Float" if dtype.startswith(("Float", "Decimal")) else "Int")
    values = np.array(series.to_list(), object)
    if values.ndim > 1:
        values = np.array([None, *map(list, values)], object)[1:]
    for row in np.flatnonzero(~missing):
        if isinstance(values[row], float) and np.isnan(values[row]):
            missing[row] = True
        elif not isinstance(values[row], str | bool | np.bool_):
            raise TypeError(
                f"{arg(name)} column {column!r} must hold strings, categories or booleans; got "
                f"{values[row]!r} in row {row}. Convert the column: "
                ".astype(str), or a number type."
            )
    return Values(values, missing, "Category")


def _float() -> Any:
    import narwhals as nw

    return nw.Float64


def make(like: Any, data: dict[str, np.ndarray]) -> Any:
    """A frame with these columns, of the types of the frame `like`."""
    import narwhals as nw

    if like.implementation.is_pandas_like():
        native = nw.to_native(like)
        frame = native.__class__({name: list(values) for name, values in data.items()})
        return frame.astype({name: native[name].dtype for name in data})
    schema = {name: like.schema[name] for name in data}
    columns = {}
    for name, values in data.items():
        integer = schema[name].is_integer()
        columns[name] = [int(v) if integer and v is not None else v for v in values]
    return nw.from_dict(columns, schema=schema, backend=like.implementation).to_native()
