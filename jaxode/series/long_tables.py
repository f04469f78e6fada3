"""Series from long tables of pandas, polars and others."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxode._checks.caller import arg, public
from jaxode.series.units import SeriesRule
from jaxode.tabular import frames
from jaxode.tabular.columns.dates import is_date
from jaxode.tabular.columns.formats import cure_of_numbers


@public("series.from_frame")
def from_frame(
    frame: Any, *, row: str, time: str
) -> tuple[Float[np.ndarray, "rows times"], Float[np.ndarray, "rows times channels"]]:
    """Read series from a long table: a line for each time of each series.

    Args:
        frame: of pandas, polars or pyarrow, with lines in any order. Columns other than `row` and
            `time` are channels, and hold numbers. Missing values are gaps.
        row: the column that tells series from one another.
        time: the column of times, which are numbers.

    Returns:
        `ts` `[rows, times]` and `ys` `[rows, times, channels]`: a row for each series, in the order
        of their first lines. Shorter rows repeat their last time, with NaN in `ys`.

    Raises:
        TypeError, ValueError: for a column without numbers, a missing time or series, and a time
            twice in a series.
    """
    frame = frames.as_frame("frame", frame)
    if row == time:
        raise ValueError(
            f"{arg('time')} must be another column than row; got {time!r} for both. Pass as "
            "row= the column that tells series from one another."
        )
    (of_row, no_row), times = _identifiers(frame, row), _numeric_column(frame, time)
    for column, missing in ((row, no_row), (time, np.isnan(times))):
        SeriesRule(
            "frame", f"have a value of {column!r} in each line", missing,
            lambda i: f"none in line {i}", "Leave such lines out.",
        ).check()  # fmt: skip
    channels = [column for column in frame.columns if column not in (row, time)]
    if not channels or not len(times):
        raise ValueError(
            f"{arg('frame')} must have lines, and columns beside {row!r} and {time!r}; got "
            f"{len(times)} lines and the columns {frame.columns}."
        )
    values = np.stack([_numeric_column(frame, column) for column in channels], axis=1)
    names = list(dict.fromkeys(of_row))  # in the order of their first lines
    number = {name: i for i, name in enumerate(names)}
    place = np.array([number[name] for name in of_row])
    order = np.lexsort((times, place))
    place, times, values = place[order], times[order], values[order]
    SeriesRule(
        "frame", "have each time of a series once",
        (np.diff(place) == 0) & (np.diff(times) == 0),
        lambda i: f"{times[i]:g} twice in {row} {names[place[i]]}", "Merge such lines.",
    ).check()  # fmt: skip
    counts = np.bincount(place)
    stops = np.cumsum(counts)  # the line after the last one of each series
    column = np.arange(len(place)) - np.repeat(stops - counts, counts)
    ts = np.tile(times[stops - 1][:, None], (1, counts.max()))
    ys = np.full((*ts.shape, len(channels)), np.nan)
    ts[place, column], ys[place, column] = times, values
    return ts, ys


def _identifiers(frame: Any, column: str) -> tuple[list[Any], np.ndarray]:
    """The name of the series of each line, and where it is missing. Integers of any size keep their
    digits."""
    series = frames.column_of("frame", frame, column)
    if series.dtype.is_integer():
        return series.to_list(), np.array(series.is_null().to_numpy(), bool)
    names, missing, _ = frames.read("frame", frame, column)
    return names.tolist(), missing


def _numeric_column(frame: Any, column: str) -> np.ndarray:
    """A column of numbers, with NaN where a value is missing."""
    start = f"{arg('frame')} column {column!r} must hold numbers"
    if is_date(frames.column_of("frame", frame, column)):
        raise TypeError(
            f"{start}; got dates. Pass the hours or days since a start, such as "
            f"(frame[{column!r}] - frame[{column!r}].min()).dt.total_seconds() / 3600 in pandas."
        )
    values, missing, text = frames.read("frame", frame, column)
    if text:
        raise TypeError(
            f"{start}; got text or booleans. {cure_of_numbers(frame, column)}Encode it as numbers, "
            "or leave it out."
        )
    return np.where(missing, np.nan, values)
