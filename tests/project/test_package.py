"""What importing the package gives and costs."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import changed
import costs
import pytest
from helpers import REQUIRED

import jaxode

ROOT = Path(__file__).parents[2]


def test_all_lists_the_public_names_and_each_has_a_docstring():
    public = {name for name in vars(jaxode) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(jaxode, name))}
    namespaces = (
        "calibration coupling divergence images interop nn petab plot regularizers series "
        "standardize tabular"
    )
    assert public - modules | set(namespaces.split()) == set(jaxode.__all__)
    assert [name for name in jaxode.__all__ if not getattr(jaxode, name).__doc__] == []


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {jaxode.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in (jaxode.__version__, "Unreleased")


def test_import_loads_nothing_that_diffrax_does_not_and_starts_no_backend():
    """So that it costs no more than importing diffrax, which is a dependency."""
    code = (
        "import sys, diffrax; before = set(sys.modules); import jaxode; "
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('jaxode'))); "
        "from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == "[]\n0\n"


# From the ground up. A module may import from its own floor, without circles, and from those below.
FLOORS = (
    r"_jax\.",
    r"_checks\.",
    r"ode\.(loop|solvers)\.",
    r"ode\.adjoints($|\.)",
    r"ode\.",
    r"(flows\.(bases|coupling|divergence|regularizers)|nn(\..*)?)$",
    r"flows\.",
    r"(density\.|(coupling|divergence|images|regularizers|standardize)$)",
    r"training\.",
    r"(auditing\.|estimation\.|interop($|\.)|plot$|sklearn$"
    r"|(calibration|petab|series|tabular)($|\.))",
    r"__init__$",
)
# What users enter by, and which other doors each may use. The engine imports none of them.
DOORS = {
    "calibration": (),
    "estimation": (),
    "petab": ("estimation",),
    "series": ("tabular",),
    "sklearn": ("tabular",),
    "tabular": (),
}


def test_imports_go_downwards_and_take_no_private_name():
    imports, root = {}, ROOT / "jaxode"
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        imports[name] = [
            (node.module.removeprefix("jaxode").removeprefix("."), alias.name)
            for node in nodes
            for alias in node.names
            if (node.module or "").split(".")[0] == "jaxode"
        ]
    floor = lambda name: next(i for i, rule in enumerate(FLOORS) if re.match(rule, name))
    graph = {}
    for name, imported in imports.items():
        assert not [what for _, what in imported if what.startswith("_")], name
        used = {f"{module}.{what}".lstrip(".") for module, what in imported}
        graph[name] = used = {u if u in imports else u.rpartition(".")[0] for u in used}
        if name != "__init__" and not name.endswith(("_jax", "ode", "loop", "flows")):
            assert all(floor(u) <= floor(name) for u in used), (name, used)
        doors = {room for u in used if (room := u.partition(".")[0]) in DOORS}
        room = name.partition(".")[0]
        assert name == "__init__" or doors <= {room, *DOORS.get(room, ())}, (name, used)
        if name.startswith("_jax."):
            assert all(u.startswith("_jax.") for u in used), (name, used)
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle


def test_no_function_shadows_its_module():
    for info in pkgutil.walk_packages(jaxode.__path__, "jaxode."):
        library = info.name.partition(".interop.to_")[2]
        if library and not REQUIRED and importlib.util.find_spec(library) is None:
            continue
        package, _, name = importlib.import_module(info.name).__name__.rpartition(".")
        assert inspect.ismodule(getattr(sys.modules[package], name)), info.name


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
    ("jaxode/tabular/dates.py", "tests/tabular/test_dates.py", True),
    ("jaxode/tabular/dates.py", "tests/interop/test_sklearn.py", True),
    ("jaxode/tabular/dates.py", "tests/ode/test_odeint.py", False),
    ("jaxode/estimation/budget.py", "tests/petab/test_petab.py", True),
    ("jaxode/estimation/budget.py", "tests/series/test_series.py", False),
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
