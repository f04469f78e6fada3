"""Densities and samples of tables with categories, integers and missing values.

    make mixed                                     an hour on one core; continue as you like
    python -m benchmarks mixed --match "credit"    one table

One split of each table, 80% to train; `tabular.py` has the settings of contenders.

- nats: the mean negative log-probability of held-out rows: of all that is discrete, integers and
  missing values, too, and the density of other columns. Only of models with this same measure.
- AUC: how well boosted trees tell as many samples from the training rows, in five folds; 0.5 if
  they cannot. Copies of training rows would have it, too.

jaxode is told to train for a minute, others take as long as their defaults do. Seconds are those of
one core's work: other processes on the machine do not count.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.regression import seconds_of
from benchmarks.cases.tables import own_core
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.mixed_data import TABLES, Frame, is_category, split_of
from benchmarks.peers.tabular import CONTENDERS

FOLDS = 5
KEYS = {
    "nats": ("nats of a held-out row, training rows x columns", ".2f"),
    "auc": ("AUC, samples against training rows", ".3f"),
    "training": ("seconds of training", ".1f"),
    "sampling": ("seconds of sampling as many rows", ".2f"),
}


class Case(NamedTuple):
    table: str
    contender: str

    @property
    def name(self) -> str:
        return f"{self.table}: {self.contender}"


def all_cases() -> Iterator[Case]:
    for table in TABLES:
        yield from (Case(table, contender) for contender in CONTENDERS)


def told_apart(samples: Frame, rows: Frame) -> float:
    """The AUC of a classifier between samples and rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    categories: Any = [is_category(column) for _, column in rows.items()]
    x = np.concatenate([codes(samples, rows), codes(rows, rows)])
    y = np.repeat([1, 0], [len(samples), len(rows)])
    trees = HistGradientBoostingClassifier(categorical_features=categories, random_state=0)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    shares: Any = cross_val_predict(trees, x, y, cv=folds, method="predict_proba")
    return float(roc_auc_score(y, shares[:, 1]))


def codes(frame: Frame, like: Frame) -> Any:
    """Numbers, and the ranks of categories by how often they are; NaN where a value is missing."""
    columns = []
    for name, column in like.items():
        values = frame[name]
        if is_category(column):
            common = column.astype(str).where(column.notna()).value_counts().index[:250]
            codes = {value: float(i) for i, value in enumerate(common)}
            values = values.astype(str).where(values.notna()).map(codes)
        columns.append(values.to_numpy(float, na_value=np.nan))
    return np.stack(columns, 1)


class Mixed(Benchmark):
    title = "Tables with categories and missing values"
    timed = False  # each case has a core
    seconds = 60.0
    limit = 3600.0
    cases = {case.name: case for case in all_cases()}

    def run(self, case: str, bench: Bench) -> Result:
        name, contender = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        own_core()
        bench.announce(contender)
        train, held, left_out = split_of(TABLES[name]())
        training, model = seconds_of(CONTENDERS[contender](train, 0, bench.seconds))
        sampling, samples = seconds_of(lambda: model.sample(len(train)))
        nats = None if model.log_prob is None else -float(np.mean(model.log_prob(held)))
        rows, columns = train.shape
        return {
            "rows": rows, "columns": columns, "left_out": left_out, "nats": nats,
            "auc": told_apart(samples, train), "training": training, "sampling": sampling,
        }  # fmt: skip

    def by_table(self, results: Results) -> dict[str, dict[str, Result]]:
        found: dict[str, dict[str, Result]] = {}
        for case, result in results.items():
            name, contender = self.cases[case]
            found.setdefault(name, {})[contender] = result
        return found

    def columns(self, results: Results, key: str) -> tuple[list[str], list[list[str]]]:
        """The contenders that have this score, and theirs of each table, the best in bold."""
        digits, rows, tables = KEYS[key][1], [], self.by_table(results)
        named = [
            name for name in CONTENDERS
            if any(row.get(name, {}).get(key) is not None for row in tables.values())
        ]  # fmt: skip
        for row in tables.values():
            values = {name: row[name][key] for name in named if name in row}
            told_of = {name: f"{value:{digits}}" for name, value in values.items()}
            if key in ("nats", "auc") and len(values) > 1:
                best = min(values, key=lambda name: values[name])
                told_of[best] = f"**{told_of[best]}**"
            rows.append([told_of.get(name, "") for name in named])
        return named, rows

    def labels(self, results: Results) -> list[str]:
        sizes = {name: next(iter(row.values())) for name, row in self.by_table(results).items()}
        return [f"{name}, {size['rows']} x {size['columns']}" for name, size in sizes.items()]

    def part(self, results: Results, key: str) -> str:
        named, rows = self.columns(results, key)
        labels = self.labels(results) if key == "nats" else self.by_table(results)
        table = [[label, *row] for label, row in zip(labels, rows, strict=True)]
        return show.markdown([KEYS[key][0], *named], table) if named else ""

    def brief(self, results: Results) -> str:
        (by_nats, nats), (by_auc, auc) = (self.columns(results, key) for key in ("nats", "auc"))
        header = [*(f"nats, {name}" for name in by_nats), *(f"AUC, {name}" for name in by_auc)]
        rows = [list(row) for row in zip(self.labels(results), nats, auc, strict=True)]
        table = [[label, *mine, *others] for label, mine, others in rows]
        return show.markdown(["training rows x columns", *header], table)

    def table(self, results: Results) -> str:
        sizes = {name: next(iter(row.values())) for name, row in self.by_table(results).items()}
        left_out = ", ".join(f"{size['left_out']} of {name}" for name, size in sizes.items())
        below = (
            "One split. Held-out rows with a category, or one of few numbers, that no training row "
            f"has are left out: {left_out}. jaxode is told to train for a minute, CTGAN and "
            "TVAE for their default of 300 epochs, which are few steps if there are few rows."
        )
        nats, *others = (self.part(results, key) for key in KEYS)
        return "\n\n".join([nats, below, *others])


BENCHMARK = Mixed()
