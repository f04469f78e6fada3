"""Run the benchmarks and write tables, or print those of all results.

    make bench                 90 minutes on two cores, without those that stand on their own
    make bench ONLY=overhead   one of them
    make bench FRESH=1         measure again what is already in the results file

    python -m benchmarks --show overhead   print all tables of one, or of all


Each case runs in a separate process, and its result is saved at once.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import BENCHMARKS, ON_ITS_OWN, load
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.machine import ROOT, code

RESULTS, OUT = ROOT / "benchmarks" / "results", ROOT / "out"
console = Console()


def worker(*arguments: str, log: Path | None = None) -> subprocess.Popen:
    output = log.open("a") if log else None
    command = [sys.executable, "-m", "benchmarks.harness.worker", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def describe_machine() -> dict[str, Any]:
    """In a separate process, so that this one does not take the accelerator's memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        if worker("machine", str(file)).wait():
            sys.exit("the machine could not be described; see the message above")
        return json.loads(file.read_text())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"benchmarks": {}}


def save(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Exits if another run writes to this folder: each would lose what the other measures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another run writes to {path.parent}. Wait for it.")
        yield
    finally:
        os.close(folder)


def measure(
    name: str,
    case: str,
    seconds: float,
    limit: float,
    tell: Callable[[str], Any],
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """The result of a case. A contender that ends the process is left out of the next try.

    Raises:
        KeyboardInterrupt: soon after another thread has set `stop`.
    """
    OUT.mkdir(exist_ok=True)
    log, stop = OUT / "bench.log", stop or threading.Event()
    skip: dict[str, str] = {}
    start = time.monotonic()
    while True:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.jsonl"
            report.touch()
            options = json.dumps({"skip": skip, "seconds": seconds})
            process = worker(name, case, str(report), options, log=log)
            began = time.monotonic()
            try:
                while process.poll() is None and not stop.is_set():
                    time.sleep(0.2)
                    tell(last_announced(report))
                    if time.monotonic() - began > limit + seconds:
                        process.kill()
            finally:
                process.kill()
            if stop.is_set():
                raise KeyboardInterrupt
            lines = [json.loads(line) for line in report.read_text().splitlines()]
        if lines and "result" in lines[-1]:
            return {**lines[-1]["result"], "seconds": round(time.monotonic() - start)}
        culprit, late = (
            lines[-1]["next"] if lines else "",
            time.monotonic() - began > limit + seconds,
        )
        what = "took too long" if late else "ended the process"
        reason = f"{what}, exit status {process.returncode}"
        if not culprit or culprit in skip:
            return {"crashed": f"{culprit or 'start'}: {reason}; see {log}"}
        skip[culprit] = reason


class Job(NamedTuple):
    name: str
    benchmark: Benchmark
    case: str


def last_announced(report: Path) -> str:
    lines = report.read_text().splitlines()
    return json.loads(lines[-1]).get("next", "") if lines else ""


def run(
    names: Sequence[str],
    results: dict[str, Any],
    keep: Callable[[dict[str, Any]], None],
    fresh: bool = False,
    seconds: float | None = None,
    match: str = "",
) -> None:
    """Measure the cases that `results` do not have; `keep` them after each.

    Args:
        results: `machine`, and `benchmarks`, the results by benchmark and case.
        fresh: measure these cases again.
        seconds: in place of those of the benchmarks.
        match: the name of the case to measure, or a part of those of several.
    """
    machine, found = results["machine"], results["benchmarks"]
    cases = [Job(name, load(name), case) for name in names for case in load(name).cases]
    jobs = [job for job in cases if match == job.case] or [
        job for job in cases if match in job.case
    ]
    if not jobs:
        sys.exit(f"no case contains {match!r}. There are {', '.join(job.case for job in cases)}.")
    for job in jobs if fresh else ():
        found.get(job.name, {}).pop(job.case, None)
        if found.get(job.name) == {}:
            del found[job.name]
    given = lambda benchmark: benchmark.seconds if seconds is None else seconds

    def left(job: Job) -> bool:
        result = found.get(job.name, {}).get(job.case)
        return result is None or not job.benchmark.complete(result, given(job.benchmark))

    todo = [job for job in jobs if left(job)]
    keep(results)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task, stop = progress.add_task("", total=len(todo)), threading.Event()

        def result_of(job: Job) -> dict[str, Any]:
            name, own, case = job
            tell = lambda peer: progress.update(task, description=f"{name}, {case}: {peer}")
            begun = code()  # what the process imports; a commit may come before it ends
            return measure(name, case, given(own), own.limit, tell, stop) | {"code": begun}

        def done(job: Job, result: dict[str, Any]) -> None:
            all_of_it = found.get(job.name, {}) | {job.case: result}
            in_order = [case for case in job.benchmark.cases if case in all_of_it]
            found[job.name] = {case: all_of_it[case] for case in in_order}
            keep(results)
            for peer, reason in {"": result.get("crashed"), **result.get("failed", {})}.items():
                if reason:
                    console.print(f"[red]{job.name}, {job.case}: {peer} {reason}", highlight=False)
            progress.advance(task)

        pool = ThreadPoolExecutor(machine["cores"])
        try:
            futures = {pool.submit(result_of, j): j for j in todo if not j.benchmark.timed}
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        for job in todo:
            if job.benchmark.timed:
                done(job, result_of(job))


def finish(measured: Callable[[argparse.Namespace], int], given: argparse.Namespace) -> int:
    """The exit status of a run, which may be interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no worker behind
    try:
        return measured(given)
    except KeyboardInterrupt:
        console.print("\nstopped; the same command continues with the next case")
        return 130


def parser_of(text: str | None) -> argparse.ArgumentParser:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=raw)
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    return parser


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("only", nargs="*", help="names of benchmarks")
    parser.add_argument("--match", default="", help="a case, or a part of the names of several")
    parser.add_argument("--seconds", type=float, help="of timing, for one case")
    parser.add_argument("--show", action="store_true", help="measure nothing, print all tables")
    given, known = parser.parse_args(), (*BENCHMARKS, *ON_ITS_OWN)
    unknown = sorted(set(given.only) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}. There are {', '.join(known)}.")
    return shown(given.only) if given.show else finish(measured, given)


def shown(names: Collection[str]) -> int:
    from benchmarks.harness import report

    for results in report.read(RESULTS):
        for part in report.sections(results, names):
            print(part, end="\n\n")
    return 0


def measured(given: argparse.Namespace) -> int:
    machine = describe_machine()
    path = RESULTS / f"{machine['name']}.json"
    with alone(path):
        results = read(path) | {"machine": machine}
        names = given.only or BENCHMARKS
        run(names, results, partial(save, path), given.fresh, given.seconds, given.match)
    from benchmarks.harness import report

    report.write(RESULTS, ROOT)
    console.print(f"Written: {path}, RESULTS.md, the README's tables, pictures of the docs")
    console.print(f"To see all: python -m benchmarks --show {' '.join(given.only)}")
    return 0
