"""The density of a table with text, integers and missing values: train, evaluate, sample.

    python examples/tabular.py                      # a made-up table of flats
    python examples/tabular.py --data my_table.csv  # your own, as pandas reads it

Prints the log-probability of held-out rows, writes --rows new rows, and draws each column of the
held-out rows beside that of the new ones. About a minute on two cores.
"""

import time
from itertools import combinations
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import tables
from common.arguments import InputError, announce, beside, count, parser, run
from common.pictures import save
from common.tables import Column, Frame

from jaxode import tabular

COLORS = {"data": "tab:blue", "samples": "tab:orange"}
MOST_PANELS, MOST_BARS = 10, 12


def bars(axis, columns: dict[str, Column]) -> None:
    """Shares of the most frequent values, beside each other."""
    shares = pd.DataFrame({name: c.value_counts(normalize=True) for name, c in columns.items()})
    shares = shares.fillna(0.0).nlargest(MOST_BARS, "data").sort_index()
    side_by_side(axis, shares)


def side_by_side(axis, shares: Frame) -> None:
    places = np.arange(len(shares))
    for shift, name in ((-0.2, "data"), (0.2, "samples")):
        axis.bar(places + shift, shares[name], 0.4, color=COLORS[name], label=name)
    crowded = len("".join(map(str, shares.index))) > 30
    axis.set_xticks(places, map(str, shares.index), rotation=40 * crowded)  # degrees


def histogram(axis, columns: dict[str, Column]) -> None:
    low, high = np.quantile(columns["data"].dropna(), [0.005, 0.995])
    bins = np.linspace(low, high, 40)
    for (name, column), style in zip(columns.items(), ("stepfilled", "step"), strict=True):
        alpha = 0.5 if style == "stepfilled" else 1.0
        axis.hist(column.dropna(), bins, density=True, histtype=style, alpha=alpha,
                  color=COLORS[name], label=name)  # fmt: skip


def conditional(axis, frames: dict[str, Frame]) -> None:
    """One column given another: the pair whose dependence is strongest in the data.

    Boxes have the quantiles 5, 25, 50, 75 and 95%.
    """
    data = frames["data"]
    numbers = [name for name in data if not tables.is_bars(data[name])]
    groups = [name for name in data if tables.is_bars(data[name]) and data[name].nunique() <= 8]
    explained = {
        (group, number): data.groupby(group)[number].transform("mean").std() / data[number].std()
        for group in groups if group not in numbers for number in numbers
    }  # fmt: skip
    if explained:
        group, number = max(explained, key=lambda pair: np.nan_to_num(explained[pair]))
        levels = sorted(data[group].dropna().unique())
        for shift, (name, frame) in zip((-0.2, 0.2), frames.items(), strict=True):
            parts = [frame.loc[frame[group] == level, number].dropna() for level in levels]
            boxes = axis.boxplot(parts, positions=np.arange(len(levels)) + shift, widths=0.35,
                                 whis=(5, 95), showfliers=False, patch_artist=True)  # fmt: skip
            for box, median in zip(boxes["boxes"], boxes["medians"], strict=True):
                box.set_facecolor(COLORS[name])
                median.set_color("black")
        axis.set_xticks(range(len(levels)), map(str, levels))
        axis.set(title=f"{number} given {group}")
    elif len(numbers) > 1:
        correlation = data[numbers].corr("spearman").abs()
        a, b = max(combinations(numbers, 2), key=lambda pair: correlation.loc[pair])
        for name, frame in frames.items():
            axis.plot(frame[a], frame[b], ".", ms=2, color=COLORS[name])
        axis.set(xlabel=a, title=f"{b} given {a}")
    else:
        axis.set_axis_off()


def draw(held_out: Frame, new: Frame, path: Path) -> None:
    """Each column, the shares of missing values, and one column given another."""
    frames = {"data": held_out, "samples": new}
    names = list(held_out)[:MOST_PANELS]
    gaps = pd.DataFrame({name: frame.isna().mean() for name, frame in frames.items()})
    gaps = gaps[gaps.max(axis=1) > 0]
    panels = len(names) + 1 + bool(len(gaps))
    across = -(-panels // 2)
    figure, axes = plt.subplots(2, across, figsize=(3.2 * across, 6.4), constrained_layout=True)
    rest = iter(axes.flat)
    for name in names:
        axis = next(rest)
        columns = {kind: frame[name] for kind, frame in frames.items()}
        (bars if tables.is_bars(held_out[name]) else histogram)(axis, columns)
        axis.set(title=name, yticks=[])
    if len(gaps):
        axis = next(rest)
        side_by_side(axis, gaps)
        axis.set(title="part that is missing")
    conditional(next(rest), frames)
    for axis in rest:
        axis.set_axis_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, ["held-out rows", labels[1]], loc="outside upper center", ncols=2)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    made = parser(__file__, __doc__, steps=1500)
    made.add_argument("--data", type=Path, help="a CSV file; made-up flats without it")
    made.add_argument("--rows", type=count, default=2000, help="new rows (default 2000)")
    options = made.parse_args(arguments)
    written = beside(options.out, ".csv")
    if options.data and options.data.resolve() == written.resolve():
        made.error(f"--data and {written}, for the new rows, must be different files")
    frame = tables.read(options.data) if options.data else tables.flats(5000, options.seed)
    frame = tables.without_identifiers(frame)
    rows, held_out = tables.split(frame, 500, options.seed)
    announce(__doc__)
    print(f"{len(rows)} rows to train on, {len(held_out)} held out, {frame.shape[1]} columns")

    train_key, sample_key = jax.random.split(jax.random.key(options.seed))
    begin = time.perf_counter()
    try:
        table, _ = tabular.fit(rows, key=train_key, steps=options.steps)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    print(f"\ntrained in {time.perf_counter() - begin:.0f} s")
    for kind in ("categorical", "integer", "continuous"):
        names = [name for name, found in table.kinds.items() if found == kind]
        print(f"  {kind:<12} {', '.join(names) or '-'}")
    print(f"held-out rows: {table.log_prob(held_out).mean():.3f} nats per row")
    new = table.sample(sample_key, options.rows)
    new.to_csv(written, index=False)
    print(f"{options.rows} new rows: {written}")
    draw(held_out, new, options.out)
    return 0


if __name__ == "__main__":
    run(main)
