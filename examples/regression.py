"""Predict a column of a table with its uncertainty: p(y | x), intervals, quantiles, calibration.

    python examples/regression.py                                      # made-up flats
    python examples/regression.py --data my_table.csv --target price  # your own

Learns the distribution of --target given all other columns, and compares it on held-out rows with
least squares and a normal error of constant size. About a minute on two cores.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import tables
from common.arguments import InputError, announce, parser, run
from common.pictures import save
from common.tables import Frame
from jax.scipy.stats import norm

from jaxode import tabular

LEVELS = (0.5, 0.9)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = 60  # rows whose intervals are drawn


class Prediction(NamedTuple):
    """Of the held-out rows."""

    quantiles: np.ndarray
    """`[rows, levels]`"""
    pit: np.ndarray
    crps: np.ndarray


def of_table(table: tabular.Table, target: str, rows: Frame, seed: int) -> Prediction:
    """A PIT value is uniform between the probability of less and of at most."""
    at_most = table.cdf(rows)
    whole = bool((rows[target] % 1 == 0).all())
    less = table.cdf(rows.assign(**{target: rows[target] - 1})) if whole else at_most
    pit = less + np.random.default_rng(seed).random(len(rows)) * (at_most - less)
    return Prediction(table.quantile(QUANTILES, rows), pit, table.crps(rows))


def of_normal(target: str, rows: Frame, held_out: Frame) -> Prediction:
    """Least squares on indicators of the categories, and a normal error of constant size."""
    together = pd.concat([rows, held_out])
    x = pd.get_dummies(together.drop(columns=target), dummy_na=True).astype(float)
    x = x.fillna(x.mean()).assign(one=1.0).to_numpy()
    y = together[target].to_numpy(float)
    n = len(rows)
    line = x @ np.linalg.lstsq(x[:n], y[:n])[0]
    sd = (y - line)[:n].std()
    z = (y - line)[n:] / sd
    crps = sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    quantiles = line[n:, None] + sd * np.asarray(norm.ppf(np.array(QUANTILES)))
    return Prediction(quantiles, np.asarray(norm.cdf(z)), np.asarray(crps))


def report(name: str, found: Prediction, y: np.ndarray) -> None:
    ends = {0.5: found.quantiles[:, [1, 3]], 0.9: found.quantiles[:, [0, 4]]}
    text = f"{name:<16} CRPS {found.crps.mean():<9.4g}"
    for level, (low, high) in ((level, ends[level].T) for level in LEVELS):
        inside = np.mean((low <= y) & (y <= high))
        text += f"{level:.0%} interval: {inside:.1%} inside, width {np.mean(high - low):<9.4g}"
    print(text.rstrip())


def typical(rows: Frame, given: list[str]) -> dict[str, Any]:
    """The median of each number and the most frequent of other values."""
    chosen = {}
    for name in given:
        column = rows[name].dropna()
        few = tables.is_bars(column)
        chosen[name] = column.mode()[0] if few else column.quantile(0.5, interpolation="nearest")
    return chosen


def bands(axis, table, target, rows, given) -> None:
    """Quantiles against the number that says most, with the other columns as in a typical row."""
    numbers = [name for name in given if not tables.is_bars(rows[name])]
    if not numbers:
        axis.set_axis_off()
        return
    chosen, y = typical(rows, given), rows[target]
    name = max(numbers, key=lambda name: abs(np.nan_to_num(rows[name].corr(y, "spearman"))))
    x = np.linspace(rows[name].quantile(0.01), rows[name].quantile(0.99), 50)
    if rows[name].dropna().mod(1).eq(0).all():
        x = np.unique(np.round(x))
    grid = pd.DataFrame({n: [chosen[n]] * len(x) for n in given}).assign(**{name: x})
    grid = grid.astype({n: rows[n].dtype for n in given if n != name})
    q = table.quantile(QUANTILES, grid)
    alike = pd.Series(True, rows.index)
    for other in given:
        if not tables.is_number(rows[other]):
            alike &= rows[other] == chosen[other]
    axis.plot(rows.loc[alike, name], y[alike], ".", ms=2, color="tab:gray", label="rows alike")
    axis.fill_between(x, q[:, 0], q[:, 4], alpha=0.25, label="90%")
    axis.fill_between(x, q[:, 1], q[:, 3], alpha=0.45, color="tab:blue", label="50%")
    axis.plot(x, q[:, 2], color="tab:blue", label="median")
    axis.set(xlabel=name, ylabel=target, title=f"{target} of a typical row, by {name}")
    axis.legend(loc="upper left")


def draw(table, target, rows, y, found: dict[str, Prediction], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    bands(axes[0], table, target, rows, [name for name in rows if name != target])

    flow = found["flow"]
    order = np.argsort(flow.quantiles[:SHOWN, 2])
    places, q, seen = np.arange(len(order)), flow.quantiles[:SHOWN][order], y[:SHOWN][order]
    axes[1].vlines(places, q[:, 0], q[:, 4], lw=3, color="tab:blue", alpha=0.3, label="90%")
    axes[1].vlines(places, q[:, 1], q[:, 3], lw=3, color="tab:blue", alpha=0.6, label="50%")
    inside = (q[:, 0] <= seen) & (seen <= q[:, 4])
    for chosen, color, label in ((inside, "black", "seen"), (~inside, "tab:red", "outside")):
        axes[1].plot(places[chosen], seen[chosen], ".", color=color, label=label)
    axes[1].set(xlabel="held-out rows, by their median", title="intervals of held-out rows")
    axes[1].legend(loc="upper left")

    level = (np.arange(len(y)) + 0.5) / len(y)
    for (name, prediction), color in zip(found.items(), ("tab:blue", "tab:red"), strict=True):
        axes[2].plot(level, np.sort(prediction.pit), color=color, label=name)
    axes[2].plot([0, 1], [0, 1], color="black", lw=0.8, ls="--")
    axes[2].set(xlabel="uniform quantile", ylabel="PIT value", aspect="equal", title="calibration")
    axes[2].legend()
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    made = parser(__file__, __doc__, steps=1500)
    made.add_argument("--data", type=Path, help="a CSV file; made-up flats without it")
    made.add_argument("--target", help="the column to predict (default: the last)")
    options = made.parse_args(arguments)
    frame = tables.read(options.data) if options.data else tables.flats(5000, options.seed)
    frame = tables.without_identifiers(frame)
    target = options.target or frame.columns[-1]
    if target not in frame or not tables.is_number(frame[target]):
        raise InputError(f"--target must be a column of numbers of {list(frame)}; got {target}")
    rows, held_out = tables.split(frame.dropna(subset=[target]), 500, options.seed)
    given = [name for name in frame if name != target]
    announce(__doc__)
    print(f"{len(rows)} rows to train on, {len(held_out)} held out: {target} given {len(given)}")

    begin = time.perf_counter()
    try:
        table, _ = tabular.fit(
            rows, key=jax.random.key(options.seed), given=given, steps=options.steps
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    print(f"\ntrained in {time.perf_counter() - begin:.0f} s; evaluating")
    y = held_out[target].to_numpy(float)
    found = {
        "flow": of_table(table, target, held_out, options.seed),
        "constant normal": of_normal(target, rows, held_out),
    }
    for name, prediction in found.items():
        report(name, prediction, y)
    draw(table, target, rows, y, found, options.out)
    return 0


if __name__ == "__main__":
    run(main)
