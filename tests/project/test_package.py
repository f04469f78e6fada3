"""What importing the package gives and costs."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

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
    r"(flows\.bases|coupling|divergence|regularizers|nn(\..*)?)$",
    r"flows\.",
    r"(density\.|(images|standardize)$)",
    r"training\.",
    r"(auditing\.|estimation\.|interop($|\.)|plot$|sklearn$"
    r"|(calibration|petab|series|tabular)($|\.))",
    r"saving\.",
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
