"""Held-out nats of densities of angles, after a minute of training on one core.

    make bench ONLY=angles     ten minutes

- Mixtures of four von Mises distributions of concentration 4, whose truth is known.
- The directions of the wind at the three airports of New York in each hour of 2013, without calms,
  with uniform noise over the ten degrees to which they are rounded.

The base of jaxode is a torus, and its network `Residual(period=)`; zuko's `NCSF` is a flow of
circular splines. Both have their defaults, and what counts as time is as in `tables`. A mixture of
von Mises distributions has independent angles in each part, and the validation rows choose how
many parts; the first truths are such mixtures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import tables
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.mixed_data import of_r
from benchmarks.harness.table_data import Table
from benchmarks.peers import estimators

PERIOD = 2 * math.pi
CONCENTRATION, PARTS = 4.0, 4
CONTENDERS = {
    "jaxode": estimators.Contender(partial(estimators.by_jaxode, period=PERIOD)),
    "zuko NCSF": estimators.Contender(estimators.by_zuko("NCSF")),
    "mixture of von Mises": estimators.Contender(estimators.von_mises),
}


class Data(NamedTuple):
    table: Table
    """In `[-pi, pi)`."""
    truth: float | None = None
    """Nats of the test rows under the density that they are from, where it is known."""


def split(x: np.ndarray) -> Table:
    """A tenth of the rows to stop and choose, a tenth to test."""
    x, tenth = ((x + math.pi) % PERIOD - math.pi).astype(np.float32), len(x) // 10
    return Table(x[2 * tenth :], x[:tenth], x[tenth : 2 * tenth])


def mixture(columns: int, rows: int = 25_000) -> Data:
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, PERIOD, (PARTS, columns))
    table = split(rng.vonmises(centres[rng.integers(0, PARTS, rows)], CONCENTRATION))
    parts = CONCENTRATION * np.cos(table.test[:, None] - centres)
    parts -= np.log(PERIOD * np.i0(CONCENTRATION))
    log_prob = np.logaddexp.reduce(parts.sum(axis=-1), axis=1) - math.log(PARTS)
    return Data(table, -float(log_prob.mean()))


def winds() -> Data:
    frame = of_r("nycflights13", "weather")
    frame = frame[(frame.wind_dir > 0) & (frame.wind_speed > 0)]
    hour = ["year", "month", "day", "hour"]
    wide = frame.pivot_table(index=hour, columns="origin", values="wind_dir").dropna()
    rng = np.random.default_rng(0)
    degrees = rng.permutation(wide.to_numpy()) + rng.uniform(-5, 5, wide.shape)
    return Data(split(np.radians(degrees)))


TABLES: Mapping[str, Callable[[], Data]] = {
    "mixture of von Mises, 2 angles": partial(mixture, 2),
    "mixture of von Mises, 5 angles": partial(mixture, 5),
    "winds of three airports": winds,
}


class Angles(Benchmark):
    title = "Densities of angles"
    timed = False  # each case has a core
    seconds = 60.0
    cases: Mapping[str, Any] = {
        f"{table}: {contender}": tables.Case(table, contender, "", 0)
        for table in TABLES
        for contender in CONTENDERS
    }

    def run(self, case: str, bench: Bench) -> Result:
        chosen = self.cases[case]
        if chosen.contender in bench.skip:
            return {"crashed": f"{chosen.contender}: {bench.skip[chosen.contender]}"}
        tables.own_core()
        bench.announce(chosen.contender)
        data = TABLES[chosen.table]()
        contender = CONTENDERS[chosen.contender]
        found = tables.scores(contender, chosen, data.table, [bench.seconds])
        rows, columns = data.table.train.shape
        return {
            "rows": rows,
            "columns": columns,
            "truth": data.truth,
            **found[f"{bench.seconds:g}"],
        }

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for table in TABLES:
            row = {
                name: results[case]
                for name in CONTENDERS
                if (case := f"{table}: {name}") in results
            }
            if not row:
                continue
            least = min(result["nats"] for result in row.values())
            told = {name: f"{result['nats']:.3f}" for name, result in row.items()}
            told |= {n: f"**{told[n]}**" for n, result in row.items() if result["nats"] == least}
            size = next(iter(row.values()))
            truth = "" if size["truth"] is None else f"{size['truth']:.3f}"
            label = f"{table}, {size['rows']} x {size['columns']}"
            yield [label, *(told.get(name, "") for name in CONTENDERS), truth]

    header = ("nats after a minute, training rows x columns", *CONTENDERS, "the truth")

    def brief(self, results: Results) -> str:
        return self.table(results)


BENCHMARK = Angles()
