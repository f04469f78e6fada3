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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.tables import own_core
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
BELOW = (
    "Means over the splits, with standard errors. Wine and naval by cells of their levels, to "
    "which quantiles are rounded, so that intervals cover more. Published figures are of other "
    "trainings, of all splits."
)


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
    if forecast.log_density is None:
        return None
    if step is None or forecast.of_levels:
        return -float(np.mean(forecast.log_density(x, y)))
    assert forecast.cdf is not None
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

    def part(
        self, results: Results, told: str, key: str, digits: str, ranked: bool = False,
        beside: Mapping[str, Sequence[str]] | None = None, besides: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """A table of a score; `beside` has further cells of each table, `besides` their names."""
        tables, rows = self.by_table(results), []
        named = [name for name in CONTENDERS if any(name in row for row in tables.values())]
        for name, row in tables.items():
            found = means(row, key)
            told_of = {
                contender: told_with_spread(mean, spread, digits)
                for contender, (mean, spread) in found.items()
            }
            if ranked and len(found) > 1:  # no one is the best of one
                best = min(found, key=lambda contender: found[contender][0])
                told_of[best] = f"**{told_of[best]}**"
            cells = [told_of.get(contender, "") for contender in named]
            rows.append([label(name, row), *cells, *(beside or {}).get(name, ())])
        return show.markdown([told, *named, *besides], rows)

    def nats(self, results: Results, covered: bool = False) -> str:
        """With those that are published, and how many rows jaxode's intervals hold."""
        beside = {name: [f"{x:.2f}" for x in PUBLISHED.get(name, ())] for name in TABLES}
        besides = [f"{name}, published" for name in METHODS]
        if covered:
            besides.append(f"percent in jaxode's {' / '.join(INTERVALS)}% interval")
            for name, row in self.by_table(results).items():
                shares = (means(row, of).get("jaxode") for of in INTERVALS)
                told = " / ".join("" if share is None else f"{share[0]:.0f}" for share in shares)
                beside[name].append(told)
        return self.part(
            results, "nats, training rows x columns", "nats", ".2f", True, beside, besides
        )

    def brief(self, results: Results) -> str:
        return f"{self.nats(results, covered=True)}\n\n{BELOW}"

    def table(self, results: Results) -> str:
        part = partial(self.part, results)
        parts = [
            self.nats(results), BELOW, part("CRPS", "crps", "#.3g", True),
            *(part(f"percent of rows in the {of}% interval", of, ".0f") for of in INTERVALS),
            part("seconds of training", "training", ".1f"),
            part("seconds of 1,000 intervals", "intervals", ".2f"),
        ]  # fmt: skip
        return "\n\n".join(parts)


def label(name: str, row: dict[str, dict[int, Result]]) -> str:
    of_splits = next(iter(row.values()))
    size, count = next(iter(of_splits.values())), len(of_splits)
    splits = f"{count} splits" if count > 1 else "1 split"
    return f"{name}, {size['rows']} x {size['columns']}, {splits}"


def told_with_spread(mean: float, spread: float, digits: str) -> str:
    return f"{mean:{digits}}" + (f" +- {spread:{digits}}" if spread else "")


def means(row: dict[str, dict[int, Result]], key: str) -> dict[str, tuple[float, float]]:
    """By contender, the mean over the splits and its standard error: of a score, or of the
    percent in an interval."""
    value = lambda result: 100 * result["covered"][key] if key in INTERVALS else result[key]
    found = {name: [value(result) for result in of.values()] for name, of in row.items()}
    error = lambda each: float(np.std(each, ddof=1) / np.sqrt(len(each))) if len(each) > 1 else 0.0
    return {
        name: (float(np.mean(each)), error(each))
        for name, each in found.items()
        if None not in each
    }


BENCHMARK = Regression()
