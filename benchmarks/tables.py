"""Held-out nats of density estimators on tables, after 20 and 60 seconds of training.

    make tables                                     hours; interrupt and continue as you like
    python -m benchmarks tables --seconds 300       with a column for five minutes, too

Cases run side by side, each bound to one core. The tables, how their columns are chosen and split:
`table_data.py`. The contenders and their settings, one for all tables: `estimators.py`. Compilation
and the validation rows that stop and choose are in the seconds, imports are not. A score is that of
the parameters which are best on the validation rows, in mean nats of a standardized test row. A
contender whose course depends on its time is trained once for each time, and ends a little later
than asked; any other is trained once, and may be as late. One seed comes after the other: an
interrupted run has the first of them, for all.
"""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import report
from benchmarks.estimators import AT_ONCE, CONTENDERS
from benchmarks.fairness import Bench
from benchmarks.table_data import TABLES, Table, prepare

TITLE = "Densities of tables"
TIMED = False  # cases run side by side, each on one core
SECONDS = 60.0
TIMES = (20.0, 60.0, 300.0)  # seconds of training, up to those of the run
LATE = 1.03  # the most that a candidate may be late, as a ratio
SEEDS = (0, 1, 2)
MARKERS = "os^vDP*Xd"
CASES: dict[str, tuple[str, str, int]] = {
    f"{table}: {name}, seed {seed}": (table, name, seed)
    for seed in SEEDS
    for table in TABLES
    for name in CONTENDERS
}


def scores(contender: str, table: Table, seed: int, times: list[float]) -> dict[str, Any]:
    """Of the best candidate of one training after each of these times."""
    best: dict[float, tuple[float, float, Callable[[], float]]] = {}
    training = CONTENDERS[contender](table, seed, times[-1])  # imports its library
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


def run(case: str, bench: Bench) -> dict[str, Any]:
    name, contender, seed = CASES[case]
    if contender in bench.skip:
        return {"crashed": f"{contender}: {bench.skip[contender]}"}
    own_core()
    bench.announce(contender)
    table = prepare(TABLES[name]())
    times = [*(end for end in TIMES if end < bench.seconds), bench.seconds]
    found: dict[str, Any] = {}
    for part in [[end] for end in times] if contender in AT_ONCE else [times]:
        found |= scores(contender, table, seed, part)
    return {"rows": len(table.train), "columns": table.train.shape[1], "scores": found}


def times_of(cases: dict[str, Any]) -> list[str]:
    """The longest first."""
    found = {end for result in cases.values() for end in result["scores"]}
    return sorted(found, key=float, reverse=True)


def nats(cases: dict[str, Any], end: str) -> dict[str, dict[str, float]]:
    """By table and contender, the mean over the seeds; infinite if a seed has no finite score."""
    found: dict[str, dict[str, list[float]]] = {}
    for case, result in cases.items():
        name, contender, _ = CASES[case]
        label = f"{name}, {result['rows']} x {result['columns']}"
        score = result["scores"].get(end, {}).get("nats", math.inf)
        found.setdefault(label, {}).setdefault(contender, []).append(score)
    mean = lambda scores: float(np.mean(np.where(np.isfinite(scores), scores, math.inf)))
    return {label: {c: mean(s) for c, s in row.items()} for label, row in found.items()}


def ranks(row: dict[str, float]) -> dict[str, int]:
    """Of each contender on a table, the best 1."""
    return {name: 1 + sum(other < score for other in row.values()) for name, score in row.items()}


def table(cases: dict[str, Any]) -> str:
    parts = [after(cases, end) for end in times_of(cases)]
    return "\n\n".join([*parts, seeds_and_delay(cases)])


def after(cases: dict[str, Any], end: str) -> str:
    """The nats of each table after this time, the best in bold."""
    rows = []
    for label, row in nats(cases, end).items():
        best = min(row.values())
        told = {name: f"{score:.3f}" for name, score in row.items()}
        told |= {name: f"**{told[name]}**" for name, score in row.items() if score == best}
        told |= {name: "none in time" for name, score in row.items() if score == math.inf}
        rows.append([label, *(told.get(name, "") for name in CONTENDERS)])
    header = [f"nats after {end} s, training rows x columns", *CONTENDERS]
    return report.markdown(header, rows)


def seeds_and_delay(cases: dict[str, Any]) -> str:
    seeds = sorted({CASES[case][2] for case in cases})
    delays = [
        score["seconds"] / float(end) - 1
        for case, result in cases.items()
        if CASES[case][1] in AT_ONCE
        for end, score in result["scores"].items()
    ]
    told = "Seed" if len(seeds) == 1 else "Means over those that are there of seeds"
    late = f"; {' and '.join(AT_ONCE)} at most {max(0, *delays):.0%} late" if delays else ""
    return f"{told} {', '.join(map(str, seeds))}{late}."


def draw(cases: dict[str, Any], path: str) -> None:
    """How far each contender is from the best of each table."""
    times, styles = times_of(cases), report.styles(CONTENDERS)
    labels = list(nats(cases, times[0]))
    size = (4.6 * len(times) + 1, 1.4 + 0.3 * len(labels))
    figure, axes = plt.subplots(
        1, len(times), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    handles = {}
    for axis, end in zip(axes.flat, reversed(times), strict=True):
        found = nats(cases, end)
        for name, marker in zip(CONTENDERS, MARKERS, strict=True):
            points = [
                (found[label][name] - min(found[label].values()), place)
                for place, label in enumerate(labels)
                if math.isfinite(found.get(label, {}).get(name, math.inf))
            ]
            if points:
                color = styles[name]["color"]
                (handles[name],) = axis.plot(*zip(*points, strict=True), marker, color=color, ms=5)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set(title=f"after {end} s", xlabel="nats above the best")
        axis.set_yticks(range(len(labels)), labels)
    axes.flat[0].invert_yaxis()
    report.finish(figure, axes, TITLE, path, handles)


def sentence(cases: dict[str, Any]) -> str:
    """How often each is the best, and its mean rank, after the longest time."""
    end = times_of(cases)[0]
    placed = [ranks(row) for row in nats(cases, end).values()]
    parts = []
    for name in CONTENDERS:
        own = [row[name] for row in placed if name in row]
        if own:
            parts.append((np.mean(own), f"{name} {own.count(1)} ({np.mean(own):.1f})"))
    told = ", ".join(text for _, text in sorted(parts))
    return f"Best after {end} s, of {len(placed)} tables (mean rank): {told}."
