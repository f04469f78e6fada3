"""Checks of times: their shapes, their order, and whether the dtype of the state can hold them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxode._checks.arguments import as_array, check_number, check_real_times
from jaxode._checks.caller import arg, caller
from jaxode._checks.rules import TIME, forwards, is_known


def check_times(t0: Any, t1: Any, ts: Any, dtype: jnp.dtype, rows: int | None = None):
    """The start, end and output times in the dtype of the state, and whether any are lost in it.

    With a number of `rows`, each row may have its own times. Lost times of rows, and of traced
    times, do not raise: the start is NaN where the span is lost. See `_lost_times`.
    """
    ragged = [_check_end(name, t, rows) for name, t in (("t0", t0), ("t1", t1))]
    exact_ts = ts
    if ts is not None:
        ts = _check_several("ts", ts, dtype, rows)
        ragged.append(ts.ndim == 2)
    span_lost, ts_lost = _lost_times(t0, t1, exact_ts, dtype)
    start, end = as_array(t0, dtype), as_array(t1, dtype)
    if not is_known(span_lost) or np.ndim(span_lost):
        start = jnp.where(span_lost, jnp.nan, start)
    elif span_lost:
        raise ValueError(
            f"{caller()}(t0=..., t1=...): the span from {float(t0)!r} to {float(t1)!r} is lost in "
            f"the precision of {dtype}, in which the state is solved. Shift the time, or use "
            "float64 for the state."
        )
    if ts is not None and not any(ragged) and is_known((t0, t1, exact_ts)):
        _check_order("ts", float(t0), float(t1), np.asarray(exact_ts, dtype))
        _check_not_lost("ts", ts_lost, exact_ts, dtype)
    return start, end, ts, ts_lost


def check_observed_times(t0: Any, ts: Any, dtype: jnp.dtype) -> None:
    """Raise if times of observations, `[times]` or `[rows, times]`, are lost in the dtype of the
    state."""
    lost = _lost_times(t0, np.asarray(ts)[..., -1], ts, dtype)
    _check_not_lost("ts", any(map(np.any, lost)), ts, dtype)


def check_jump_times(t0: Any, t1: Any, times: Any, dtype: jnp.dtype, rows: int | None = None):
    """The times of jumps in the dtype of the state, with infinity for padding; NaN in rows, and if
    traced, where it loses them."""
    jumps = infinite_padding(jnp, _check_several("jumps", times, dtype, rows))
    is_concrete = is_known((t0, t1, times))
    xp = np if is_concrete else jnp
    exact = (np if is_known(times) else jnp).asarray(times, float)  # JAX may round them first
    exact = infinite_padding(xp, exact)
    # Padding counts as the end time.
    filled = xp.where(xp.isposinf(exact), xp.asarray(t1, float)[..., None], exact)
    _, lost = _lost_times(t0, t1, filled, dtype)
    if is_concrete and (jumps.ndim, np.ndim(t0), np.ndim(t1)) == (1, 0, 0):
        _check_order("jumps", float(t0), float(t1), np.asarray(filled, dtype))
        _check_not_lost("jumps", lost, times, dtype)
    return jnp.where(jnp.asarray(lost)[..., None], jnp.nan, jumps)


def infinite_padding(xp: Any, times: Any) -> Any:
    """The times of jumps, with infinity for NaN, which is padding, too."""
    return xp.where(xp.isnan(times), np.inf, times)


def check_breakpoint_times(points: Any, dtype: jnp.dtype, rows: int | None = None):
    """The breakpoints in the dtype of the state, or None."""
    if points is None or jnp.asarray(points).size == 0:
        return None
    return _check_several("breakpoints", points, dtype, rows)


def _check_several(name: str, times: Any, dtype: jnp.dtype, rows: int | None):
    """The times as an array: a vector, or one for each of the `rows`."""
    check_real_times(name, times)
    times = jnp.asarray(times, dtype)
    ragged = times.ndim == 2 and times.shape[0] == rows
    if not (times.ndim == 1 or ragged) or times.shape[-1] == 0:
        of_rows = "" if rows is None else f", or one of the same length for each of {rows} rows"
        raise ValueError(
            f"{arg(name)} must be a vector of at least one time{of_rows}; got shape {times.shape}."
        )
    return times


def _check_not_lost(name: str, lost: Any, times: Any, dtype: jnp.dtype) -> None:
    """Raise if known times are lost."""
    if lost:
        raise ValueError(
            f"{arg(name)} times are lost in the precision of {dtype}, in which the state is "
            f"solved; got {times}. Shift the time, or use float64 for the state."
        )


def _check_end(name: str, value: Any, rows: int | None) -> bool:
    """Whether each row has its own start or end time. Raises for any other shape but a scalar."""
    shape = np.shape(value) if isinstance(value, jax.Array | np.ndarray | list | tuple) else ()
    if shape == () or (rows is None and len(shape) != 1):
        check_number(name, value, TIME, kind="time")
        return False
    check_real_times(name, value)
    if rows is None:
        raise ValueError(
            f"{arg(name)} must be a scalar time; got shape {shape}. Rows have their own "
            "times with per-sample steps only."
        )
    if shape != (rows,):
        raise ValueError(
            f"{arg(name)} must be a scalar time, or one for each of {rows} rows; got shape {shape}."
        )
    return True


def _stored(t: Any, dtype: jnp.dtype) -> tuple[Any, Any]:
    """A time, and how far rounding to the dtype of the state moves it.

    In float64 by NumPy if the time is known, otherwise in JAX's precision.
    """
    if is_known(t):
        exact = np.asarray(t, float)
        return exact, exact.astype(dtype).astype(float) - exact
    exact = jax.lax.stop_gradient(jnp.asarray(t, float))
    if exact.dtype == dtype:
        return exact, jnp.zeros_like(exact)
    info = jnp.finfo(dtype)
    return exact, jax.lax.reduce_precision(exact, info.nexp, info.nmant) - exact


def _lost_times(t0: Any, t1: Any, ts: Any, dtype: jnp.dtype) -> tuple[Any, Any]:
    """Whether the span, and any of the times `ts`, are lost in the precision of the state.

    A time that is kept may move by a thousandth of the span, far more than rounding moves it in any
    useful span. Times that differ must still differ, unless their distance is negligible in the
    span. The answer is per row if any time is, and known at trace time if all times are.
    """
    if dtype == np.dtype(float):
        return np.False_, np.False_
    eps = float(jnp.finfo(dtype).eps)
    with np.errstate(all="ignore"):
        (start, start_moved), (end, end_moved) = _stored(t0, dtype), _stored(t1, dtype)
        span = abs(end - start)
        span_lost = abs(end_moved - start_moved) > 1e-3 * span
        if ts is None:
            return span_lost, np.False_
        outputs, outputs_moved = _stored(ts, dtype)
        xp = np if is_known((t0, t1, ts)) else jnp
        times = _from_end_to_end(xp, start, outputs, end)
        moved = _from_end_to_end(xp, start_moved, outputs_moved, end_moved)
        gaps, whole = xp.diff(times), abs(times[..., -1:] - times[..., :1])
        merged = (gaps + xp.diff(moved) == 0) & (abs(gaps) > eps * whole)
        far = abs(moved[..., 1:-1] - moved[..., :1]) > 1e-3 * whole
        return span_lost, far.any(axis=-1) | merged.any(axis=-1)


def _from_end_to_end(xp: Any, start: Any, ts: Any, end: Any) -> Any:
    """The start, the times `[..., times]` and the end of each row, `[..., times + 2]`."""
    shape = np.broadcast_shapes(start.shape, ts.shape[:-1], end.shape)
    start, end = (xp.broadcast_to(t, shape)[..., None] for t in (start, end))
    return xp.concatenate([start, xp.broadcast_to(ts, (*shape, ts.shape[-1])), end], axis=-1)


def _check_order(name: str, t0: float, t1: float, ts: np.ndarray) -> None:
    # t0 and t1 are compared in the precision of ts.
    wrong = ~forwards(np.asarray(t0, ts.dtype), np.asarray(t1, ts.dtype), ts)
    if wrong.any():
        first, direction = int(np.argmax(wrong)), "increase" if t1 >= t0 else "decrease"
        # All digits beside an end: a time rounded to another dtype may differ in its last ones.
        digits = map(repr, ts.tolist()) if first in (0, len(ts)) else map(str, ts)
        names = [f"t0={t0!r}", *digits, f"t1={t1!r}"]
        raise ValueError(
            f"{arg(name)} times must {direction} from t0={t0!r} to t1={t1!r}; got "
            f"{names[first]} before {names[first + 1]}. Sort them, or extend the solve."
        )
