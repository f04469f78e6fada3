"""Which tests a change affects, as the imports say: `pytest --changed` leaves out the others.

A test file is affected by a file that it imports, directly or through others. Public names count
as the modules that `jaxode/__init__.py` takes them from, so that a test of `jaxode.odeint` is not
one of `jaxode.tabular`. A page, an example, a benchmark or the README is affected by its own text.
"""

import ast
import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jaxode", "tests", "examples", "benchmarks")
# Every test depends on these.
EVERYTHING = ("pyproject.toml", "constraints.txt", "tests/conftest.py")
# `main` is pushed at the end of a day's work, so its commits of these seconds are one change.
ONE_CHANGE = 4 * 3600
PUBLIC = "jaxode/__init__.py"


def git(*words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()


def base() -> str:
    """The last landed commit: what a branch shares with main, or where the newest work began."""
    head = git("rev-parse", "HEAD")
    mains = git("branch", "--all", "--format=%(refname:short)", "--list", "origin/main")
    shared = git("merge-base", "HEAD", "origin/main") if mains else head
    if shared != head:
        return shared
    newest = int(git("log", "-1", "--format=%ct"))
    older = git("rev-list", "-1", f"--before={newest - ONE_CHANGE}", "HEAD")
    return older or git("rev-list", "--max-parents=0", "HEAD").split()[0]


def changed_files(since: str) -> set[str]:
    """Files that differ from a commit, with those that git does not know yet."""
    known = git("diff", "--name-only", since, "--", ".")
    return {*known.splitlines(), *git("ls-files", "--others", "--exclude-standard").splitlines()}


def file_of(module: str, beside: Path) -> str | None:
    """The file of a module of this repository, which `beside` imports."""
    places = (ROOT, ROOT / "tests", ROOT / "examples", beside.parent)
    parts = module.split(".")
    for path in (place.joinpath(*parts) for place in places):
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file() and file.is_relative_to(ROOT):
                return str(file.relative_to(ROOT))
    return None


@functools.cache
def public_names() -> dict[str, str]:
    """The file that each name of `jaxode` comes from."""
    path = ROOT / PUBLIC
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                file = file_of(f"{node.module}.{alias.name}", path) or file_of(node.module, path)
                found[alias.name] = file
    return found


def imported(path: Path) -> set[str]:
    """The files that a Python file imports, or whose public names it uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name, path) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [alias.name for alias in node.names]
            if node.module == "jaxode":
                found |= {public_names().get(name) for name in names}
            found |= {file_of(f"{node.module}.{name}", path) for name in names}
            found.add(file_of(node.module, path))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxode":
            found.add(public_names().get(node.attr))
    return {file for file in found if file} - {PUBLIC}


@functools.cache
def imports() -> dict[str, set[str]]:
    """Of each Python file of the repository the files that it imports."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): imported(path) for path in paths}


def needs(file: str) -> set[str]:
    """A file, and all that it imports directly or through others."""
    reached, waiting = set(), [file]
    while waiting:
        one = waiting.pop()
        if one not in reached:
            reached.add(one)
            waiting += imports().get(one, ())
    return reached


def text_of(item: pytest.Item) -> str | None:
    """The page, example, benchmark or README that a test runs, if it runs one."""
    values = getattr(getattr(item, "callspec", None), "params", {})
    file = item.nodeid.partition("::")[0]
    if "page" in values:
        return f"docs/{values['page']}"
    if file.endswith("test_examples.py") and "options" in values:
        return f"examples/{values['name']}.py"
    if file.endswith("test_benchmarks_run.py"):
        return f"benchmarks/cases/{values['name']}.py" if "small" in values else file
    return "README.md" if file.endswith("test_readme.py") else None


def affected(items: Iterable[pytest.Item], changes: set[str]) -> list[pytest.Item]:
    """The tests that changes of these files affect."""
    every = bool(changes & set(EVERYTHING))
    hits = functools.cache(lambda file: every or bool(needs(file) & changes))

    def is_hit(item: pytest.Item) -> bool:
        file, text = item.nodeid.partition("::")[0], text_of(item)
        return bool({file, text} & changes) if text else hits(file)

    return [item for item in items if is_hit(item)]


class Changed:
    """Leaves out the tests that the difference to a commit does not affect."""

    def __init__(self, since: str):
        self.changes = changed_files(since or base())

    def pytest_collection_modifyitems(self, config, items):
        kept = affected(items, self.changes)
        left_out = [item for item in items if item not in set(kept)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
