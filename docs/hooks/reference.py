"""Fails the build if the reference lacks a public name."""

import ast
import zlib
from pathlib import Path

from mkdocs.exceptions import PluginError

PACKAGE = Path(__file__).parents[2] / "jaxode"


def on_post_build(config):
    """Compare the inventory of mkdocstrings with what jaxode defines."""
    inventory = Path(config.site_dir, "objects.inv").read_bytes()
    entries = zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode().splitlines()
    missing = set(_public_names()) - {entry.split(" ", 1)[0] for entry in entries}
    if missing:
        raise PluginError(f"docs/api/ has no entry for {', '.join(sorted(missing))}")


def _public_names():
    """Everything in `jaxode.__all__`, and what the modules among it define or list likewise."""
    for name in (*_listed(PACKAGE / "__init__.py"), "sklearn"):  # which is imported by itself
        yield f"jaxode.{name}"
        for path in (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py"):
            for public in _listed(path) if path.exists() else ():
                yield f"jaxode.{name}.{public}"


def _listed(path):
    """The names in `__all__`, or without one the functions and classes without an underscore."""
    statements = ast.parse(path.read_text()).body
    for statement in statements:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__all__":
            return ast.literal_eval(statement.value)
    definitions = [s for s in statements if isinstance(s, ast.FunctionDef | ast.ClassDef)]
    return [s.name for s in definitions if not s.name.startswith("_")]
