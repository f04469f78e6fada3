"""Series in their own units, checked, and as the network sees them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxode._checks.arguments import numbers
from jaxode._checks.caller import arg
from jaxode.series.network import Seen


def check_series(ts: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Times `[rows, times]` and values `[rows, times, channels]`, as arrays of NumPy."""
    ts, ys = (np.asarray(numbers(name, x), float) for name, x in (("ts", ts), ("ys", ys)))
    if ts.ndim != 2 or ys.ndim != 3 or ys.shape[:2] != ts.shape or not ys.size:
        raise ValueError(
            f"{arg('ys')} must be [rows, times, channels] for ts [rows, times]; got ts of shape "
            f"{ts.shape} and ys of shape {ys.shape}. Add an axis for a single channel: "
            "ys[:, :, None]."
        )
    if (wrong := ~np.isfinite(ts)).any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"{arg('ts')} must be finite; got {ts[row, place]} in row {row}, at place {place}. "
            "Pad a row by repeating its last time, with NaN in ys."
        )
    if (wrong := np.isinf(ys)).any():
        row, place, channel = np.argwhere(wrong)[0]
        raise ValueError(
            f"{arg('ys')} must be finite, or NaN where nothing was observed; got "
            f"{ys[row, place, channel]} in row {row}, channel {channel}. Leave it out as NaN."
        )
    there = ~np.isnan(ys).all(axis=2)
    if (empty := ~there.any(axis=1)).any():
        raise ValueError(
            f"{arg('ys')} must have an observation in each row; got none in row "
            f"{np.argmax(empty)}. Leave such rows out."
        )
    # After its last observation, a row may repeat its time.
    padding = ~np.logical_or.accumulate(there[:, ::-1], axis=1)[:, ::-1]
    step = np.diff(ts, axis=1)
    if (wrong := (step < 0) | ((step == 0) & ~padding[:, 1:])).any():
        row, place = np.argwhere(wrong)[0]
        before, after = ts[row, place], ts[row, place + 1]
        raise ValueError(
            f"{arg('ts')} must increase within a row up to its last observation; got {before:g} "
            f"and then {after:g} in row {row}. Sort the times, and merge what was observed at "
            "the same time."
        )
    return ts, ys


def check_at(at: Any, ts: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times to forecast `[rows, times]`, and the time of the last observation of each row."""
    at = np.asarray(numbers("at", at), float)
    if at.ndim == 1:
        at = np.broadcast_to(at, (len(ts), len(at)))
    if at.ndim != 2 or len(at) != len(ts) or not at.size:
        raise ValueError(
            f"{arg('at')} must be [times], or [rows, times] with {len(ts)} rows as in ts; got "
            f"shape {at.shape}."
        )
    last = np.where(there.any(axis=2), ts, -np.inf).max(axis=1)
    if (wrong := ~(at >= last[:, None])).any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"{arg('at')} must not lie before the last observation of a row; got {at[row, place]:g}"
            f" in row {row}, whose last observation is at {last[row]:g}. Cut the series there, by "
            "NaN in ys, or pass later times."
        )
    if (wrong := ~(np.diff(at, axis=1) > 0)).any():
        row, place = np.argwhere(wrong)[0]
        raise ValueError(
            f"{arg('at')} must increase; got {at[row, place]:g} and then {at[row, place + 1]:g} in "
            f"row {row}. Sort the times."
        )
    return at, last


@dataclass(frozen=True)
class Units:
    """Of times, channels and contexts."""

    time: float
    """The median span of a series."""
    gap: float
    """The median time between two observations, as part of the span."""
    longest: float
    """The longest time between two observations in training, as part of the span."""
    mean: Float[np.ndarray, " channels"]
    sd: Float[np.ndarray, " channels"]
    context: tuple[Float[np.ndarray, " context"], Float[np.ndarray, " context"]] | None
    """Mean and standard deviation."""

    @classmethod
    def of(cls, ts: np.ndarray, ys: np.ndarray, context: np.ndarray | None) -> "Units":
        """Units of training series. Raises for a channel without two different values."""
        there = ~np.isnan(ys)
        for channel in range(ys.shape[2]):
            values = ys[:, :, channel][there[:, :, channel]]
            if not values.size or values.min() == values.max():
                got = f"only {values[0]:g}" if values.size else "none"
                raise ValueError(
                    f"{arg('ys')} must have different values in each channel; got {got} in "
                    f"channel {channel}. Leave the channel out."
                )
        times = [t[seen] for t, seen in zip(ts, there.any(axis=2), strict=True)]
        gaps = np.concatenate([np.diff(t) for t in times])
        if not gaps.size:
            raise ValueError(
                f"{arg('ts')} must have two observed times in some row; got one in each. Model "
                "such rows with jaxode.fit."
            )
        span = float(np.median([t[-1] - t[0] for t in times if len(t) > 1]))
        of_context = None
        if context is not None:
            spread = context.std(axis=0)
            of_context = context.mean(axis=0), np.where(spread > 0, spread, 1.0)
        return cls(
            span, float(np.median(gaps)) / span, float(gaps.max()) / span,
            np.nanmean(ys, axis=(0, 1)), np.nanstd(ys, axis=(0, 1)), of_context,
        )  # fmt: skip

    def seen(self, ts: np.ndarray, ys: np.ndarray) -> Seen:
        """The series as the network sees them. Differences of times are exact to float64."""
        there = ~np.isnan(ys)
        y = (np.where(there, ys, self.mean) - self.mean) / self.sd
        return self.with_times(Seen(ts, as_float(y), there), ts)

    def with_times(self, seen: Seen, ts: np.ndarray) -> Seen:
        """The series at other times."""
        dt = np.diff(ts, axis=1, prepend=ts[:, :1]) / self.time
        return seen._replace(dt=as_float(dt))

    def known(self, context: Any, rows: int) -> np.ndarray | None:
        """The context as the network sees it."""
        given = check_context(context, rows)
        if self.context is None or given is None:
            if self.context is not given:
                must = (
                    "left out, as in training" if self.context is None else "given, as in training"
                )
                raise ValueError(f"{arg('context')} must be {must}.")
            return None
        mean, sd = self.context
        if given.shape[1:] != mean.shape:
            raise ValueError(
                f"{arg('context')} must have {len(mean)} columns, as in training; got shape "
                f"{given.shape}."
            )
        return as_float((given - mean) / sd)


def as_float(x: np.ndarray) -> np.ndarray:
    """An array of JAX's default precision."""
    import jax

    return np.asarray(x, jax.dtypes.canonicalize_dtype(float))


def check_context(context: Any, rows: int) -> np.ndarray | None:
    """What is known of each series, `[rows, numbers]`."""
    if context is None:
        return None
    found = np.asarray(numbers("context", context), float)
    if found.ndim != 2 or len(found) != rows or not found.size or not np.isfinite(found).all():
        raise ValueError(
            f"{arg('context')} must be finite numbers [rows, columns], one row for each of the "
            f"{rows} series; got shape {found.shape}, {np.count_nonzero(~np.isfinite(found))} of "
            "them not finite. Fill gaps, and add a column that marks them."
        )
    return found
