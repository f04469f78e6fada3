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


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_all_lists_the_public_names():
    public = {name for name in vars(jaxode) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(jaxode, name)).__name__ == "module"}
    assert public - modules | {
        "coupling",
        "divergence",
        "images",
        "interop",
        "nn",
        "plot",
        "regularizers",
        "standardize",
    } == set(jaxode.__all__)
    assert list(jaxode.__all__) == sorted(jaxode.__all__)


def test_the_version_is_the_same_everywhere():
    root = Path(__file__).parents[2]
    assert f"\nversion: {jaxode.__version__}\n" in (root / "CITATION.cff").read_text()
    newest = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] in (jaxode.__version__, "Unreleased")


def test_every_public_name_has_a_docstring():
    for name in jaxode.__all__:
        assert getattr(jaxode, name).__doc__, name


def test_import_loads_nothing_that_diffrax_does_not_and_starts_no_backend():
    """So that it costs no more than importing diffrax, which is a dependency."""
    code = (
        "import sys, diffrax; before = set(sys.modules); import jaxode; "
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('jaxode'))); "
        "from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    )
    assert run(code).split("\n") == ["[]", "0"]


# From the ground up. A module may import from its own floor, without circles, and from those below.
FLOORS = (
    r"_jax\.",
    r"_checks\.",
    r"ode\.loop\.",
    r"ode\.adjoints($|\.)",
    r"ode\.",
    r"(coupling|distributions|divergence|images|nn(\..*)?|regularizers)$",
    r"(flows\.|diffusion$)",
    r"density\.|standardize$",
    r"(auditing\.|interop($|\.)|plot$)",
    r"__init__$",
)


def imports():
    """The modules of the package, and which of them each one imports."""
    found = {}
    for path in (Path(__file__).parents[2] / "jaxode").rglob("*.py"):
        root = Path(__file__).parents[2] / "jaxode"
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        found[name] = [
            (node.module.removeprefix("jaxode").removeprefix("."), alias.name)
            for node in nodes
            for alias in node.names
            if (node.module or "").split(".")[0] == "jaxode"
        ]
    return found


def test_imports_only_downwards():
    modules = imports()
    floor = lambda name: next(i for i, rule in enumerate(FLOORS) if re.match(rule, name))
    names = set(modules)
    graph = {}
    for name, imported in modules.items():
        used = {f"{module}.{what}".lstrip(".") for module, what in imported}
        used = {u if u in names else u.rpartition(".")[0] for u in used}
        graph[name] = used
        if name != "__init__" and not name.endswith(("_jax", "ode", "loop", "flows")):
            assert all(floor(u) <= floor(name) for u in used), (name, used)
        if name.startswith("_jax."):
            assert all(u.startswith("_jax.") for u in used), (name, used)
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle


def test_no_private_name_is_imported_from_another_folder():
    for name, imported in imports().items():
        for module, what in imported:
            assert not what.startswith("_"), (name, module, what)


def test_no_function_shadows_its_module():
    for info in pkgutil.walk_packages(jaxode.__path__, "jaxode."):
        library = info.name.partition(".interop.to_")[2]
        if library and not REQUIRED and importlib.util.find_spec(library) is None:
            continue
        package, _, name = importlib.import_module(info.name).__name__.rpartition(".")
        assert inspect.ismodule(getattr(sys.modules[package], name)), info.name
