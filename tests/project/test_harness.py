"""What tests cost, which of them are slow, and which a change affects."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import changed
import costs
import pytest

ROOT = Path(__file__).parents[2]


def test_a_slow_test_has_its_reason_beside_its_mark():
    for path in (ROOT / "tests").rglob("test_*.py"):
        lines = ["", *path.read_text().splitlines()]
        for before, line in itertools.pairwise(lines):
            if re.search(r"mark\.slow\b|with_slow\(", line) and path != Path(__file__):
                assert "# " in line or before.lstrip().startswith("# "), f"{path}: {line}"


def test_each_file_that_may_compile_is_there():
    """`programs.tsv` has the row of no file that was renamed or removed."""
    assert [file for file in costs.allowed() if not (ROOT / file).exists()] == []


def test_a_file_that_compiles_more_than_its_row_allows_is_told(monkeypatch, tmp_path):
    table = tmp_path / "programs.tsv"
    table.write_text("file\tprograms\ntests/test_a.py\t3\n")
    monkeypatch.setattr(costs, "TABLE", table)
    meter = costs.Costs(None)
    for file, programs, slow in (("a", 4, False), ("a", 9, True), ("b", 50, False)):
        cost = [*costs.Cost(0.5, 0.2, programs, 1), slow]
        report = SimpleNamespace(
            when="teardown", nodeid=f"tests/test_{file}.py::test", user_properties=[("cost", cost)]
        )
        meter.pytest_runtest_logreport(report)
    assert meter.excess == ["tests/test_a.py compiled 4 programs; its row allows 3."]
    assert meter.lines()[1].split("\t") == ["1.5", "0.6", "63", "3", "all"]


# A file that changes, and a test file that the change affects, or does not.
AFFECTED = [
    ("jaxode/ode/loop/step_size.py", "tests/ode/test_odeint.py", True),
    ("jaxode/tabular/columns/dates.py", "tests/tabular/test_dates.py", True),
    ("jaxode/tabular/columns/dates.py", "tests/interop/test_sklearn.py", True),
    ("jaxode/tabular/columns/dates.py", "tests/ode/test_odeint.py", False),
    ("jaxode/estimation/search/slopes.py", "tests/petab/test_petab.py", True),
    ("jaxode/estimation/search/slopes.py", "tests/series/test_series.py", False),
    ("tests/problems.py", "tests/ode/test_stiff.py", True),
    ("examples/common/descent.py", "tests/project/test_examples.py", True),
]


@pytest.mark.parametrize(("file", "test", "is_affected"), AFFECTED)
def test_a_change_affects_the_tests_that_import_it(file, test, is_affected):
    assert (ROOT / file).exists()
    assert (ROOT / test).exists()
    items = [SimpleNamespace(nodeid=f"{test}::test")]
    assert changed.affected(items, {file}) == items * is_affected
    assert changed.affected(items, {"tests/conftest.py"}) == items


def test_a_page_is_affected_by_its_own_text():
    item = SimpleNamespace(
        nodeid="tests/project/test_docs.py::test_code_blocks_run[steady.md]",
        callspec=SimpleNamespace(params={"page": "steady.md"}),
    )
    for file in ("docs/steady.md", "tests/project/test_docs.py"):
        assert changed.affected([item], {file}) == [item]
    assert changed.affected([item], {"jaxode/ode/solve.py", "docs/start.md"}) == []
