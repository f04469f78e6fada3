"""Series in their own units, checked, and as the network sees them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxode._checks.arguments import numbers
from jaxode._checks.caller import arg
from jaxode.series.series_network import Seen

# Initialize recall from pairs of values of a channel that are this many values apart, with rates of
# its decay per median span, and a ridge penalty in pseudo-values against it.
RECALL_LAGS = 1, 2, 4, 8, 16
LOG_RECALL_RATES = np.linspace(-4.0, 4.0, 17)
RECALL_RIDGE = 1.0
RANGE_MARGIN = 0.5  # of the range of training, on either side, that draws may reach
MAX_GAPS = 10_000  # longest gaps of training, from one time to the next


class Rule(NamedTuple):
    """A rule for an array of series, and what breaks it."""

    argument: str
    is_wrong: np.ndarray
    text: str
    """What the argument must do."""
    got: Callable[..., str]
    """Describes the first place that is wrong, by its indices."""
    cure: str

    def check(self) -> None:
        """Raise if the rule is broken somewhere."""
        if self.is_wrong.any():
            got = self.got(*np.argwhere(self.is_wrong)[0])
            raise ValueError(f"{arg(self.argument)} must {self.text}; got {got}. {self.cure}")


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


def _rules_of_series(ts: np.ndarray, ys: np.ndarray, single: bool) -> Iterator[Rule]:
    """The rules for series. Each relies on those before."""
    yield Rule(
        "ts", ~np.isfinite(ts), "be finite", lambda i, j: f"{ts[i, j]} in row {i}, at place {j}",
        "Pad a row by repeating its last time, with NaN in ys.",
    )  # fmt: skip
    yield Rule(
        "ys", np.isinf(ys), "be finite, or NaN for a gap",
        lambda i, j, c: f"{ys[i, j, c]} in row {i}, channel {c}", "Leave it out as NaN.",
    )  # fmt: skip
    is_observed: Any = ~np.isnan(ys).all(axis=2)
    yield Rule(
        "ys", ~is_observed.any(axis=1), "have an observation in each row",
        lambda i: f"none in row {i}", "Leave such rows out.",
    )  # fmt: skip
    # After its last observation, a row may repeat its time.
    before_last = np.logical_or.accumulate(is_observed[:, ::-1], axis=1)[:, -2::-1]
    step = np.diff(ts, axis=1)
    yield Rule(
        "ts", (step < 0) | ((step == 0) & before_last),
        "increase within a row up to its last observation",
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
    for rule in _rules_of_forecast(at, last):
        rule.check()
    return at


def _rules_of_forecast(at: np.ndarray, last: Float[np.ndarray, " rows"]) -> Iterator[Rule]:
    """The rules for times to forecast. Each relies on those before."""
    yield Rule(
        "at", ~np.isfinite(at), "be finite", lambda i, j: f"{at[i, j]} in row {i}",
        "Pad a row by repeating its last time.",
    )  # fmt: skip
    yield Rule(
        "at", ~(at >= last[:, None]), "not lie before the last observation of a row",
        lambda i, j: f"{at[i, j]:.15g} in row {i}, whose last observation is at {last[i]:.15g}",
        "Cut the series there, by NaN in ys, or pass later times.",
    )  # fmt: skip
    step = np.diff(at, axis=1)
    increases = (step > 0) | ((step == 0) & (at[:, 1:] == at[:, -1:]))
    yield Rule(
        "at", ~increases, "increase",
        lambda i, j: f"{at[i, j]:.15g} and then {at[i, j + 1]:.15g} in row {i}",
        "Sort the times. Pad a row by repeating its last time.",
    )  # fmt: skip


def check_context(context: Any, rows: int) -> np.ndarray | None:
    """Check the context of each series, `[rows, columns]`."""
    if context is None:
        return None
    columns = np.asarray(numbers("context", context), float)
    if (
        columns.ndim != 2
        or len(columns) != rows
        or not columns.size
        or not np.isfinite(columns).all()
    ):
        raise ValueError(
            f"{arg('context')} must be finite numbers [rows, columns], one row for each of the "
            f"{rows} series; got shape {columns.shape}, "
            f"{np.count_nonzero(~np.isfinite(columns))} of them not finite. Fill gaps, and add a "
            "column that marks them."
        )
    return columns


def as_float(x: np.ndarray) -> np.ndarray:
    """An array of JAX's default precision."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(float))


def recalled(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Fit recall: the part of its last value that best forecasts a later value of a channel.

    Returns:
        That part by least squares, and the logarithm of the rate at which it decays, `[channels]`.
    """
    times, channels = np.cumsum(seen.dt, axis=1, dtype=float), seen.y.shape[2]
    part, log_rate = np.zeros((2, channels))
    for c in range(channels):
        is_observed = seen.there[:, :, c]
        row, t, y = np.nonzero(is_observed)[0], times[is_observed], seen.y[:, :, c][is_observed]
        first, second = _pairs_of_values(row)
        wait, y = t[second] - t[first], y.astype(float)
        forecast = np.exp(-np.exp(LOG_RECALL_RATES)[:, None] * wait) * y[first]
        product, square = forecast @ y[second], np.sum(forecast**2, axis=1) + RECALL_RIDGE
        best = np.argmax(np.maximum(product, 0.0) ** 2 / square)
        part[c] = np.clip(product[best] / square[best], 0.0, 1.0)
        log_rate[c] = LOG_RECALL_RATES[best]
    return as_float(part), as_float(log_rate)


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
    """The units of times, channels and contexts."""

    time: float
    """The median span of a series."""
    gap: float
    """The median time between two observations, as part of the span."""
    longest: float
    """The longest time between two observations, as part of the span."""
    mean: Float[np.ndarray, " channels"]
    sd: Float[np.ndarray, " channels"]
    limits: tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]
    """The least and the largest draw, in standard units."""
    context: tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]] | None
    """Mean and standard deviation of each column."""

    @classmethod
    def of(cls, ts: np.ndarray, ys: np.ndarray, context: np.ndarray | None) -> "Units":
        """Units of training series. Raises for a channel without two different values."""
        is_observed: Any = ~np.isnan(ys)
        values = [ys[:, :, c][is_observed[:, :, c]] for c in range(ys.shape[2])]

        def got(c):
            value = f"only {values[c][0] + 0.0:g}" if len(values[c]) else "none"
            return f"{value} in channel {c}"

        is_constant = np.array([not len(v) or v.min() == v.max() for v in values])
        rule = "have different values in each channel"
        Rule("ys", is_constant, rule, got, "Leave the channel out.").check()
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

    def seen(self, ts: np.ndarray, ys: np.ndarray) -> Seen:
        """The series as the network reads them: the times with an observation, then repeats of the
        last one.

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
        return Seen(as_float(dt), as_float(y), is_observed, self.parts("ts", dt))

    def parts(self, name: str, dt: np.ndarray) -> np.ndarray:
        """The number of parts to cut each time into, none longer than training's longest gap."""
        parts = np.maximum(np.ceil(dt / self.longest - 1e-6), 1.0)
        most = MAX_GAPS * self.longest * self.time
        rule = f"go on by at most {most:g} at a time, {MAX_GAPS} times the longest gap of training"
        Rule(
            name, parts > MAX_GAPS, rule,
            lambda i, j: f"{dt[i, j] * self.time:g} in row {i}",
            "Pass times in the unit of training.",
        ).check()  # fmt: skip
        return parts.astype(np.int32)

    def known(self, context: Any, rows: int) -> np.ndarray | None:
        """The context as the network reads it."""
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
