"""Forecast irregular series with gaps, with bands: yours, or made-up predators and prey.

    python examples/series.py
    python examples/series.py --data readings.csv --row patient --time hour

A file has a line for each time of each series, with a column for each channel. Missing values are
gaps. Without a file, predators and prey (Lotka-Volterra) are counted at random times, often only
one of the two. A tenth of the series is held out. Prints how far the forecasts of their second
halves are from what was seen, beside the last value of each channel, and how many values the
bands of 90% hold. About a minute on two cores.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import tables
from common.arguments import InputError, announce, parser, run
from common.pictures import save

import jaxode

Array = np.ndarray
ROW, TIME = "pond", "year"
PONDS, SPAN, NOISE = 200, 16.0, 0.1
LEVELS = 0.05, 0.5, 0.95
SHOWN, CHANNELS, POINTS = 3, 3, 80  # series and channels of the picture, and times of a curve


class Halves(NamedTuple):
    """Series cut at the middle of their times."""

    ts: Array
    past: Array
    """`[rows, times, channels]`: NaN after the cut."""
    at: Array
    """`[rows, later times]`, padded by the last one."""
    later: Array
    """`[rows, later times, channels]`, NaN where nothing was seen."""


def ponds(seed: int) -> pd.DataFrame:
    """Predators and prey at 20 to 40 random times, often only one of the two."""
    rng = np.random.default_rng(seed)
    counts, start = rng.integers(20, 41, PONDS), rng.uniform(0.25, 2.75, (PONDS, 2))
    times = np.sort(rng.uniform(0.0, SPAN, (PONDS, counts.max())), axis=1)
    at = jnp.asarray(times)
    slope = lambda t, y, args: y * np.array([1.0, -1.0]) * (1.0 - y[::-1])
    exact = jaxode.solve(slope, start, 0.0, at[:, -1], batch="per_sample", ts=at).ys
    values = np.asarray(exact) + NOISE * rng.normal(size=exact.shape)
    values[rng.random(values.shape) < 0.3] = np.nan
    read = np.arange(times.shape[1]) < counts[:, None]
    read &= ~np.isnan(values).all(axis=2)
    pond = np.nonzero(read)[0]
    prey, predators = values[read].T
    return pd.DataFrame({ROW: pond, TIME: times[read], "prey": prey, "predators": predators})


def halves(ts: Array, ys: Array) -> Halves:
    """Cut each series at the middle of the times at which something was seen."""
    seen = ~np.isnan(ys).all(axis=2)
    middle = np.nanmedian(np.where(seen, ts, np.nan), axis=1)[:, None]
    after = seen & (ts > middle)
    order = np.argsort(~after, axis=1, kind="stable")[:, : after.sum(axis=1).max()]
    at = np.take_along_axis(np.where(after, ts, -np.inf), order, axis=1)
    at = np.maximum.accumulate(at, axis=1)
    later = np.take_along_axis(np.where(after[..., None], ys, np.nan), order[..., None], axis=1)
    return Halves(ts, np.where((ts > middle)[..., None], np.nan, ys), at, later)


def last_values(past: Array) -> Array:
    """`[rows, channels]`: NaN for a channel that was never seen."""
    seen = ~np.isnan(past)
    last = past.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1)
    return np.take_along_axis(past, last[:, None], axis=1)[:, 0]


def report(model: jaxode.series.Series, data: Halves, names: list[str]) -> None:
    """Print a line for each channel."""
    mean = model.mean(data.ts, data.past, data.at)
    low, _, high = model.quantile(LEVELS, data.ts, data.past, data.at)
    last = np.broadcast_to(last_values(data.past)[:, None], mean.shape)
    print("\nsecond halves of held-out series: root mean square error, and values in bands")
    print(f"{'':16} forecast  last value  in 90% bands")
    for c, name in enumerate(names):
        y = data.later[..., c]
        known = ~np.isnan(y) & ~np.isnan(last[..., c])
        if not known.any():
            continue
        error = lambda guess, y=y, known=known: ((guess - y)[known] ** 2).mean() ** 0.5
        inside = ((low[..., c] <= y) & (y <= high[..., c]))[known].mean()
        print(
            f"{name:16} {error(mean[..., c]):8.3g}  {error(last[..., c]):10.3g}  "
            f"{100 * inside:11.0f}%"
        )


def draw(model: jaxode.series.Series, data: Halves, names: list[str], time: str, path: Path):
    """The past of some series, the band of the forecast, and what was seen later."""
    count, channels = min(SHOWN, len(data.ts)), min(CHANNELS, len(names))
    data = Halves(*(leaf[:count] for leaf in data))
    seen = ~np.isnan(data.past).all(axis=2)
    start = np.where(seen, data.ts, -np.inf).max(axis=1)
    at = np.linspace(start, data.at[:, -1], POINTS, axis=1)
    low, median, high = model.quantile(LEVELS, data.ts, data.past, at)
    size = 3.8 * count, 2.2 * channels + 0.8
    figure, axes = plt.subplots(
        channels, count, figsize=size, squeeze=False, sharex="col", sharey="row",
        constrained_layout=True,
    )  # fmt: skip
    for (c, i), axis in np.ndenumerate(axes):
        axis.fill_between(at[i], low[i, :, c], high[i, :, c], alpha=0.25, lw=0, label="90% band")
        axis.plot(at[i], median[i, :, c], color="tab:blue", label="median")
        axis.plot(data.ts[i], data.past[i, :, c], "k.", label="known")
        axis.plot(data.at[i], data.later[i, :, c], ".", color="tab:orange", label="seen later")
        axis.axvline(start[i], color="gray", lw=1, ls="--")
    for i in range(count):
        axes[0, i].set_title(f"held-out series {i + 1}")
        axes[-1, i].set_xlabel(time)
    for c in range(channels):
        axes[c, 0].set_ylabel(names[c])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    made = parser(__file__, __doc__, steps=600)
    made.add_argument("--data", type=Path, help="a CSV file; made-up ponds without it")
    made.add_argument("--row", default=ROW, help="the column that tells series from one another")
    made.add_argument("--time", default=TIME, help="the column of times, which are numbers")
    options = made.parse_args(arguments)
    announce(__doc__)
    frame = tables.read(options.data) if options.data else ponds(options.seed)
    names = [name for name in frame.columns if name not in (options.row, options.time)]
    key = jax.random.key(options.seed)
    try:
        ts, ys = jaxode.series.from_frame(frame, row=options.row, time=options.time)
        order = np.random.default_rng(options.seed).permutation(len(ts))
        held_out, rows = np.split(order, [max(len(ts) // 10, 1)])
        print(f"{len(rows)} series to train on, {len(held_out)} held out, {len(names)} channels")
        model, _ = jaxode.series.fit(ts[rows], ys[rows], key=key, steps=options.steps)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    seen = ~np.isnan(ys[held_out]).all(axis=2)
    held_out = held_out[seen.sum(axis=1) > 1]
    if not len(held_out):
        raise InputError("no held-out series has two times")
    data = halves(ts[held_out], ys[held_out])
    print(f"held-out series: {np.mean(model.log_prob(ts[held_out], ys[held_out])):.2f} nats each")
    report(model, data, names)
    draw(model, data, names, options.time, options.out)
    return 0


if __name__ == "__main__":
    run(main)
