"""Forecasts of irregular series with gaps: a linear system, predators and prey, MuJoCo's hopper,
PhysioNet 2012.

    python -m benchmarks series --match "linear"                  minutes
    PHYSIONET_2012=folder python -m benchmarks series             an hour; what is there is kept

Each contender trains on the same series for so many seconds of one core, without compilation, and
the same validation series choose its best network. `series_models.py` has their settings,
`series_data.py` the data. Scores of test series, the values after a cut given those before:

- Linear system: root mean square error, and nats of a value above those of the true law, by a
  Kalman filter.
- Predators and prey: root mean square error from the values without noise.
- Hopper: squared errors of the second half in hundredths, half of the times of the first half seen.
- PhysioNet: values rounded to the hour and averaged, 80% of patients to train. Squared errors of
  the second day given the first, in thousandths. `published`: of values divided by the largest of
  their channel, the mean over the channels of a patient, 41 with zero for those without a value,
  as Rubanova et al. (2019) have it; they round to 6 minutes. `each value`: the plain mean, by the
  range of a channel. Nats of a value after 36 hours, of all and of the next three hours, in
  standard deviations of a channel. The AUC of deaths by logistic regression on the state after 48
  hours.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.tables import own_core
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.series_data import (
    HOURS,
    Cut,
    Series,
    cut_at,
    hopper,
    kalman,
    linear,
    patients,
    predators,
)  # fmt: skip
from benchmarks.peers.series_models import CONTENDERS, Forecaster

SEEDS = 3
PUBLISHED_CHANNELS = 41  # with age, sex, height and the type of the unit
# Of other trainings: squared errors of Rubanova et al. (2019), arXiv:1907.03907, and nats of
# Yalavarthi et al. (2025), arXiv:2402.06293.
BELOW = (
    "Means over the seeds that have run. Published, of other trainings: hopper 1.26 (latent ODE); "
    "PhysioNet, squared errors 2.21 (latent ODE) and 3.06 (recurrent VAE), nats after 36 hours "
    "0.501 (GRU-ODE-Bayes), 0.496 (neural flows), 0.367 (GraFITi+), -0.647 (ProFITi), AUC 0.829 to "
    "0.833."
)


class Split(NamedTuple):
    train: Series
    aside: Series
    test: Series
    cut: float
    scale: Any
    """Of each channel, in the score."""


class Table(NamedTuple):
    split: Any
    scores: Any
    seconds: float


class Case(NamedTuple):
    table: str
    contender: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.table}: {self.contender}, seed {self.seed}"


def parted(data: Series, test: Series, seed: int, cut: float, scale: Any = None) -> Split:
    """A tenth of the training series chooses the best network."""
    order = np.random.default_rng(seed).permutation(len(data.ts))
    aside, rows = np.split(order, [max(len(order) // 10, 3)])
    scale = np.ones(data.ys.shape[2]) if scale is None else scale
    return Split(data.rows(rows), data.rows(aside), test, cut, scale)


def of_patients(seed: int) -> Split:
    """Without the channel that has one value alone."""
    data = patients(60)
    values = data.ys.reshape(-1, data.ys.shape[2])
    varies = np.fmax.reduce(values) > np.fmin.reduce(values)
    data = data._replace(ys=data.ys[:, :, varies])
    data = data.rows(~np.isnan(data.ys).all(axis=(1, 2)))
    order = np.random.default_rng(seed).permutation(len(data.ts))
    test, rows = np.split(order, [len(order) // 5])
    scale = 1 / np.nanmax(data.ys, axis=(0, 1))
    return parted(data.rows(rows), data.rows(test), seed, HOURS / 2, scale)


def of_hopper(seed: int) -> Split:
    data, last = hopper(10_000, seed), 8000
    return parted(data.rows(np.arange(last)), data.rows(np.arange(last, 10_000)), seed, 0.497)


def error(model: Forecaster, split: Split) -> float:
    part = cut_at(split.test, split.cut)
    truth = part.later if part.exact is None else part.exact
    return float(np.sqrt(np.nanmean((model.mean(part) - truth) ** 2)))


def of_linear(model: Forecaster, split: Split) -> dict[str, Any]:
    found: dict[str, Any] = {"error": error(model, split)}
    if model.nats is not None:
        lost = kalman(split.test).sum() - model.nats(split.test).sum()
        found["lost nats"] = float(lost / np.count_nonzero(~np.isnan(split.test.ys)))
    return found


def of_patient_scores(model: Forecaster, split: Split) -> dict[str, Any]:
    part = cut_at(split.test, split.cut)
    squares = squared_errors(model, part)
    there = ~np.isnan(squares)
    counts = there.sum(axis=1)
    total = np.nansum(squares * split.scale**2, axis=1) / np.maximum(counts, 1)
    span = np.nanmax(split.test.ys, (0, 1)) - np.nanmin(split.test.ys, (0, 1))
    found = {
        "published": 1e3 * float(total.sum(axis=1).mean() / PUBLISHED_CHANNELS),
        "each value": 1e3 * float(np.nanmean(squares / span**2)),
    }
    if model.nats is not None:
        found |= {f"nats to {end:.0f} h": nats_after(model, split, 36.0, end) for end in (39, 48)}
    if model.state is not None:
        found["AUC"] = auc(model, split)
    return found


def squared_errors(model: Forecaster, part: Cut) -> Any:
    return (model.mean(part) - part.later) ** 2


def nats_after(model: Forecaster, split: Split, cut: float, end: float) -> float:
    """Of a value, in standard deviations of the training values, by the chain rule."""
    assert model.nats is not None
    log_density, data = model.nats, split.test
    until = lambda t: np.where((data.ts > t)[..., None], np.nan, data.ys)
    past, more = until(cut), until(end)
    rows = ~np.isnan(past).all(axis=(1, 2))
    of = lambda ys: log_density(data._replace(ys=ys).rows(rows)).sum()
    after = (~np.isnan(more) & np.isnan(past))[rows]
    units = (after * np.log(np.nanstd(split.train.ys, axis=(0, 1)))).sum()
    return -float((of(more) - of(past) + units) / after.sum())


def auc(model: Forecaster, split: Split) -> float:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert model.state is not None
    state = model.state
    known = lambda part: np.hstack([state(part, HOURS + 1), part.context])
    strengths: Any = np.logspace(-4, 1, 6)
    classes = LogisticRegressionCV(Cs=strengths, scoring="neg_log_loss", max_iter=500)
    fitted = make_pipeline(StandardScaler(), classes).fit(known(split.train), split.train.died)
    return float(roc_auc_score(split.test.died, fitted.predict_proba(known(split.test))[:, 1]))


TABLES = {
    "linear": Table(
        lambda seed: parted(linear(600, seed), linear(600, 1000 + seed), seed, 3.0), of_linear, 60.0
    ),
    "predators": Table(
        lambda seed: parted(predators(30, seed), predators(60, 100 + seed), seed, 8.0),
        lambda model, split: {"error": error(model, split)},
        60.0,
    ),
    "hopper": Table(
        of_hopper, lambda model, split: {"error": 100 * error(model, split) ** 2}, 200.0
    ),
    "PhysioNet": Table(of_patients, of_patient_scores, 200.0),
}


def all_cases() -> Iterator[Case]:
    for seed in range(SEEDS):
        for table in TABLES:
            yield from (Case(table, contender, seed) for contender in CONTENDERS)


class Forecasts(Benchmark):
    title = "Irregular series"
    timed = False  # each case has a core
    limit = 7200.0
    cases = {case.name: case for case in all_cases()}

    def run(self, case: str, bench: Bench) -> Result:
        name, contender, seed = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        own_core()
        bench.announce(contender)
        table = TABLES[name]
        split = table.split(seed)
        model = CONTENDERS[contender](
            split.train, split.aside, split.cut, split.scale, seed, table.seconds
        )
        return {"rows": len(split.train.ts), "scores": table.scores(model, split)}

    def table(self, results: Results) -> str:
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for case, result in results.items():
            name, contender, _ = self.cases[case]
            found.setdefault(name, {}).setdefault(contender, []).append(result["scores"])
        parts = []
        for told, by in found.items():
            scores = list(
                dict.fromkeys(score for of in by.values() for each in of for score in each)
            )
            rows = [
                [contender, *(cell(of, score) for score in scores)] for contender, of in by.items()
            ]
            parts.append(show.markdown([told, *scores], rows))
        return "\n\n".join([*parts, BELOW])

    def brief(self, results: Results) -> str:
        """The tables with several scores, without the mean of a channel; the others in words."""
        alone = [name for name in TABLES if name != "PhysioNet"]
        words = []
        for name in alone:
            by = {}
            for case, result in results.items():
                if self.cases[case].table == name and "error" in result["scores"]:
                    by.setdefault(self.cases[case].contender, []).append(result["scores"])
            if by:
                each = (f"{contender} {cell(of, 'error')}" for contender, of in by.items())
                words.append(f"Errors on {name}: {', '.join(each)}.")
        kept = {
            case: result
            for case, result in results.items()
            if self.cases[case].table not in alone
            and self.cases[case].contender != "mean of channel"
        }
        return " ".join([self.table(kept), *words])


def cell(of: list[dict[str, float]], score: str) -> str:
    """The mean over seeds, and how many there are."""
    values = [each[score] for each in of if score in each]
    return f"{np.mean(values):.3f} ({len(values)})" if values else ""


BENCHMARK = Forecasts()
