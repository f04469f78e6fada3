"""Predictions with uncertainty on nine regression tables of UCI, in their published splits.

    make regression                                    a night on one core; continue as you like
    python -m benchmarks regression --match "boston"   one table
    python -m benchmarks regression --match "split 0"  one split of each

Each contender trains on the same rows, whose inputs are standardized, and sees the same validation
rows; `regressors.py` has their settings, `regression_data.py` the splits. Scores of test rows, in
the units of `y`:

- nats: the mean negative log-density. The `y` of wine and naval has few levels, on which a density
  could narrow without end: there it is the mean density of the cell around the level, the
  probability of the cell by its width, and at least 1e-6 of it.
- CRPS: twice the mean pinball loss of quantiles at 99 levels, of at most 1,000 test rows. Where `y`
  has levels, quantiles are rounded to them.
- the part of these rows in the central intervals of 50% and 90%.

Seconds are those of one core's work, by the clock of the process: other processes on the machine do
not count. Those of training include compilation, those of the intervals do not.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.cases.tables import MARKERS, own_core
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.regression_data import TABLES, Split, read, split_of
from benchmarks.peers.regressors import CONTENDERS, Forecast, pinball

LEVELS = (np.arange(99) + 0.5) / 99
INTERVALS = {"50": (0.25, 0.75), "90": (0.05, 0.95)}
ROWS, LEAST = 1000, 1e-6
# Published nats, of other trainings: NGBoost, deep ensembles, GP and DistForest from Duan et al.
# (2020), arXiv:1910.03225, on the same splits.
PUBLISHED = {
    "boston": (2.43, 2.41, 2.37, 2.67),
    "concrete": (3.04, 3.06, 3.03, 3.38),
    "energy": (0.60, 1.38, 0.66, 1.53),
    "kin8nm": (-0.49, -1.20, -1.11, -0.40),
    "naval": (-5.34, -5.63, -4.98, -4.84),
    "power": (2.79, 2.79, 2.81, 2.68),
    "protein": (2.81, 2.83, 2.89, 2.59),
    "wine": (0.91, 0.94, 0.95, 1.05),
    "yacht": (0.20, 1.18, 0.10, 2.94),
}
METHODS = ("NGBoost", "deep ensembles", "GP", "DistForest")


class Case(NamedTuple):
    table: str
    contender: str
    split: int

    @property
    def name(self) -> str:
        return f"{self.table}: {self.contender}, split {self.split}"


def all_cases() -> Iterator[Case]:
    for split in range(max(table.splits for table in TABLES.values())):
        for name, table in TABLES.items():
            if split < table.splits:
                yield from (Case(name, contender, split) for contender in CONTENDERS)


def nats_of(forecast: Forecast, split: Split) -> float | None:
    x, y, step = *split.test, split.step
    if forecast.log_density is None or forecast.cdf is None:
        return None
    if step is None:
        return -float(np.mean(forecast.log_density(x, y)))
    cell = forecast.cdf(x, y + step / 2) - forecast.cdf(x, y - step / 2)
    return -float(np.mean(np.log(np.maximum(cell, LEAST) / step)))


def scores(forecast: Forecast, split: Split) -> dict[str, Any]:
    (x, y), step = (part[:ROWS] for part in split.test), split.step
    ends = [level for pair in INTERVALS.values() for level in pair]
    quantiles = forecast.quantiles(x, [*LEVELS, *ends])
    if step is not None:
        quantiles = step * np.round(quantiles / step)
    few, bounds = quantiles[:, : len(LEVELS)], np.split(quantiles[:, len(LEVELS) :], 2, axis=1)
    within = [np.mean((low <= y) & (y <= high)) for low, high in (pair.T for pair in bounds)]
    return {
        "nats": nats_of(forecast, split),
        "crps": float(2 * pinball(few, y, LEVELS).mean()),
        "covered": {name: float(part) for name, part in zip(INTERVALS, within, strict=True)},
    }


def seconds_of(call: Any) -> tuple[float, Any]:
    """Of this process's work, and what the call returns."""
    start = time.process_time()
    found = call()
    return round(time.process_time() - start, 3), found


