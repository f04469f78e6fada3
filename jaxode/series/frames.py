"""Series from long tables of pandas, polars and others."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxode._checks.caller import arg, public
from jaxode.tabular import frames


@public("series.from_frame")
def from_frame(
    frame: Any, *, row: str, time: str
) -> tuple[Float[np.ndarray, "rows times"], Float[np.ndarray, "rows times channels"]]:
    """Read series from a long table: a line for each time of each series.

    Args:
        frame: of pandas, polars or pyarrow. Columns other than `row` and `time` are channels, in
            their order, and hold numbers. Missing values are gaps.
        row: the column that tells series from one another: texts or integers.
        time: the column of times, which are numbers. Lines need not be in order.

    Returns:
        `ts` `[rows, times]` and `ys` `[rows, times, channels]`: a row for each series, in the order
        of their first lines, with NaN for gaps. Shorter rows are padded: they repeat their last
        time, with NaN in `ys`.

    Raises:
        TypeError, ValueError: for a column that is no number, a missing time or series, and a
            series with a time twice.
    """
    frame = frames.as_frame("frame", frame)
    of_row, times = (frames.read("frame", frame, column) for column in (row, time))
    if times.text:
        cure = frames.cure_of_dates(frame, time) or "Convert the column."
        raise TypeError(f"{arg('time', time)} must be a column of numbers; got text. {cure}")
    for column, found in ((row, of_row), (time, times)):
        if found.missing.any():
            raise ValueError(
                f"{arg('frame')} column {column!r} must have a value in each line; got none in "
                f"line {np.argmax(found.missing)}. Leave such lines out."
            )
    channels = [column for column in frame.columns if column not in (row, time)]
    if not channels or not len(of_row.values):
        raise ValueError(
            f"{arg('frame')} must have lines, and columns beside {row!r} and {time!r}; got "
            f"{len(of_row.values)} lines and the columns {frame.columns}."
        )
    values = np.stack([_channel(frame, column) for column in channels], axis=1)
    names, first, code = np.unique(
        of_row.values.astype(str) if of_row.text else of_row.values,
        return_index=True, return_inverse=True,
    )  # fmt: skip
    place = np.argsort(np.argsort(first))[code.ravel()]  # of a series in the order of first lines
    order = np.lexsort((times.values, place))
    place, at, values = place[order], times.values[order], values[order]
    same = (np.diff(place) == 0) & (np.diff(at) == 0)
    if same.any():
        i = int(np.argmax(same))
        raise ValueError(
            f"{arg('frame')} must have each time of a series once; got {at[i]:g} twice in "
            f"{row} {names[np.argsort(first)][place[i]]}. Merge such lines, by their mean for one."
        )
    counts = np.bincount(place)
    column = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    ts = np.repeat(at[np.cumsum(counts) - 1][:, None], counts.max(), axis=1)
    ys = np.full((*ts.shape, len(channels)), np.nan)
    ts[place, column], ys[place, column] = at, values
    return ts, ys


def _channel(frame: Any, column: str) -> np.ndarray:
    """A column of numbers, NaN where they are missing."""
    found = frames.read("frame", frame, column)
    if found.text:
        raise TypeError(
            f"{arg('frame')} column {column!r} must hold numbers, as a channel; got text. Encode "
            "it as numbers, or leave it out."
        )
    return np.where(found.missing, np.nan, found.values)
