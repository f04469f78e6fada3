"""Run the benchmarks and write tables and pictures.

    make bench                 all but time_to_nll, posterior and tables, 40 minutes on two cores
    make bench ONLY=overhead   one of them
    make bench FRESH=1         measure again what is already in the results file
    make bench-check           measure again and compare with the results file

A benchmark is a module of this package with `TITLE`, `CASES`, `run`, `table`, `draw` and
`sentence`. Each case runs in a separate process, and its result is saved at once. Cases of
benchmarks with `TIMED = False` run side by side, one on each core.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import BENCHMARKS, ON_ITS_OWN, compare

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SECONDS = 9.0  # of alternated calls in one case; a module may set its own SECONDS
LIMIT = 1200.0  # seconds beyond it, after which the contender at work counts as failed
console = Console()


def worker(*arguments: str, log: Path | None = None) -> subprocess.Popen:
    output = log.open("a") if log else None
    command = [sys.executable, "-m", "benchmarks.worker", *arguments]
    return subprocess.Popen(command, cwd=HERE.parent, stdout=output, stderr=output)


def describe_machine() -> dict[str, Any]:
    """In a separate process, so that this one does not take the accelerator's memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "machine.json"
        if worker("machine", str(file)).wait():
            sys.exit("the machine could not be described; see the message above")
        return json.loads(file.read_text())


def code() -> str:
    """The commit that is measured, so that a file with results of several says so."""
    git = ["git", "-C", str(HERE.parent)]
    head, changed = ["rev-parse", "--short", "HEAD"], ["diff", "HEAD", "--", "jaxode", "*.py"]
    try:
        commit, diff = (
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in (head, changed)
        )
    except FileNotFoundError:
        return ""
    return f"{commit} and changes" if diff else commit


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"benchmarks": {}}


def save(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def measure(
    module: str,
    case: str,
    seconds: float,
    log: Path,
    tell: Callable[[str], Any],
    limit: float = LIMIT,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """The result of a case. A contender that ends the process is left out of the next try.

    Raises:
        KeyboardInterrupt: soon after another thread has set `stop`.
    """
    stop = stop or threading.Event()
    skip: dict[str, str] = {}
    start = time.monotonic()
    while True:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.jsonl"
            report.touch()
            options = json.dumps({"skip": skip, "seconds": seconds})
            process = worker(module, case, str(report), options, log=log)
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
        culprit = lines[-1]["next"] if lines else ""
        reason = (
            "took too long" if time.monotonic() - began > limit + seconds else "ended the process"
        )
        reason = f"{reason}, exit status {process.returncode}"
        if not culprit or culprit in skip:
            return {"crashed": f"{culprit or 'start'}: {reason}; see {log}"}
        skip[culprit] = reason


class Case(NamedTuple):
    benchmark: str
    module: ModuleType
    name: str

    @property
    def label(self) -> str:
        return f"{self.benchmark}, {self.name}"

    @property
    def timed(self) -> bool:
        return getattr(self.module, "TIMED", True)


def last_announced(report: Path) -> str:
    lines = report.read_text().splitlines()
    return json.loads(lines[-1]).get("next", "") if lines else ""


def run(
    modules: list[str], path: Path, fresh: bool, seconds: float | None, log: Path
) -> dict[str, Any]:
    results = read(path)
    results["machine"] = describe_machine()
    loaded = {name: importlib.import_module(f"benchmarks.{name}") for name in modules}
    for name in modules if fresh else ():
        results["benchmarks"].pop(name, None)
    todo = [
        Case(name, module, case)
        for name, module in loaded.items()
        for case in module.CASES
        if case not in results["benchmarks"].get(name, {})
    ]
    save(path, results)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))

        def result_of(case: Case) -> dict[str, Any]:
            tell = lambda peer: progress.update(task, description=f"{case.label}: {peer}")
            given = seconds or getattr(case.module, "SECONDS", SECONDS)
            limit = getattr(case.module, "LIMIT", LIMIT)
            return measure(case.benchmark, case.name, given, log, tell, limit, stop)

        def keep(case: Case, result: dict[str, Any]) -> None:
            result |= {"code": code(), "device": results["machine"]["device"]}
            done = results["benchmarks"].get(case.benchmark, {}) | {case.name: result}
            in_order = {name: done[name] for name in case.module.CASES if name in done}
            results["benchmarks"][case.benchmark] = in_order
            save(path, results)
            for peer, reason in {"": result.get("crashed"), **result.get("failed", {})}.items():
                if reason:
                    console.print(f"[red]{case.label}: {peer} {reason}", highlight=False)
            progress.advance(task)

        stop, pool = threading.Event(), ThreadPoolExecutor(results["machine"]["cores"])
        try:
            futures = {pool.submit(result_of, case): case for case in todo if not case.timed}
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        for case in todo:
            if case.timed:
                keep(case, result_of(case))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="names of benchmarks")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, help="of timing, for one case")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder; RESULTS.md stays as it is for others"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no worker behind
    here = [name for name in BENCHMARKS + ON_ITS_OWN if (HERE / f"{name}.py").exists()]
    unknown = sorted(set(options.only) - set(here))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}. There are {', '.join(here)}.")
    modules = options.only or [name for name in here if name not in ON_ITS_OWN]
    out = HERE.parent / "out"
    out.mkdir(exist_ok=True)
    committed = options.results / f"{describe_machine()['name']}.json"
    path = out / "bench-check.json" if options.check else committed
    if options.check:
        modules = compare.with_ratios(read(committed), modules)
    results = run(modules, path, options.fresh or options.check, options.seconds, out / "bench.log")
    if options.check:
        return compare.check(read(committed), results, modules, console.print)
    if options.results.resolve() != RESULTS.resolve():
        console.print(f"Written: {committed}")
        return 0
    from benchmarks import report

    report.write(options.results, HERE.parent)
    console.print(f"Written: {committed}, RESULTS.md, docs/images/bench_*.png, the README's table")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("\nstopped; the same command continues with the next case")
        sys.exit(130)
