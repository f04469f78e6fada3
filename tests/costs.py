"""What each test file costs in CPU seconds and compiled programs, and how many it may compile.

Compiling takes most of the time of the tests, so a row of `programs.tsv` says how many programs
each file may compile in `make test`. A file that compiles more fails the run. Programs count on
any machine, seconds do not: no test asserts a time.

`--costs=FILE` writes the table of all files. `--programs=check` compares with the rows, and
`--programs=write` replaces those of the files that ran.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

TABLE = Path(__file__).with_name("programs.tsv")
SHOWN = 12  # files at the end of a run
# Single operations count, and whichever file is the first in a process compiles those of all. So a
# file without a row may compile this many programs, and a row allows for as many and a quarter.
COMMON = 50
ADVICE = (
    "Share a program: take a field, shapes and options that another test of the file has, test a "
    "message without compiling, or build a model without training it. If a new program is worth "
    "its second, raise the row of the file in tests/programs.tsv."
)


class Cost(NamedTuple):
    """The cost of a test, or of all tests of a file."""

    cpu: float = 0.0
    """Seconds of all threads of the process that ran it, with its fixtures."""
    compiling: float = 0.0
    """Seconds in which it traced, lowered and compiled, or read compiled programs."""
    programs: int = 0
    """Programs that were compiled or read from the cache, those of single operations included."""
    tests: int = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: "Cost") -> "Cost":
        return Cost(*(a - b for a, b in zip(self, other, strict=True)))


class Meter:
    """Listens to JAX. `watchers` get what it says of each program, in order."""

    def __init__(self):
        self.programs, self.compiling, self.watchers = 0, 0.0, []
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, seconds: float, **details) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += seconds
        if "backend_compile" in event:
            self.programs += 1
            for watcher in self.watchers:
                watcher.append(details)

    def read(self) -> Cost:
        return Cost(time.process_time(), self.compiling, self.programs)


METER = Meter()


def allowed() -> dict[str, int]:
    """The programs that each file may compile."""
    lines = TABLE.read_text().splitlines()[1:] if TABLE.exists() else []
    return {name: int(count) for name, count in (line.split("\t") for line in lines)}


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("costs of tests")
    group.addoption("--costs", metavar="FILE", help="write the cost of each file, as a table")
    group.addoption("--programs", choices=["check", "write"], help="compare with programs.tsv")


class Costs:
    """Measures tests where they run, and adds up and compares where results are gathered."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.of_file: dict[str, Cost] = {}
        self.counted: dict[str, int] = {}
        """Programs of tests that are not slow."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.before = METER.read()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "teardown":
            cost = METER.read().minus(self.before)._replace(tests=1)
            slow = item.get_closest_marker("slow") is not None
            report.user_properties.append(("cost", [*cost, slow]))
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":
            *cost, slow = dict(report.user_properties)["cost"]
            file, cost = report.nodeid.partition("::")[0], Cost(*cost)
            self.of_file[file] = self.of_file.get(file, Cost()).plus(cost)
            self.counted[file] = self.counted.get(file, 0) + (0 if slow else cost.programs)

    def pytest_collection_modifyitems(self, items):
        """Workers begin with the files that compile most, so that they end together."""
        if os.environ.get("PYTEST_XDIST_WORKER"):
            counts = allowed()
            file = lambda item: item.nodeid.partition("::")[0]
            items.sort(key=lambda item: (-counts.get(file(item), 0), file(item)))

    @property
    def excess(self) -> list[str]:
        """What is said of each file that compiled more than its row allows."""
        rows = allowed()
        return [
            f"{file} compiled {count} programs; its row allows {rows.get(file, COMMON)}."
            for file, count in self.counted.items()
            if count > rows.get(file, COMMON)
        ]

    def pytest_sessionfinish(self, session):
        if os.environ.get("PYTEST_XDIST_WORKER"):
            return
        if path := self.config.getoption("costs"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text("\n".join(self.lines()) + "\n")
        option = self.config.getoption("programs")
        if option == "write":
            rows = allowed() | {
                file: count * 5 // 4 + COMMON for file, count in self.counted.items() if count
            }
            kept = [f"{file}\t{rows[file]}" for file in sorted(rows) if Path(file).exists()]
            TABLE.write_text("\n".join(["file\tprograms", *kept]) + "\n")
        if option == "check" and self.excess and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def lines(self) -> list[str]:
        """A table of all files, the dearest first."""
        total = Cost()
        for cost in self.of_file.values():
            total = total.plus(cost)
        dearest = sorted(self.of_file.items(), key=lambda row: -row[1].cpu)
        return ["CPU s\tcompiling s\tprograms\ttests\tfile"] + [
            f"{cost.cpu:.1f}\t{cost.compiling:.1f}\t{cost.programs}\t{cost.tests}\t{file}"
            for file, cost in [("all", total), *dearest]
        ]

    def pytest_terminal_summary(self, terminalreporter):
        if len(self.of_file) > 1:
            terminalreporter.section("files that cost most")
            for line in self.lines()[: SHOWN + 2]:
                terminalreporter.line(line.expandtabs(14))
        if self.config.getoption("programs") == "check" and self.excess:
            terminalreporter.section("more programs than allowed")
            for line in [*self.excess, ADVICE]:
                terminalreporter.line(line)
