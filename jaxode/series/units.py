"""Check series, and standardize them for the network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxode._checks.arguments import numbers
from jaxode._checks.caller import arg
from jaxode.series.series_network import Readings

RECALL_LAGS = (1, 2, 4, 8, 16)  # fit recall to pairs of values this many values apart
LOG_RECALL_RATES = np.linspace(-4.0, 4.0, 17)  # candidates for its decay, per median span
RECALL_RIDGE = 1.0  # penalty on recall, in pseudo-values
RANGE_MARGIN = 0.5  # how far draws may lie beyond the range of training, in such ranges
MAX_GAPS = 10_000  # how far one time may lie beyond the one before, in longest gaps of training


class SeriesRule(NamedTuple):
    """A rule that the values of an argument must keep."""

    argument: str
    must: str
    """What the argument must do, for the message."""
    is_broken: np.ndarray
    """Where it does not, as a mask over its values."""
    got: Callable[..., str]
    """Describes a place that breaks the rule, by its indices."""
    cure: str

    def check(self) -> None:
        """Raise for the first place that breaks the rule, if there is one."""
        if self.is_broken.any():
            got = self.got(*np.argwhere(self.is_broken)[0])
            raise ValueError(f"{arg(self.argument)} must {self.must}; got {got}. {self.cure}")


def _times(name: str, times: Any) -> np.ndarray:
    if getattr(times, "dtype", np.dtype(float)).kind in "mM":
        raise TypeError(
            f"{arg(name)} must be numbers; got dates. Pass hours or days since a start, such as "
            f"({name} - start) / np.timedelta64(1, 'h')."
        )
    return np.asarray(numbers(name, times), float)


def _cure_of_shapes(ts: tuple[int, ...], ys: tuple[int, ...]) -> str:
    """What to pass, if both are arrays of at least one time."""
    if len(ts) == 1 and ys[1:2] == ts:  # of all rows
        cure = "For times that all rows share, pass np.broadcast_to(ts, ys.shape[:2])"
        return f"{cure}{' and ys[:, :, None]' if len(ys) == 2 else ''}."
    if len(ys) == 2 and ys == ts:
        return "For a single channel, pass ys[:, :, None]."
    return "Pass a time for each row and time of ys."


def check_series(ts: Any, ys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Times `[rows, times]` and values `[rows, times, channels]`, as arrays of NumPy."""
    single = getattr(ts, "dtype", None) == np.float32
    ts, ys = _times("ts", ts), np.asarray(numbers("ys", ys), float)
    if ts.ndim != 2 or ys.ndim != 3 or ys.shape[:2] != ts.shape or not ys.size:
        raise ValueError(
            f"{arg('ys')} must be [rows, times, channels] for ts [rows, times]; got ts of shape "
            f"{ts.shape} and ys of shape {ys.shape}. {_cure_of_shapes(ts.shape, ys.shape)}"
        )
    for rule in _rules_of_series(ts, ys, single):
        rule.check()
    return ts, ys


def _rules_of_series(ts: np.ndarray, ys: np.ndarray, single: bool) -> Iterator[SeriesRule]:
    """The rules of times and values. Each may rely on those before it."""
    yield SeriesRule(
        "ts", "be finite", ~np.isfinite(ts),
        lambda i, j: f"{ts[i, j]} in row {i}, at place {j}",
        "Pad a row by repeating its last time, with NaN in ys.",
    )  # fmt: skip
    yield SeriesRule(
        "ys", "be finite, or NaN for a gap", np.isinf(ys),
        lambda i, j, c: f"{ys[i, j, c]} in row {i}, channel {c}", "Leave it out as NaN.",
    )  # fmt: skip
    is_observed: Any = ~np.isnan(ys).all(axis=2)
    yield SeriesRule(
        "ys", "have an observation in each row", ~is_observed.any(axis=1),
        lambda i: f"none in row {i}", "Leave such rows out.",
    )  # fmt: skip
    # After its last observation, a row may repeat its time.
    before_last = np.logical_or.accumulate(is_observed[:, ::-1], axis=1)[:, -2::-1]
    step = np.diff(ts, axis=1)
    yield SeriesRule(
        "ts", "increase within a row up to its last observation",
        (step < 0) | ((step == 0) & before_last),
        lambda i, j: f"{ts[i, j]:.15g} and then {ts[i, j + 1]:.15g} in row {i}",
        _cure_of_order(ts, single),
    )  # fmt: skip


