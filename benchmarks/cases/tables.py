"""Held-out nats of density estimators on tables, after 20, 60 and 300 seconds of training.

    make tables                                    days; interrupt and continue as you like
    python -m benchmarks tables --seconds 60       without a column for five minutes
    python -m benchmarks tables --match "magic:"   one table

Cases run side by side, each bound to one core. The tables, how their columns are chosen and split:
`table_data.py`. The contenders and their settings, three for each that has a choice, the same for
all tables: `estimators.py`. Compilation and the validation rows that stop and choose are in the
seconds of all contenders, imports are not; `fit`, whose own seconds are of training alone, gets a
clock that counts all. A score is that of the parameters which are best on the
validation rows, in mean nats of a standardized test row. A contender whose course depends on its
time is trained once for each time, and ends a little later than asked; any other is trained once,
and may be 3% late.

The documented settings come first, seed after seed, then the others: an interrupted run has the
first of them, for all. A case that was measured for less time is shown until it is measured again.
"""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.table_data import TABLES, Table, prepare
from benchmarks.peers.estimators import AT_ONCE, CONTENDERS, Contender

TIMES = (20.0, 60.0, 300.0)  # seconds of training, up to those of the run
FEW_ROWS = "jaxode, five networks"  # measured on tables with few rows
LATE = 1.03  # the most that a candidate may be late, as a ratio
SEEDS = (0, 1, 2)


class Case(NamedTuple):
    table: str
    contender: str
    setting: str
    """Empty for the documented one."""
    seed: int

    @property
    def name(self) -> str:
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.table}: {self.contender}{setting}, seed {self.seed}"


def all_cases() -> list[Case]:
    settings = {name: list(contender.settings) for name, contender in CONTENDERS.items()}
    return [
        Case(table, name, settings[name][place], seed)
        for place in range(3)
        for seed in SEEDS
        for table in TABLES
        for name in CONTENDERS
        if place < len(settings[name])
    ]


def scores(contender: Contender, case: Case, table: Table, times: list[float]) -> dict[str, Any]:
    """Of the best candidate of one training after each of these times."""
    best: dict[float, tuple[float, float, Callable[[], float]]] = {}
    train, settings = contender
    # Imports its library.
    training = train(table, case.seed, times[-1], **settings[case.setting])
    clock, late = 0.0, math.inf if case.contender in AT_ONCE else LATE
    while clock < times[-1]:
        start = time.perf_counter()
        candidate = next(training, None)
        clock += time.perf_counter() - start
        if candidate is None:
            break
        for end in times:
            least, *_ = best.get(end, (math.inf,))
            if clock <= late * end and candidate.validation < least:
                best[end] = candidate.validation, clock, candidate.test
    return {
        f"{end:g}": {"nats": test(), "validation": nats, "seconds": round(seconds, 2)}
        for end, (nats, seconds, test) in best.items()
    }


