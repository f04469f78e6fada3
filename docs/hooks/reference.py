"""Fails the build if the reference lacks a public name."""

import ast
import zlib
from pathlib import Path

from mkdocs.exceptions import PluginError

PACKAGE = Path(__file__).parents[2] / "jaxode"
# Public by their names alone: other modules of jaxode use them.
HELPERS = {
    "jaxode.coupling.assignment",
    "jaxode.regularizers.check_regularizers",
}


def on_post_build(config):
    """Compare the inventory of mkdocstrings with what jaxode defines."""
    inventory = Path(config.site_dir, "objects.inv").read_bytes()
    entries = zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode().splitlines()
    missing = set(_public_names()) - HELPERS - {entry.split(" ", 1)[0] for entry in entries}
    if missing:
        raise PluginError(f"docs/api/ has no entry for {', '.join(sorted(missing))}")


def _public_names():
    """Everything in `jaxode.__all__`, and what the modules among it define."""
    for statement in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__all__":
            names = ast.literal_eval(statement.value)
    for name in (*names, "sklearn"):  # which `import jaxode` leaves out
        yield f"jaxode.{name}"
        for path in (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py"):
            for item in ast.parse(path.read_text()).body if path.exists() else ():
                defined = isinstance(item, ast.FunctionDef | ast.ClassDef)
                if defined and not item.name.startswith("_"):
                    yield f"jaxode.{name}.{item.name}"