def _cure_of_order(ts: np.ndarray, single: bool) -> str:
    """What to do about times that do not increase. Single precision may have merged them."""
    spacing = np.spacing(np.float32(np.abs(ts).max()))
    if single and spacing > 1e-4 * np.ptp(ts):  # as for seconds since 1970
        return (
            f"In float32, times of that size are {spacing:g} apart: subtract the start before, or "
            "pass them in float64."
        )
    return "Sort the times, and merge what was observed at the same time."


def last_observed(ts: np.ndarray, ys: np.ndarray) -> Float[np.ndarray, " rows"]:
    """The time of the last observation of each row."""
    return np.where(np.isnan(ys).all(axis=2), -np.inf, ts).max(axis=1)


def check_at(at: Any, last: Float[np.ndarray, " rows"]) -> Float[np.ndarray, "rows times"]:
    """Times to forecast `[rows, times]`, none before the last observation of its row."""
    at, rows = _times("at", at), len(last)
    at = np.tile(at, (rows, 1)) if at.ndim == 1 else at
    if at.ndim != 2 or len(at) != rows or not at.size:
        raise ValueError(
            f"{arg('at')} must be [times], or [rows, times] with {rows} rows as in ts; got "
            f"shape {at.shape}."
        )
    for rule in _rules_of_forecasts(at, last):
        rule.check()
    return at


def _rules_of_forecasts(at: np.ndarray, last: np.ndarray) -> Iterator[SeriesRule]:
    """The rules of times to forecast. Each may rely on those before it."""
    yield SeriesRule(
        "at", "be finite", ~np.isfinite(at),
        lambda i, j: f"{at[i, j]} in row {i}", "Pad a row by repeating its last time.",
    )  # fmt: skip
    yield SeriesRule(
        "at", "not lie before the last observation of a row", ~(at >= last[:, None]),
        lambda i, j: f"{at[i, j]:.15g} in row {i}, whose last observation is at {last[i]:.15g}",
        "Cut the series there, by NaN in ys, or pass later times.",
    )  # fmt: skip
    step = np.diff(at, axis=1)
    is_padding = (step == 0) & (at[:, 1:] == at[:, -1:])
    yield SeriesRule(
        "at", "increase", ~((step > 0) | is_padding),
        lambda i, j: f"{at[i, j]:.15g} and then {at[i, j + 1]:.15g} in row {i}",
        "Sort the times. Pad a row by repeating its last time.",
    )  # fmt: skip


def check_context(context: Any, rows: int) -> np.ndarray | None:
    """Check the context of each series, `[rows, columns]`."""
    if context is None:
        return None
    columns = np.asarray(numbers("context", context), float)
    not_finite = np.count_nonzero(~np.isfinite(columns))
    if columns.ndim != 2 or len(columns) != rows or not columns.size or not_finite:
        raise ValueError(
            f"{arg('context')} must be finite numbers [rows, columns], one row for each of the "
            f"{rows} series; got shape {columns.shape}, {not_finite} of them not finite. Fill "
            "gaps, and add a column that marks them."
        )
    return columns


def as_float(x: np.ndarray) -> np.ndarray:
    """An array of JAX's default precision."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(float))


def recalled(readings: Readings) -> tuple[np.ndarray, np.ndarray]:
    """Fit by least squares how much of a value forecasts a later one of its channel.

    Returns:
        That share, and the logarithm of the rate at which it decays, `[channels]`.
    """
    times, channels = np.cumsum(readings.dt, axis=1, dtype=float), readings.y.shape[2]
    share, log_rate = np.zeros((2, channels))
    for c in range(channels):
        is_observed = readings.is_observed[:, :, c]
        row, t, y = np.nonzero(is_observed)[0], times[is_observed], readings.y[:, :, c][is_observed]
        first, second = _pairs_of_values(row)
        wait, y = t[second] - t[first], y.astype(float)
        forecast = np.exp(-np.exp(LOG_RECALL_RATES)[:, None] * wait) * y[first]
        product, square = forecast @ y[second], np.sum(forecast**2, axis=1) + RECALL_RIDGE
        best = np.argmax(np.maximum(product, 0.0) ** 2 / square)
        share[c] = np.clip(product[best] / square[best], 0.0, 1.0)
        log_rate[c] = LOG_RECALL_RATES[best]
    return as_float(share), as_float(log_rate)


def _pairs_of_values(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of earlier and later values of the same row, one of the lags apart."""
    place, first, second = np.arange(len(row)), [], []
    for lag in RECALL_LAGS:
        same = row[lag:] == row[:-lag]
        first.append(place[:-lag][same])
        second.append(place[lag:][same])
    return np.concatenate(first), np.concatenate(second)


