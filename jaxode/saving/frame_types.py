"""The types of a frame's columns: what a table knows of the frame that it was trained on."""

from collections.abc import Callable
from typing import Any

from jaxode._checks.caller import arg

BACKENDS = ("pandas", "polars", "pyarrow")
TYPES = ("time_unit", "time_zone", "categories")  # what types of narwhals are made with


def describe(x: Any, of: Callable[[Any], Any]) -> Any:
    """The description of a frame of narwhals, without its rows; `of` describes its categories.
    None for what is no frame."""
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
        types = [_of_pandas(native[name].dtype, of) for name in x.columns]
    else:
        types = [_of_narwhals(x.schema[name]) for name in x.columns]
    return {"frame": backend, "columns": [[n, t] for n, t in zip(x.columns, types, strict=True)]}


def build(backend: Any, columns: list[Any], of: Callable[[Any], Any]) -> Any:
    """The frame of a description, with no rows; `of` builds its categories."""
    import narwhals as nw

    if backend not in BACKENDS:
        raise ValueError(backend)
    if backend == "pandas":
        import pandas

        series = {name: pandas.Series([], dtype=_as_pandas(kind, of)) for name, kind in columns}
        return nw.from_native(pandas.DataFrame(series), eager_only=True)
    schema = {name: _as_narwhals(kind) for name, kind in columns}
    return nw.from_dict({name: [] for name in schema}, schema=schema, backend=backend)


def check_kept(frame: Any, again: Any) -> None:
    """Raise unless the frame that was built from a description has the types of the frame."""
    for name in frame.columns:
        before, after = frame.schema[name], again.schema[name]
        if type(before) is not type(after):
            raise TypeError(
                f"{arg('model')} must be of columns whose types a file can hold; got {before} of "
                f"column {name!r}. Convert the column before training."
            )


def _of_pandas(dtype: Any, of: Callable[[Any], Any]) -> Any:
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return str(dtype)
    kind = _of_pandas(categories.dtype, of)
    return {"categories": of(categories.tolist()), "of": kind, "ordered": bool(dtype.ordered)}


def _as_pandas(kind: Any, of: Callable[[Any], Any]) -> Any:
    import pandas

    if isinstance(kind, str):
        return pandas.api.types.pandas_dtype(kind)
    categories = pandas.Index(of(kind["categories"]), dtype=_as_pandas(kind["of"], of))
    return pandas.CategoricalDtype(categories, kind["ordered"])


def _of_narwhals(dtype: Any) -> Any:
    known = {name: getattr(dtype, name, None) for name in TYPES}
    options = {
        name: [*value] if name == "categories" else value
        for name, value in known.items()
        if value is not None
    }
    return {"type": type(dtype).__name__, **options}


def _as_narwhals(kind: dict[str, Any]) -> Any:
    import narwhals as nw

    options = {name: value for name, value in kind.items() if name in TYPES}
    cls = getattr(nw, kind["type"])
    if not (isinstance(cls, type) and issubclass(cls, nw.dtypes.DType)):
        raise AttributeError(kind["type"])
    return cls(**options)


def describe_scalar(x: Any, of: Callable[[Any], Any]) -> Any:
    """The description of an interval or a time of pandas, which categories may be. None for what
    is neither."""
    if not type(x).__module__.startswith("pandas"):
        return None
    if type(x).__name__ == "Interval":
        return {"pandas": "Interval", "fields": [of(x.left), of(x.right), x.closed]}
    if type(x).__name__ == "Timestamp":
        return {"pandas": "Timestamp", "fields": [x.value, x.unit, x.tz and str(x.tz)]}
    return None


def build_scalar(kind: Any, parts: list[Any], of: Callable[[Any], Any]) -> Any:
    """The inverse of `describe_scalar`."""
    import pandas

    if kind == "Interval":
        left, right, closed = parts
        return pandas.Interval(of(left), of(right), closed)
    if kind != "Timestamp":
        raise ValueError(kind)
    value, unit, zone = parts
    return pandas.Timestamp(value, tz=zone).as_unit(unit)
