"""Series in their own units, checked, and as the network sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxode._checks.arguments import numbers
from jaxode._checks.caller import arg
from jaxode.series.series_network import Seen

LAGS = 1, 2, 4, 8, 16  # in values of a channel, of the pairs that its recall starts from
LOG_RATES = np.linspace(-4.0, 4.0, 17)  # of its decay, in median spans
RIDGE = 1.0  # values that speak against recall
BEYOND = 0.5  # of the range of training, on either side, that draws may reach
MOST_PARTS = 10_000  # times the longest gap of training, from one time to the next


def check(name: str, wrong: np.ndarray, must: str, got: Callable[..., str], cure: str) -> None:
    """Raise if something is wrong. `got` describes the first place where it is."""
    if wrong.any():
        raise ValueError(f"{arg(name)} must {must}; got {got(*np.argwhere(wrong)[0])}. {cure}")


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
    cure = "Pad a row by repeating its last time, with NaN in ys."
    check(
        "ts",
        ~np.isfinite(ts),
        "be finite",
        lambda i, j: f"{ts[i, j]} in row {i}, at place {j}",
        cure,
    )
    check(
        "ys",
        np.isinf(ys),
        "be finite, or NaN for a gap",
        lambda i, j, c: f"{ys[i, j, c]} in row {i}, channel {c}",
        "Leave it out as NaN.",
    )
    there = ~np.isnan(ys).all(axis=2)
    wrong = ~there.any(axis=1)
    check(
        "ys",
        wrong,
        "have an observation in each row",
        lambda i: f"none in row {i}",
        "Leave such rows out.",
    )
    # After its last observation, a row may repeat its time.
    before_last = np.logical_or.accumulate(there[:, ::-1], axis=1)[:, -2::-1]
    step = np.diff(ts, axis=1)
    must = "increase within a row up to its last observation"
    cure = "Sort the times, and merge what was observed at the same time."
    spacing = np.spacing(np.float32(np.abs(ts).max()))
    if single and spacing > 1e-4 * np.ptp(ts):  # as for seconds since 1970
        cure = (
            f"In float32, times of that size are {spacing:g} apart: subtract the start before, or "
            "pass them in float64."
        )
    check(
        "ts",
        (step < 0) | ((step == 0) & before_last),
        must,
        lambda i, j: f"{ts[i, j]:.15g} and then {ts[i, j + 1]:.15g} in row {i}",
        cure,
    )
    return ts, ys


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
    check(
        "at",
        ~np.isfinite(at),
        "be finite",
        lambda i, j: f"{at[i, j]} in row {i}",
        "Pad a row by repeating its last time.",
    )
    must = "not lie before the last observation of a row"
    cure = "Cut the series there, by NaN in ys, or pass later times."
    check(
        "at",
        ~(at >= last[:, None]),
        must,
        lambda i, j: f"{at[i, j]:.15g} in row {i}, whose last observation is at {last[i]:.15g}",
        cure,
    )
    step = np.diff(at, axis=1)
    wrong = ~((step > 0) | ((step == 0) & (at[:, 1:] == at[:, -1:])))
    cure = "Sort the times. Pad a row by repeating its last time."
    check(
        "at",
        wrong,
        "increase",
        lambda i, j: f"{at[i, j]:.15g} and then {at[i, j + 1]:.15g} in row {i}",
        cure,
    )
    return at


def check_context(context: Any, rows: int) -> np.ndarray | None:
    """What is known of each series, `[rows, columns]`."""
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


def as_float(x: np.ndarray) -> np.ndarray:
    """An array of JAX's default precision."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(float))


