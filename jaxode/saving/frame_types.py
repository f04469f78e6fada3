"""Describe the types of a frame's columns, which a table keeps of its training frame."""

from collections.abc import Callable
from typing import Any

from jaxode._checks.caller import arg

BACKENDS = ("pandas", "polars", "pyarrow")  # of frames that a file can describe
TYPE_OPTIONS = ("time_unit", "time_zone", "categories")  # arguments of types of narwhals


def describe(x: Any, describe_item: Callable[[Any], Any]) -> Any:
    """Describe a frame of narwhals without its rows; None if `x` is no such frame.

    `describe_item` describes its categories.
    """
    if not type(x).__module__.startswith("narwhals"):
        return None
    backend = x.implementation.value
    if backend not in BACKENDS:
        raise TypeError(
            f"{arg('model')} must be of a frame of {', '.join(BACKENDS)}; got {backend}. Train on "
            "one of those."
        )
    if backend == "pandas":
        native = x.to_native()
        types = [_describe_pandas(native[name].dtype, describe_item) for name in x.columns]
    else:
        types = [_describe_narwhals(x.schema[name]) for name in x.columns]
    return {"frame": backend, "columns": [[n, t] for n, t in zip(x.columns, types, strict=True)]}


def build(backend: Any, columns: list[Any], build_item: Callable[[Any], Any]) -> Any:
    """Build a frame without rows from its description. `build_item` builds its categories."""
    import narwhals as nw

    if backend not in BACKENDS:
        raise ValueError(backend)
    if backend == "pandas":
        import pandas

        series = {
            name: pandas.Series([], dtype=_build_pandas(kind, build_item)) for name, kind in columns
        }
        return nw.from_native(pandas.DataFrame(series), eager_only=True)
    schema = {name: _build_narwhals(kind) for name, kind in columns}
    return nw.from_dict({name: [] for name in schema}, schema=schema, backend=backend)


def check_types(frame: Any, again: Any) -> None:
    """Raise unless a frame that was built again from its description has the same types."""
    for name in frame.columns:
        before, after = frame.schema[name], again.schema[name]
        if type(before) is not type(after):
            raise TypeError(
                f"{arg('model')} must be of columns whose types a file can hold; got {before} of "
                f"column {name!r}. Convert the column before training."
            )


def _describe_pandas(dtype: Any, describe_item: Callable[[Any], Any]) -> Any:
    """Describe a dtype: its name, or what a categorical one is made of."""
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return str(dtype)
    kind, items = _describe_pandas(categories.dtype, describe_item), categories.tolist()
    return {"categories": describe_item(items), "of": kind, "ordered": bool(dtype.ordered)}


def _build_pandas(kind: Any, build_item: Callable[[Any], Any]) -> Any:
    """The inverse of `_describe_pandas`."""
    import pandas

    if isinstance(kind, str):
        return pandas.api.types.pandas_dtype(kind)
    dtype = _build_pandas(kind["of"], build_item)
    categories = pandas.Index(build_item(kind["categories"]), dtype=dtype)
    return pandas.CategoricalDtype(categories, kind["ordered"])


def _describe_narwhals(dtype: Any) -> Any:
    """Describe a type of narwhals: its name, and the options that it has."""
    values = {name: getattr(dtype, name, None) for name in TYPE_OPTIONS}
    options = {
        name: [*value] if name == "categories" else value
        for name, value in values.items()
        if value is not None
    }
    return {"type": type(dtype).__name__, **options}


def _build_narwhals(kind: dict[str, Any]) -> Any:
    """The inverse of `_describe_narwhals`."""
    import narwhals as nw

    options = {name: value for name, value in kind.items() if name in TYPE_OPTIONS}
    cls = getattr(nw, kind["type"])
    if not (isinstance(cls, type) and issubclass(cls, nw.dtypes.DType)):
        raise AttributeError(kind["type"])
    return cls(**options)


def describe_scalar(x: Any, describe_item: Callable[[Any], Any]) -> Any:
    """Describe an interval or a time of pandas, which a category may be; None if `x` is neither."""
    if not type(x).__module__.startswith("pandas"):
        return None
    if type(x).__name__ == "Interval":
        return {"pandas": "Interval", "fields": [*map(describe_item, (x.left, x.right)), x.closed]}
    if type(x).__name__ == "Timestamp":
        return {"pandas": "Timestamp", "fields": [x.value, x.unit, x.tz and str(x.tz)]}
    return None


def build_scalar(kind: Any, fields: list[Any], build_item: Callable[[Any], Any]) -> Any:
    """The inverse of `describe_scalar`."""
    import pandas

    if kind == "Interval":
        left, right, closed = fields
        return pandas.Interval(build_item(left), build_item(right), closed)
    if kind != "Timestamp":
        raise ValueError(kind)
    value, unit, zone = fields
    return pandas.Timestamp(value, tz=zone).as_unit(unit)
