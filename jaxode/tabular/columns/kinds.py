"""Find the kind of each column: as the user says, or else as its type and values do."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxode._checks.arguments import check_number, is_number
from jaxode._checks.caller import arg
from jaxode.tabular import frames
from jaxode.tabular.columns.column import Column
from jaxode.tabular.columns.dates import Dates, is_date
from jaxode.tabular.columns.formats import cure_of_dates, cure_of_numbers
from jaxode.tabular.columns.modes_of_column import angular, categorical, numeric, spread
from jaxode.tabular.columns.multiples import LARGEST_MULTIPLE
from jaxode.tabular.columns.periodic import TURN, Circle
from jaxode.tabular.encoding import Encoder

KINDS = ("categorical", "integer", "continuous", "periodic", "date")


class Options(NamedTuple):
    """What the user says of a column."""

    kind: str | None
    """One of `KINDS`, or None."""
    period_or_format: Any
    """The period of a periodic column or the format of dates, or None."""
    bounds: Any
    is_given: bool
    """Whether the density is conditional on the column."""

    @classmethod
    def from_arguments(cls, kind: Any, bounds: Any, is_given: bool) -> "Options":
        """Unpack a kind of `tabular.fit`."""
        kind, period_or_format = kind if isinstance(kind, tuple) else (kind, None)
        return cls(kind, period_or_format, bounds, is_given)


def encoder_of(
    frame: Any,
    given_names: Any,
    kinds: Any,
    bounds: Any,
    other: int | None,
    weights: np.ndarray | None = None,
) -> Encoder:
    """The encoder of a frame, by the arguments of `tabular.fit`."""
    try:
        is_name = isinstance(given_names, str)
        given_names = (given_names,) if is_name else tuple(given_names)
    except TypeError:
        message = f"{arg('given')} must be a list of names of columns; got {given_names!r}."
        raise TypeError(message) from None
    for name, names in (("kinds", kinds), ("bounds", bounds)):
        if not isinstance(names, dict):
            raise TypeError(f"{arg(name)} must be a dict, by names of columns; got {names!r}.")
    for name, names in (("given", given_names), ("kinds", kinds), ("bounds", bounds)):
        if unknown := [column for column in names if column not in frame.columns]:
            raise ValueError(f"{arg(name)} must name columns of {frame.columns}; got {unknown}.")
    if wrong := {name: kind for name, kind in kinds.items() if not _is_kind(kind)}:
        raise ValueError(
            f"{arg('kinds')} must be one of {KINDS}, ('periodic', period) or ('date', format); got "
            f"{wrong}."
        )
    modelled = [name for name in frame.columns if name not in given_names]
    if not modelled:
        raise ValueError(f"{arg('given')} must leave a column to model; got all of them.")

    def columns(names: list[str], is_given: bool) -> tuple[Column, ...]:
        options = {
            name: Options.from_arguments(kinds.get(name), bounds.get(name), is_given)
            for name in names
        }
        return tuple(_column(frame, name, options[name], other, weights) for name in names)

    given = columns([name for name in frame.columns if name in given_names], True)
    return Encoder(frame.head(0), columns(modelled, False), given)


def _is_kind(kind: Any) -> bool:
    if not isinstance(kind, tuple):
        return isinstance(kind, str) and kind in KINDS
    if len(kind) != 2 or kind[0] not in ("periodic", "date"):
        return False
    if kind[0] == "date":
        return isinstance(kind[1], str)
    return is_number(kind[1]) and 0 < float(kind[1]) < math.inf


def _column(
    frame: Any, name: str, options: Options, other: int | None, weights: np.ndarray | None
) -> Column:
    """A column by its values and what the user says of it. Raises where they contradict."""
    dates = _dates(frame, name, options)
    read = frames.read if dates is None else dates.values
    values, missing, text = read("frame", frame, name)
    numbers, has_missing, is_given = values[~missing], bool(missing.any()), options.is_given
    _check_options(frame, name, options, text, numbers)
    if text or options.kind == "categorical":
        cures = (cure_of_dates(frame, name), cure_of_numbers(frame, name)) if text else ("", "")
        return categorical(name, values, missing, other, text, cures, is_given, weights)
    if options.kind == "periodic":
        circle = Circle.from_values(name, numbers, options.period_or_format)
        if not is_given:
            return angular(name, values, missing, circle)
        scale = circle.period / TURN
        return Column(name, "periodic", (), (0.0,), has_missing, scale=scale, circle=circle)
    kind = _number_kind(name, options.kind, numbers, dates)
    if is_given:
        center, scale = float(np.median(numbers)), spread(name, numbers, dates)
        return Column(name, kind, (), (0.0,), has_missing, center=center, scale=scale, dates=dates)
    if dates is None:
        low, high = _bounds(name, options.bounds, numbers)
    else:
        low, high = _bounds(name, dates.bounds(name, options.bounds), numbers, dates.show)
    return numeric(name, kind, values, missing, low, high, dates)


def _check_options(
    frame: Any, name: str, options: Options, text: bool, present: np.ndarray
) -> None:
    """Raise for options that a column with these values cannot have, or if it has no values."""
    if not len(present):
        raise ValueError(
            f"{arg('frame')} column {name!r} must have a value; got none. Leave it out."
        )
    if text and options.kind not in (None, "categorical"):
        raise ValueError(
            f"{arg('kinds')} column {name!r} holds categories; got {options.kind!r}. "
            f"{cure_of_numbers(frame, name)}Convert it to numbers first."
        )
    if options.bounds is None:
        return
    if options.is_given or text or options.kind == "categorical":
        raise ValueError(
            f"{arg('bounds')} must be of columns of numbers that are modelled; got {name!r}."
        )
    if options.kind == "periodic":
        raise ValueError(f"{arg('bounds')} must leave periodic columns out; got {name!r}.")


def _number_kind(name: str, kind: str | None, numbers: np.ndarray, dates: Dates | None) -> str:
    """The kind of a column of numbers on a line."""
    if dates is not None:
        return "date"
    whole = bool((numbers == np.round(numbers)).all() and np.abs(numbers).max() <= LARGEST_MULTIPLE)
    if kind == "integer" and not whole:
        raise ValueError(
            f"{arg('kinds')} column {name!r} must hold whole numbers up to 2**50 to be an integer; "
            "got others."
        )
    return kind or ("integer" if whole else "continuous")


def _dates(frame: Any, name: str, options: Options) -> Dates | None:
    """The unit and the start of a column of dates; None for another column."""
    kind = options.kind
    if kind != "date" and not is_date(frame[name]):
        return None
    if kind not in (None, "date"):
        raise ValueError(
            f"{arg('kinds')} column {name!r} holds dates; got {kind!r}. Leave it out of kinds, or "
            "convert the column."
        )
    return Dates.from_column(name, frame, options.period_or_format, options.is_given)


def _bounds(
    name: str, bounds: Any, values: np.ndarray, show: Callable[[float], str] = "{:g}".format
) -> tuple[float, float]:
    """The bounds of a column, infinite where there are none. Raises if a value is outside."""
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
