"""The types of a frame's columns: what a table knows of the frame that it was trained on."""

from typing import Any

TYPES = ("time_unit", "time_zone", "categories")  # what types of narwhals are made with


def describe(x: Any) -> Any:
    """The description of a frame of narwhals, without its rows. None for what is no frame."""
    if not type(x).__module__.startswith("narwhals"):
        return None
    backend = x.implementation.value
    if x.implementation.is_pandas_like():
        native = x.to_native()
        types = [_of_pandas(native[name].dtype) for name in x.columns]
    else:
        types = [_of_narwhals(x.schema[name]) for name in x.columns]
    return {"frame": backend, "columns": [[n, t] for n, t in zip(x.columns, types, strict=True)]}


def build(backend: Any, columns: list[Any]) -> Any:
    """The frame of a description, with no rows."""
    import narwhals as nw

    if backend == "pandas":
        import pandas

        series = {name: pandas.Series([], dtype=_as_pandas(kind)) for name, kind in columns}
        return nw.from_native(pandas.DataFrame(series), eager_only=True)
    schema = {name: _as_narwhals(kind) for name, kind in columns}
    return nw.from_dict({name: [] for name in schema}, schema=schema, backend=backend)


def _of_pandas(dtype: Any) -> Any:
    categories = getattr(dtype, "categories", None)
    if categories is None:
        return str(dtype)
    kind = _of_pandas(categories.dtype)
    return {"categories": categories.tolist(), "of": kind, "ordered": bool(dtype.ordered)}


def _as_pandas(kind: Any) -> Any:
    import pandas

    if isinstance(kind, str):
        return pandas.api.types.pandas_dtype(kind)
    categories = pandas.Index(kind["categories"], dtype=_as_pandas(kind["of"]))
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
