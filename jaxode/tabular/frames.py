"""Frames of pandas, polars and others, in and out, by narwhals."""

from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.caller import arg
from jaxode.tabular.grids import LARGEST

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
    if series.dtype == nw.Decimal:
        raise TypeError(f"{start} floats or integers; got {series.dtype}. Convert it to floats.")
    if series.dtype.is_numeric():
        values = np.array(series.cast(nw.Float64).to_numpy(), float)
        if series.dtype == nw.Float32:  # 0.1 is 0.10000000149 otherwise
            values = values.astype(np.float32).astype(str).astype(float)
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
        raise TypeError(
            f"{start} numbers, strings or booleans; got {series.dtype}. Convert it, or leave it "
            "out."
        )
    values = np.fromiter(series.to_list(), object, len(series))
    missing |= np.array([isinstance(value, float) and value != value for value in values], bool)
    for row in np.flatnonzero(~missing):
        if not named and not isinstance(values[row], str | bool | np.bool_):
            raise TypeError(
                f"{start} strings, booleans or numbers alone; got {values[row]!r} in row {row}. "
                "Convert the column: .astype(str), or to a type of numbers."
            )
    return Values(values, missing, True)


def make(
    like: Any, data: dict[str, np.ndarray], rows: np.ndarray | None = None, types: tuple = ()
) -> Any:
    """A frame with these columns, of the kind of the frame `like`, and the index of its `rows`.

    A column has its type in the first of the frames `types`, and then of `like`, that have it.
    """
    import narwhals as nw

    def of(name: str) -> Any:
        for frame in types:
            same = frame.implementation == like.implementation and name in frame.columns
            if same and not (len(frame) and frame[name].is_null().all()):  # of no type
                return frame
        return like

    schema = {name: of(name).schema[name] for name in data}
    whole = lambda v: round(v) if isinstance(v, float) and v == v else v
    columns = {
        name: [*map(whole, values)] if schema[name].is_integer() else [*values]
        for name, values in data.items()
    }
    if like.implementation.is_pandas_like():
        native = nw.to_native(like)
        frame = native.__class__(columns, index=None if rows is None else native.index[rows])
        dtypes = {name: nw.to_native(of(name))[name].dtype for name in data}
        return frame.astype({name: _holding(dtypes[name], columns[name]) for name in data})
    return nw.from_dict(columns, schema=schema, backend=like.implementation).to_native()


def with_fractions(frame: Any, like: Any, names: list[str]) -> list[str]:
    """Which columns hold fractions, and are of integers in the frame `like`."""

    def has_any(name: str) -> bool:
        values, missing, _ = read("given", frame, name)
        return bool((values[~missing] % 1).any())

    return [name for name in names if like.schema[name].is_integer() and has_any(name)]


def _holding(dtype: Any, values: list[Any]) -> Any:
    """The dtype of pandas; one of categories with those of the values, too."""
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return dtype
    more = [value for value in dict.fromkeys(values) if value is not None and value == value]
    more = [value for value in more if value not in categories]
    return type(dtype)([*categories, *more], dtype.ordered) if more else dtype
