"""What importing the package gives and costs."""

import re
import subprocess
import sys
from pathlib import Path

import jaxode


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_all_lists_the_public_names():
    public = {name for name in vars(jaxode) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(jaxode, name)).__name__ == "module"}
    assert public - modules | {"divergence", "images", "nn", "plot", "regularizers"} == set(
        jaxode.__all__
    )
    assert list(jaxode.__all__) == sorted(jaxode.__all__)


def test_every_public_name_has_a_docstring():
    for name in jaxode.__all__:
        assert getattr(jaxode, name).__doc__, name


def test_import_starts_no_backend():
    code = "import jaxode; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    assert run(code) == "0"


def test_import_loads_nothing_that_diffrax_does_not():
    """So that it costs no more than importing diffrax, which is a dependency."""
    code = (
        "import sys, diffrax; before = set(sys.modules); import jaxode; "
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith('jaxode')))"
    )
    assert run(code) == "[]"


def test_every_module_has_its_place_and_imports_only_what_stands_above_it():
    root = Path(__file__).parent.parent
    table = re.findall(
        r"^\| (`jaxode/.*?) \|", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    names = [re.findall(r"jaxode/(\w+)", row) for row in table]
    place = {name: index for index, row in enumerate(names) for name in row}
    sources = {}
    for path in (root / "jaxode").rglob("*.py"):
        relative = path.relative_to(root / "jaxode")
        if relative.name != "__init__.py":
            sources.setdefault(Path(relative.parts[0]).stem, []).append(path.read_text())
    assert set(sources) <= set(place)
    for name, texts in sources.items():
        for other in re.findall(r"^from jaxode\.(\w+)", "\n".join(texts), re.MULTILINE):
            assert place[other] <= place[name], f"{name} imports {other}"