def recalled(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """The part of the last value of each channel that best forecasts a later one, by least squares,
    and the logarithm of the rate at which it decays."""
    times, channels = np.cumsum(seen.dt, axis=1, dtype=float), seen.y.shape[2]
    part, chosen = np.zeros((2, channels))
    for c in range(channels):
        there = seen.there[:, :, c]
        row, t, y = np.nonzero(there)[0], times[there], seen.y[:, :, c][there].astype(float)
        pairs = [(row[lag:] == row[:-lag], lag) for lag in LAGS]

        def of(x):
            return [(x[:-lag][same], x[lag:][same]) for same, lag in pairs]  # noqa: B023

        (t0, t1), (y0, y1) = (map(np.concatenate, zip(*of(x), strict=True)) for x in (t, y))
        known = np.exp(-np.exp(LOG_RATES)[:, None] * (t1 - t0)) * y0
        product, square = known @ y1, np.sum(known**2, axis=1) + RIDGE
        best = np.argmax(np.maximum(product, 0.0) ** 2 / square)
        part[c], chosen[c] = np.clip(product[best] / square[best], 0.0, 1.0), LOG_RATES[best]
    return as_float(part), as_float(chosen)


@dataclass(frozen=True)
class Units:
    """Of times, channels and contexts."""

    time: float
    """The median span of a series."""
    gap: float
    """The median time between two observations, as part of the span."""
    longest: float
    """The longest one."""
    mean: Float[np.ndarray, " channels"]
    sd: Float[np.ndarray, " channels"]
    limits: tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]
    """The least and the largest draw, in standard units."""
    context: tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]] | None
    """Mean and standard deviation."""

    @classmethod
    def of(cls, ts: np.ndarray, ys: np.ndarray, context: np.ndarray | None) -> "Units":
        """Units of training series. Raises for a channel without two different values."""
        there: Any = ~np.isnan(ys)
        values = [ys[:, :, c][there[:, :, c]] for c in range(ys.shape[2])]

        def told(v):
            return f"only {v[0] + 0.0:g}" if len(v) else "none"

        def got(c):
            return f"{told(values[c])} in channel {c}"

        wrong = np.array([not len(v) or v.min() == v.max() for v in values])
        check("ys", wrong, "have different values in each channel", got, "Leave the channel out.")
        times = [t[seen] for t, seen in zip(ts, there.any(axis=2), strict=True)]
        gaps = np.concatenate([np.diff(t) for t in times])
        if not gaps.size:
            raise ValueError(
                f"{arg('ts')} must have two observed times in some row; got one in each. Model "
                "such rows with jaxode.fit."
            )
        span = float(np.median([t[-1] - t[0] for t in times if len(t) > 1]))
        known = None
        if context is not None:
            spread = context.std(axis=0)
            known = context.mean(axis=0), np.where(spread > 0, spread, 1.0)
        gap, longest = float(np.median(gaps)) / span, float(gaps.max()) / span
        axes = (0, 1)
        mean, sd = np.nanmean(ys, axes), np.nanstd(ys, axes)
        low, high = ((end(ys, axes) - mean) / sd for end in (np.nanmin, np.nanmax))
        more = BEYOND * (high - low)
        limits = as_float(low - more), as_float(high + more)
        return cls(span, gap, longest, mean, sd, limits, known)

    def seen(self, ts: np.ndarray, ys: np.ndarray) -> Seen:
        """The series as the network sees them: the times at which something was observed, and then
        rest at the last of them.

        Differences of times are exact to float64.
        """
        blank = np.isnan(ys).all(axis=2)
        ts = np.where(blank, last_observed(ts, ys)[:, None], ts)
        order = np.argsort(blank, axis=1, kind="stable")
        ts = np.take_along_axis(ts, order, axis=1)
        ys = np.take_along_axis(ys, order[:, :, None], axis=1)
        there = ~np.isnan(ys)
        dt = np.diff(ts, axis=1, prepend=ts[:, :1]) / self.time
        y = (np.where(there, ys, self.mean) - self.mean) / self.sd
        return Seen(as_float(dt), as_float(y), there, self.parts("ts", dt))

    def parts(self, name: str, dt: np.ndarray) -> np.ndarray:
        """In how many parts to go so far, none longer than the longest gap of training."""
        parts = np.maximum(np.ceil(dt / self.longest - 1e-6), 1.0)
        most = MOST_PARTS * self.longest * self.time

        def got(i, j):
            return f"{dt[i, j] * self.time:g} in row {i}"

        must = (
            f"go on by at most {most:g} at a time, {MOST_PARTS} times the longest gap of training"
        )
        cure = "Pass times in the unit of training."
        check(name, parts > MOST_PARTS, must, got, cure)
        return parts.astype(np.int32)

    def known(self, context: Any, rows: int) -> np.ndarray | None:
        """The context as the network sees it."""
        given = check_context(context, rows)
        columns = 0 if self.context is None else len(self.context[0])
        if columns != (0 if given is None else given.shape[1]):
            must = f"be given, with {columns} columns" if columns else "be left out"
            got = "none" if given is None else f"shape {given.shape}"
            raise ValueError(f"{arg('context')} must {must}, as in training; got {got}.")
        if given is None or self.context is None:
            return None
        mean, sd = self.context
        return as_float((given - mean) / sd)
