"""The kind of each column: as asked for, or as its type and values say."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxode._checks.arguments import check_number, is_number
from jaxode._checks.caller import arg
from jaxode.tabular import frames
from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.dates import Dates, is_date
from jaxode.tabular.columns.formats import cure_of_dates, cure_of_numbers
from jaxode.tabular.columns.modes_of_column import angular, numeric, spread
from jaxode.tabular.columns.modes_of_column import categorical as categorical_column
from jaxode.tabular.columns.multiples import LARGEST_MULTIPLE
from jaxode.tabular.columns.periodic import TURN, Circle
from jaxode.tabular.encoding import Encoder

KINDS = ("categorical", "integer", "continuous", "periodic", "date")


def encoder_of(
    frame: Any,
    given: Any,
    kinds: Any,
    bounds: Any,
    other: int | None,
    weights: np.ndarray | None = None,
) -> Encoder:
    """How the rows of a frame become arrays, as the arguments of `tabular.fit` say."""
    try:
        given = (given,) if isinstance(given, str) else tuple(given)
    except TypeError:
        message = f"{arg('given')} must be a list of names of columns; got {given!r}."
        raise TypeError(message) from None
    for name, names in (("kinds", kinds), ("bounds", bounds)):
        if not isinstance(names, dict):
            raise TypeError(f"{arg(name)} must be a dict, by names of columns; got {names!r}.")
    for name, names in (("given", given), ("kinds", kinds), ("bounds", bounds)):
        if unknown := [column for column in names if column not in frame.columns]:
            raise ValueError(f"{arg(name)} must name columns of {frame.columns}; got {unknown}.")
    if wrong := {name: kind for name, kind in kinds.items() if not _is_kind(kind)}:
        raise ValueError(
            f"{arg('kinds')} must be one of {KINDS}, ('periodic', period) or ('date', format); got "
            f"{wrong}."
        )
    modelled = [name for name in frame.columns if name not in given]
    if not modelled:
        raise ValueError(f"{arg('given')} must leave a column to model; got all of them.")

    def columns(names: list[str], is_given: bool) -> tuple[Column, ...]:
        return tuple(
            _column(frame, name, kinds.get(name), bounds.get(name), other, is_given, weights)
            for name in names
        )

    features = columns([name for name in frame.columns if name in given], True)
    return Encoder(frame.head(0), columns(modelled, False), features)


def _is_kind(kind: Any) -> bool:
    if not isinstance(kind, tuple):
        return isinstance(kind, str) and kind in KINDS
    if len(kind) != 2 or kind[0] not in ("periodic", "date"):
        return False
    if kind[0] == "date":
        return isinstance(kind[1], str)
    return is_number(kind[1]) and 0 < float(kind[1]) < math.inf


def _column(
    frame: Any,
    name: str,
    kind: Any,
    bounds: Any,
    other: int | None,
    is_given: bool,
    weights: np.ndarray | None,
) -> Column:
    """The column, as its kind, bounds and values say. Raises where they contradict each other."""
    kind, option = kind if isinstance(kind, tuple) else (kind, None)  # a period, or a format
    dates = _dates(frame, name, kind, option, is_given)
    read = frames.read if dates is None else dates.values
    values, missing, text = read("frame", frame, name)
    numbers = values[~missing]
    if not len(numbers):
        raise ValueError(
            f"{arg('frame')} column {name!r} must have a value; got none. Leave it out."
        )
    if text and kind not in (None, "categorical"):
        raise ValueError(
            f"{arg('kinds')} column {name!r} holds categories; got {kind!r}. "
            f"{cure_of_numbers(frame, name)}Convert it to numbers first."
        )
    kind = kind or ("categorical" if text else None)
    if bounds is not None and (is_given or kind == "categorical"):
        raise ValueError(
            f"{arg('bounds')} must be of columns of numbers that are modelled; got {name!r}."
        )
    if kind == "categorical":
        cures = (cure_of_dates(frame, name), cure_of_numbers(frame, name)) if text else ("", "")
        return categorical_column(name, values, missing, other, text, cures, is_given, weights)
    if kind == "periodic":
        if bounds is not None:
            raise ValueError(f"{arg('bounds')} must leave periodic columns out; got {name!r}.")
        circle = Circle.of(name, numbers, option)
        if not is_given:
            return angular(name, values, missing, circle)
        scale = circle.period / TURN
        return Column(name, kind, (), (0.0,), bool(missing.any()), scale=scale, circle=circle)
    kind = _number_kind(name, kind, numbers, dates)
    if is_given:
        return Column(
            name, kind, (), (0.0,), bool(missing.any()), center=float(np.median(numbers)),
            scale=spread(name, numbers, dates), dates=dates,
        )  # fmt: skip
    if dates is None:
        low, high = _bounds(name, bounds, numbers)
    else:
        low, high = _bounds(name, dates.bounds(name, bounds), numbers, dates.show)
    return numeric(name, kind, values, missing, low, high, dates)


def _number_kind(name: str, kind: str | None, numbers: np.ndarray, dates: Dates | None) -> str:
    if dates is not None:
        return "date"
    whole = bool((numbers == np.round(numbers)).all() and np.abs(numbers).max() <= LARGEST_MULTIPLE)
    if kind == "integer" and not whole:
        raise ValueError(
            f"{arg('kinds')} column {name!r} must hold whole numbers up to 2**50 to be an integer; "
            "got others."
        )
    return kind or ("integer" if whole else "continuous")


def _dates(frame: Any, name: str, kind: str | None, format: Any, is_given: bool) -> Dates | None:
    """How the dates of a column are numbers, if it holds dates."""
    if kind != "date" and not is_date(frame[name]):
        return None
    if kind not in (None, "date"):
        raise ValueError(
            f"{arg('kinds')} column {name!r} holds dates; got {kind!r}. Leave it out of kinds, or "
            "convert the column."
        )
    return Dates.of(name, frame, format, is_given)


def _bounds(
    name: str, bounds: Any, values: np.ndarray, show: Callable[[float], str] = "{:g}".format
) -> tuple[float, float]:
    if bounds is None:
        return -np.inf, np.inf
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"{arg('bounds')} must be pairs (low, high); got {bounds!r} for {name!r}.")
    pairs = zip(bounds, (-np.inf, np.inf), strict=True)
    low, high = (default if bound is None else bound for bound, default in pairs)
    check_number("bounds", low)
    check_number("bounds", high)
    least, most = values.min(), values.max()
    if not (low <= least and most <= high and low < high):
        raise ValueError(
            f"{arg('bounds')} must contain the values of {name!r}, from {show(least)} to "
            f"{show(most)}; got ({show(low)}, {show(high)})."
        )
    return low, high