class Regression(Benchmark):
    title = "Regression with uncertainty"
    timed = False  # each case has a core
    limit = 3600.0
    cases = {case.name: case for case in all_cases()}

    def run(self, case: str, bench: Bench) -> Result:
        name, contender, number = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        own_core()
        bench.announce(contender)
        split = split_of(read(name), number, TABLES[name])
        train = CONTENDERS[contender](split, number)
        training, forecast = seconds_of(train)
        found = scores(forecast, split)
        x = np.resize(split.test.x, (ROWS, split.test.x.shape[1]))
        intervals = lambda: forecast.quantiles(x, INTERVALS["90"])
        intervals()  # compiles
        taken, _ = seconds_of(intervals)
        rows, columns = split.train.x.shape
        return {"rows": rows, "columns": columns, **found, "training": training, "intervals": taken}

    def by_table(self, results: Results) -> dict[str, dict[str, dict[int, Result]]]:
        """By table and contender, the results of its splits, those that all of them have."""
        found: dict[str, dict[str, dict[int, Result]]] = {}
        for case, result in results.items():
            name, contender, split = self.cases[case]
            found.setdefault(name, {}).setdefault(contender, {})[split] = result
        for row in found.values():
            common = set.intersection(*map(set, row.values()))
            for contender, of_splits in row.items():
                row[contender] = {split: of_splits[split] for split in sorted(common)}
        return {name: row for name in TABLES if (row := found.get(name)) and all(row.values())}

    def table(self, results: Results) -> str:
        tables = self.by_table(results)
        named = [name for name in CONTENDERS if any(name in row for row in tables.values())]

        def part(told: str, value: Any, digits: int, best: bool = True, *more: Any) -> str:
            rows = []
            for name, row in tables.items():
                splits = len(next(iter(row.values())))
                size = next(iter(next(iter(row.values())).values()))
                label = f"{name}, {size['rows']} x {size['columns']}, {splits} split" + "s" * (
                    splits > 1
                )
                means = {}
                for contender, of_splits in row.items():
                    values = [value(result) for result in of_splits.values()]
                    if None not in values:
                        means[contender] = float(np.mean(values))
                least = min(means.values())
                cell = lambda mean, least=least: (
                    f"**{mean:.{digits}f}**" if best and mean == least else f"{mean:.{digits}f}"
                )
                cells = [cell(means[c]) if c in means else "" for c in named]
                rows.append([label, *cells, *(f"{x:.2f}" for column in more for x in column[name])])
            published = [f"{name}, published" for name in METHODS if more]
            return show.markdown([told, *named, *published], rows)

        covered = lambda level: lambda result: 100 * result["covered"][level]
        parts = [
            part("nats, training rows x columns", lambda r: r["nats"], 2, True, PUBLISHED),
            "Means over the splits. Wine and naval by the cells of their levels. Published figures "
            "are of other trainings, of the twenty splits.",
            part("CRPS", lambda r: r["crps"], 4),
            part("rows in the interval of 50%, in percent", covered("50"), 0, False),
            part("rows in the interval of 90%, in percent", covered("90"), 0, False),
            part("seconds of training", lambda r: r["training"], 1, False),
            part("seconds of 1,000 intervals", lambda r: r["intervals"], 2, False),
        ]
        return "\n\n".join(parts)

    def draw(self, results: Results) -> Figure:
        """How far each contender is from the best of each table, in nats and in CRPS."""
        tables, styles = self.by_table(results), show.styles(CONTENDERS)
        figure = Figure((9.0, 1.4 + 0.34 * len(tables)), layout="constrained")
        panels = zip(figure.subplots(1, 2, sharey=True), ("nats", "crps"), strict=True)
        for axis, score in panels:
            for contender, marker in zip(CONTENDERS, MARKERS, strict=False):
                points = []
                for place, row in enumerate(tables.values()):
                    means = {
                        name: float(np.mean([r[score] for r in of_splits.values()]))
                        for name, of_splits in row.items()
                        if all(r[score] is not None for r in of_splits.values())
                    }
                    if contender in means:
                        least = min(means.values())
                        gap = means[contender] - least
                        points.append((gap if score == "nats" else 100 * gap / least, place))
                if points:
                    style = {"color": styles[contender]["color"], "ms": 5, "label": contender}
                    axis.plot(*zip(*points, strict=True), marker, **style)
            above = "nats above the best" if score == "nats" else "CRPS above the best, percent"
            axis.set(xlabel=above, yticks=range(len(tables)), yticklabels=list(tables))
            axis.set_xscale("symlog", linthresh=0.1 if score == "nats" else 10)
        figure.axes[0].invert_yaxis()
        return figure


BENCHMARK = Regression()