def own_core() -> None:
    """Bind this process to a core that no other case has, before its libraries count cores."""
    if not hasattr(os, "sched_setaffinity"):
        return
    for core in sorted(os.sched_getaffinity(0)):
        lock = os.open(Path(tempfile.gettempdir()) / f"jaxode-core-{core}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
        except BlockingIOError:
            os.close(lock)
            continue
        for thread in os.listdir("/proc/self/task"):  # libraries have started some
            os.sched_setaffinity(int(thread), {core})
        return


def asked(result: Result) -> list[str]:
    """The times at which there was a look; files of before have no more than their scores."""
    return result.get("times", ["20", "60"])


def times_of(results: Results) -> list[str]:
    """The longest first."""
    found = {end for result in results.values() for end in asked(result)}
    return sorted(found, key=float, reverse=True)


def ranks(row: dict[str, float]) -> dict[str, int]:
    """Of each contender on a table, the best 1."""
    return {name: 1 + sum(other < score for other in row.values()) for name, score in row.items()}


Scores = dict[str, dict[int, dict[str, Any]]]
"""Of a table, by contender and seed."""


def medians(row: Scores) -> dict[str, float]:
    """By contender, over the seeds; infinite if most have no finite score."""
    nats = lambda score: score["nats"] if math.isfinite(score.get("nats", math.nan)) else math.inf
    return {name: float(np.median([nats(s) for s in by.values()])) for name, by in row.items()}


def spreads(row: Scores) -> dict[str, str]:
    """By contender, half of the range over the seeds, as it stands behind a median."""
    found = {}
    for name, by in row.items():
        nats = [
            score["nats"] for score in by.values() if math.isfinite(score.get("nats", math.nan))
        ]
        found[name] = f" ± {(max(nats) - min(nats)) / 2:.2f}" if len(nats) > 1 else ""
    return found


class Tables(Benchmark):
    title = "Densities of tables"
    timed = False  # each case has a core
    seconds = 300.0
    cases = {case.name: case for case in all_cases()}

    def complete(self, result: Result, seconds: float) -> bool:
        return max(map(float, asked(result))) >= seconds

    def run(self, case: str, bench: Bench) -> Result:
        chosen: Case = self.cases[case]
        if chosen.contender in bench.skip:
            return {"crashed": f"{chosen.contender}: {bench.skip[chosen.contender]}"}
        own_core()
        bench.announce(chosen.contender)
        table = prepare(TABLES[chosen.table]())
        times = [*(end for end in TIMES if end < bench.seconds), bench.seconds]
        found: dict[str, Any] = {}
        for part in [[end] for end in times] if chosen.contender in AT_ONCE else [times]:
            jax.clear_caches()  # each training compiles its programs
            found |= scores(CONTENDERS[chosen.contender], chosen, table, part)
        rows, columns = table.train.shape
        looks = [f"{end:g}" for end in times]
        return {"rows": rows, "columns": columns, "times": looks, "scores": found}

    def scores_at(self, results: Results, end: str, best: bool = False) -> dict[str, Scores]:
        """By table: the scores of the documented settings after this time, or the best of three.

        The best is chosen by the validation rows, for each seed; seeds of which any contender
        lacks a setting are left out, and tables of which no seed is left.
        """
        found: dict[str, dict[tuple[str, int], dict[str, dict[str, Any]]]] = {}
        for case, result in results.items():
            table, contender, setting, seed = self.cases[case]
            if end in asked(result) and (best or not setting):
                label = f"{table}, {result['rows']} x {result['columns']}"
                settings = found.setdefault(label, {}).setdefault((contender, seed), {})
                settings[setting] = result["scores"].get(end, {})
        validation = lambda score: score.get("validation", math.inf)
        rows: dict[str, Scores] = {}
        for label, by_seed in found.items():
            for (contender, seed), settings in by_seed.items():
                if not best or len(settings) == len(CONTENDERS[contender].settings):
                    chosen = min(settings.values(), key=validation)
                    rows.setdefault(label, {}).setdefault(contender, {})[seed] = chosen
        if best:  # of the same seeds for all
            for label, row in rows.items():
                seeds = set.intersection(*map(set, row.values()))
                rows[label] = {name: {s: by[s] for s in seeds} for name, by in row.items() if seeds}
        there = {label: {name for name, _ in by_seed} for label, by_seed in found.items()}
        return {label: row for label, row in rows.items() if set(row) == there[label]}

    def table(self, results: Results) -> str:
        times = times_of(results)
        parts = [f(results, end) for f in (self.ranking, self.after) for end in times]
        parts.append(self.below(results, times))
        if found := [end for end in times if self.scores_at(results, end, best=True)]:
            parts += ["The best of three settings by the validation rows, where all were measured:"]
            parts += [self.after(results, end, best=True) for end in found]
        return "\n\n".join(parts)

    def brief(self, results: Results) -> str:
        times = times_of(results)
        after = "60" if "60" in times else times[0]
        ranks = [self.ranking(results, end) for end in times]
        if self.scores_at(results, after, best=True):
            ranks.append(self.ranking(results, after, best=True))
        told = "\n".join(f"- {ranking}" for ranking in ranks)
        note = f". {self.below(results, [after])}"
        return f"{told}\n\n{self.after(results, after, note=note)}"

    def after(self, results: Results, end: str, best: bool = False, note: str = "") -> str:
        """The nats of each table after this time, the best in bold."""
        rows = []
        for label, scores in self.scores_at(results, end, best).items():
            row = medians(scores)
            least = min(row.values())
            told = {name: f"{score:.3f}" for name, score in row.items()}
            told |= {name: f"**{told[name]}**" for name, score in row.items() if score == least}
            told = {name: text + spreads(scores)[name] for name, text in told.items()}
            told |= {name: "none in time" for name, score in row.items() if score == math.inf}
            counts = sorted({len(by_seed) for by_seed in scores.values()})
            seeds = f", {' to '.join(map(str, counts))} seeds" if counts != [1] else ""
            rows.append([label + seeds, *(told.get(name, "") for name in CONTENDERS)])
        header = [f"nats after {end} s, training rows x columns{note}", *CONTENDERS]
        return show.markdown(header, rows)

    def below(self, results: Results, ends: Sequence[str]) -> str:
        seeds = sorted({self.cases[case].seed for case in results})
        delays = [
            score["seconds"] / float(end) - 1
            for case, result in results.items()
            if self.cases[case].contender in AT_ONCE
            for end, score in result["scores"].items()
            if end in ends
        ]
        told = (
            "Medians over seeds ± half of their range, as many as a row names, or one:"
            if len(seeds) > 1
            else "Seed"
        )
        late = f"; {' and '.join(AT_ONCE)} at most {max(0, *delays):.0%} late" if delays else ""
        return f"{told} {', '.join(map(str, seeds))}{late}."

    def ranking(self, results: Results, end: str, best: bool = False) -> str:
        """How often each is the best after this time, and its mean rank.

        On the tables that have the most contenders: no one is the best of one. Without the one for
        few rows.
        """
        ranked = lambda row: {name: each for name, each in row.items() if name != FEW_ROWS}
        rows = map(ranked, self.scores_at(results, end, best).values())
        placed = [ranks(medians(row)) for row in rows]
        placed = [row for row in placed if len(row) == max(map(len, placed))]
        parts = []
        for name in CONTENDERS:
            own = [row[name] for row in placed if name in row]
            if own:
                parts.append((np.mean(own), f"{name} {own.count(1)} ({np.mean(own):.1f})"))
        told = ", ".join(text for _, text in sorted(parts))
        count = f"{len(placed)} table{'s' if len(placed) != 1 else ''}"
        start = "With the best of three settings, best" if best else "Best"
        return f"{start} after {end} s, of {count} (mean rank): {told}."


BENCHMARK = Tables()