@dataclass(frozen=True)
class Units:
    """The units in which the network reads times, channels and contexts."""

    time: float
    """The median span of a series."""
    gap: float
    """The median time between two observations, in spans."""
    longest: float
    """The longest time between two observations, in spans."""
    mean: Float[np.ndarray, " channels"]
    sd: Float[np.ndarray, " channels"]
    limits: tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]
    """The least and the largest draw, in standard units."""
    context: tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]] | None
    """Mean and standard deviation of each column."""

    @classmethod
    def from_series(cls, ts: np.ndarray, ys: np.ndarray, context: np.ndarray | None) -> "Units":
        """Units of training series. Raises for a channel without two different values."""
        is_observed: Any = ~np.isnan(ys)
        values = [ys[:, :, c][is_observed[:, :, c]] for c in range(ys.shape[2])]

        def got(c):
            value = f"only {values[c][0] + 0.0:g}" if len(values[c]) else "none"
            return f"{value} in channel {c}"

        is_constant = np.array([not len(v) or v.min() == v.max() for v in values])
        must = "have different values in each channel"
        SeriesRule("ys", must, is_constant, got, "Leave the channel out.").check()
        times = [t[mask] for t, mask in zip(ts, is_observed.any(axis=2), strict=True)]
        gaps = np.concatenate([np.diff(t) for t in times])
        if not gaps.size:
            raise ValueError(
                f"{arg('ts')} must have two observed times in some row; got one in each. Model "
                "such rows with jaxode.fit."
            )
        span = float(np.median([t[-1] - t[0] for t in times if len(t) > 1]))
        context_units = None
        if context is not None:
            spread = context.std(axis=0)
            context_units = context.mean(axis=0), np.where(spread > 0, spread, 1.0)
        gap, longest = float(np.median(gaps)) / span, float(gaps.max()) / span
        axes = (0, 1)
        mean, sd = np.nanmean(ys, axes), np.nanstd(ys, axes)
        low, high = ((extreme(ys, axes) - mean) / sd for extreme in (np.nanmin, np.nanmax))
        margin = RANGE_MARGIN * (high - low)
        limits = as_float(low - margin), as_float(high + margin)
        return cls(span, gap, longest, mean, sd, limits, context_units)

    def readings(self, ts: np.ndarray, ys: np.ndarray) -> Readings:
        """The series as the network reads them: the times with an observation, padded with repeats
        of the last one.

        Differences of times are exact to float64.
        """
        blank = np.isnan(ys).all(axis=2)
        ts = np.where(blank, last_observed(ts, ys)[:, None], ts)
        order = np.argsort(blank, axis=1, kind="stable")
        ts = np.take_along_axis(ts, order, axis=1)
        ys = np.take_along_axis(ys, order[:, :, None], axis=1)
        is_observed = ~np.isnan(ys)
        dt = np.diff(ts, axis=1, prepend=ts[:, :1]) / self.time
        y = (np.where(is_observed, ys, self.mean) - self.mean) / self.sd
        return Readings(as_float(dt), as_float(y), is_observed, self.solves("ts", dt))

    def solves(self, name: str, dt: np.ndarray) -> np.ndarray:
        """The number of equal solves that lead to each time, none longer than the longest gap of
        training. Raises for the argument `name` if they are too many."""
        solves = np.maximum(np.ceil(dt / self.longest - 1e-6), 1.0)
        most = MAX_GAPS * self.longest * self.time
        SeriesRule(
            name,
            f"go on by at most {most:g} at a time, {MAX_GAPS} times the longest gap of training",
            solves > MAX_GAPS, lambda i, j: f"{dt[i, j] * self.time:g} in row {i}",
            "Pass times in the unit of training.",
        ).check()  # fmt: skip
        return solves.astype(np.int32)

    def standardized(self, context: Any, rows: int) -> np.ndarray | None:
        """The context of rows as the network reads it."""
        checked = check_context(context, rows)
        columns = 0 if self.context is None else len(self.context[0])
        if columns != (0 if checked is None else checked.shape[1]):
            must = f"be given, with {columns} columns" if columns else "be left out"
            got = "none" if checked is None else f"shape {checked.shape}"
            raise ValueError(f"{arg('context')} must {must}, as in training; got {got}.")
        if checked is None or self.context is None:
            return None
        mean, sd = self.context
        return as_float((checked - mean) / sd)
