"""Plants faults in jaxode, one after the other, and shows which test finds each first.

    python tests/project/mutations.py --results mutations.jsonl

Run it before and after you rewrite tests: the new ones must find at least as many. A fault that no
test finds is a hole. It works on a copy of the tracked files and takes about half an hour, longer
where no near test finds a fault. With `--results` it goes on where it was interrupted. The table is
in `mutation_table.py`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from mutation_table import FIRST, MUTATIONS

PYTEST = ["-m", "pytest", "-x", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
HERE = Path(__file__).parents[2]


class Outcome(NamedTuple):
    key: tuple[str, ...]
    """A fault, `(file, old, new)`; or tests, which pass without one."""
    by: str
    """The first test that fails, or nothing."""
    seconds: float

    def __str__(self):
        file, old, new = (" ".join(text.split())[:70] for text in self.key)
        return f"{file}: {old} -> {new}\n    {self.by or 'SURVIVES'} ({self.seconds:.0f} s)"


def applies(tree: Path, file: str, old: str, new: str) -> bool:
    """Whether a row applies to a tree. Says so if not."""
    path = tree / "jaxode" / file
    text = path.read_text() if path.exists() else ""
    if text.count(old) != 1:
        print(f"does not apply: {file} has {text.count(old)} times {old!r}", flush=True)
        return False
    compile(text.replace(old, new), file, "exec")
    return True


class Runner:
    """Runs tests of a copy. Outcomes are kept in a file, and found there."""

    def __init__(self, copy: Path, cache: str, results: TextIO, slow: bool = False):
        # Bytecode goes by the time and the size of a file, which a fault may not change.
        own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "JAXODE_TEST_CACHE": cache}
        self.copy, self.env, self.results = copy, os.environ | own, results
        self.command = [sys.executable, *PYTEST, *([] if slow else ["-m", "not slow"])]
        results.seek(0)
        kept = (Outcome(tuple(key), *rest) for key, *rest in map(json.loads, results))
        self.known = {outcome.key: outcome for outcome in kept}

    def keep(self, outcome: Outcome) -> Outcome:
        self.known[outcome.key] = outcome
        print(json.dumps(outcome), file=self.results, flush=True)
        return outcome

    def first_failure(self, tests: tuple[str, ...], ignored=(), limit: float | None = None) -> str:
        process = subprocess.Popen(
            [*self.command, *tests, *(f"--ignore={path}" for path in ignored)], cwd=self.copy,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True,
            env=self.env,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"no end after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
                process.wait()
        if process.returncode in (0, 5):  # passed, or there is none
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", output, re.MULTILINE)
        return failed[1] if failed else output.strip().rpartition("\n")[2]

    def limit(self, tests: tuple[str, ...]) -> float:
        """Seconds for tests with a fault, which compile more. Without one, they must pass."""
        if tests not in self.known:
            begin = time.perf_counter()
            if failed := self.first_failure(tests):
                sys.exit(f"Without a fault, this fails: {failed}")
            self.keep(Outcome(tests, "", time.perf_counter() - begin))
        return 600 + 5 * self.known[tests].seconds

    def plant(self, row: tuple[str, str, str], tests: tuple[str, ...]) -> Outcome:
        """Run the tests, or those where to look, until one finds the fault."""
        file, old, new = row
        looks = sorted(filter(file.startswith, FIRST), key=len, reverse=True)
        there = lambda look: tuple(path for path in FIRST[look] if (self.copy / path).exists())
        path, by, seconds, ran = self.copy / "jaxode" / file, "", 0.0, ()
        text = path.read_text()
        for some in [tests] if tests else filter(None, map(there, looks)):
            limit, begin = self.limit(some), time.perf_counter()
            path.write_text(text.replace(old, new))
            try:
                by = self.first_failure(some, ran, limit)
            finally:
                path.write_text(text)
            seconds, ran = seconds + time.perf_counter() - begin, (*ran, *some)
            if by:
                break
        return self.keep(Outcome(row, by, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults, and see which test finds each.")
    parser.add_argument("--tree", type=Path, default=HERE, help="the repository; this by default")
    parser.add_argument("--only", default="", help="rows of files of jaxode/ that start with this")
    parser.add_argument("--tests", nargs="+", default=(), help="run these alone")
    parser.add_argument("--slow", action="store_true", help="run slow tests, too")
    parser.add_argument("--results", help="a file of JSON lines, to go on from")
    parser.add_argument(
        "--check", action="store_true", help="plant nothing, see whether rows apply"
    )
    args = parser.parse_args()
    chosen = [row for row in MUTATIONS if row[0].startswith(args.only)]
    if not chosen:
        sys.exit(f"no row has a file that starts with {args.only!r}")
    rows = [row for row in chosen if applies(args.tree, *row)]
    if args.check:
        sys.exit(len(rows) < len(chosen))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and clean up
    cache = os.environ.get("JAXODE_TEST_CACHE", str(args.tree.resolve() / ".jax_cache"))
    folders: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as at, open(args.results or os.devnull, "a+") as results:
        copy = Path(at)
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=args.tree, text=True)
        for name in filter(lambda name: (args.tree / name).is_file(), names.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(args.tree / name, copy / name)
        runner = Runner(copy, cache, results, args.slow)
        for row in rows:
            outcome = runner.known.get(row) or runner.plant(row, tuple(args.tests))
            folders.setdefault(str(Path("jaxode", row[0]).parent), []).append(outcome)
            print(outcome, flush=True)
    for folder, outcomes in folders.items():
        print(f"{folder:25} {sum(bool(each.by) for each in outcomes):2} of {len(outcomes):2} found")
    print(*(each for some in folders.values() for each in some if not each.by), sep="\n")


if __name__ == "__main__":
    main()
