"""Held-out nats of density estimators on tables, after 20 and 60 seconds of training.

    make tables                                    hours; interrupt and continue as you like
    python -m benchmarks tables --match "magic:"   one table

Cases run side by side, each bound to one core. The tables, how their columns are chosen and split:
`table_data.py`. The contenders and their settings, the same for all tables: `estimators.py`.
Compilation and the validation rows that stop and choose are in the seconds, imports are not. A
score is that of the parameters which are best on the validation rows, in mean nats of a
standardized test row. A contender whose course depends on its time is trained once for each time,
and ends a little later than asked; any other is trained once, and may be as late.
"""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.table_data import TABLES, Table, prepare
from benchmarks.peers.estimators import AT_ONCE, CONTENDERS

TIMES = (20.0, 60.0)  # seconds of training
LATE = 1.03  # the most that a candidate may be late, as a ratio
SEED = 0
MARKERS = "os^vDP*Xd"


def scores(contender: str, table: Table, times: Sequence[float]) -> dict[str, Any]:
    """Of the best candidate of one training after each of these times."""
    best: dict[float, tuple[float, float, Callable[[], float]]] = {}
    training = CONTENDERS[contender](table, SEED, times[-1])  # imports its library
    clock, late = 0.0, math.inf if contender in AT_ONCE else LATE
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
        os.sched_setaffinity(0, {core})
        return


def ranks(row: dict[str, float]) -> dict[str, int]:
    """Of each contender on a table, the best 1."""
    return {name: 1 + sum(other < score for other in row.values()) for name, score in row.items()}


class Tables(Benchmark):
    title = "Densities of tables"
    timed = False  # each case has a core
    seconds = TIMES[-1]
    cases = {
        f"{table}: {contender}, seed {SEED}": (table, contender)
        for table in TABLES
        for contender in CONTENDERS
    }

    def run(self, case: str, bench: Bench) -> Result:
        name, contender = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        own_core()
        bench.announce(contender)
        table = prepare(TABLES[name]())
        found: dict[str, Any] = {}
        for part in [[end] for end in TIMES] if contender in AT_ONCE else [TIMES]:
            found |= scores(contender, table, part)
        rows, columns = table.train.shape
        return {"rows": rows, "columns": columns, "scores": found}

    def nats(self, results: Results, end: float) -> dict[str, dict[str, float]]:
        """After this time, by table and contender; infinite if there is no finite score."""
        found: dict[str, dict[str, float]] = {}
        for case, result in results.items():
            table, contender = self.cases[case]
            label = f"{table}, {result['rows']} x {result['columns']}"
            nats = result["scores"].get(f"{end:g}", {}).get("nats", math.inf)
            found.setdefault(label, {})[contender] = nats if math.isfinite(nats) else math.inf
        return found

    def table(self, results: Results) -> str:
        tables = [self.after(results, end) for end in reversed(TIMES)]
        return "\n\n".join([self.ranking(results), *tables, self.below(results)])

    def after(self, results: Results, end: float) -> str:
        """The nats of each table after this time, the best in bold."""
        rows = []
        for label, row in self.nats(results, end).items():
            least = min(row.values())
            told = {name: f"{score:.3f}" for name, score in row.items()}
            told |= {name: f"**{told[name]}**" for name, score in row.items() if score == least}
            told |= {name: "none in time" for name, score in row.items() if score == math.inf}
            rows.append([label, *(told.get(name, "") for name in CONTENDERS)])
        header = [f"nats after {end:g} s, training rows x columns", *CONTENDERS]
        return show.markdown(header, rows)

    def below(self, results: Results) -> str:
        delays = [
            score["seconds"] / float(end) - 1
            for case, result in results.items()
            if self.cases[case][1] in AT_ONCE
            for end, score in result["scores"].items()
        ]
        late = f"; {' and '.join(AT_ONCE)} at most {max(0, *delays):.0%} late" if delays else ""
        return f"Seed {SEED}{late}."

    def draw(self, results: Results) -> Figure:
        """How far each contender is from the best of each table."""
        styles = show.styles(CONTENDERS)
        found = {end: self.nats(results, end) for end in TIMES}
        labels = list(dict.fromkeys(label for end in reversed(TIMES) for label in found[end]))
        figure = Figure((4.6 * len(TIMES) + 1, 1.4 + 0.3 * len(labels)), layout="constrained")
        axes = figure.subplots(1, len(TIMES), squeeze=False, sharey=True)
        for axis, end in zip(axes.flat, TIMES, strict=True):
            for name, marker in zip(CONTENDERS, MARKERS, strict=True):
                points = [
                    (row[name] - min(row.values()), labels.index(label))
                    for label, row in found[end].items()
                    if math.isfinite(row.get(name, math.inf))
                ]
                if points:
                    style = {"color": styles[name]["color"], "ms": 5, "label": name}
                    axis.plot(*zip(*points, strict=True), marker, **style)
            axis.set_xscale("symlog", linthresh=0.1)
            axis.set(title=f"after {end:g} s", xlabel="nats above the best")
            axis.set_yticks(range(len(labels)), labels)
        axes.flat[0].invert_yaxis()
        return figure

    def ranking(self, results: Results) -> str:
        """How often each is the best, and its mean rank, after the longest time.

        On the tables that have the most contenders: no one is the best of one.
        """
        placed = [ranks(row) for row in self.nats(results, TIMES[-1]).values()]
        placed = [row for row in placed if len(row) == max(map(len, placed))]
        parts = []
        for name in CONTENDERS:
            own = [row[name] for row in placed if name in row]
            if own:
                parts.append((np.mean(own), f"{name} {own.count(1)} ({np.mean(own):.1f})"))
        told = ", ".join(text for _, text in sorted(parts))
        return f"Best after {TIMES[-1]:g} s, of {len(placed)} tables (mean rank): {told}."


BENCHMARK = Tables()
