"""Every page of the documentation runs, and says what the code and the results say.

A page is one program: its `python` blocks in order. An `output` block is what the block before it
prints. Code that is not run is fenced as `py`, with a title that says so.
"""

import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import jax
import pytest

import jaxode

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    str(path.relative_to(ROOT / "docs")): path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.md"))
}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_code_blocks_run(page, default_settings):
    if page == "devices.md" and not hasattr(jax.lax, "pcast"):
        pytest.skip("needs JAX 0.8 or newer")
    scope, printed = {}, None
    for language, _, block in FENCE.findall(PAGES[page]):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, page, "exec"), scope)
            printed = out.getvalue()
        elif language == "output":
            assert printed == block
            printed = None


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_is_run_or_says_that_it_is_not(page):
    fences = FENCE.findall(PAGES[page])
    assert 2 * len(fences) == len(re.findall(r"^\s*```", PAGES[page], re.MULTILINE))
    for language, info, _ in fences:
        assert language in {"python", "output", "sh"} or (language == "py" and "not run" in info)


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
    documented = re.findall(r"^::: jaxode\.(?:\w+\.)*(\w+)$", reference, re.MULTILINE)
    assert set(jaxode.__all__) <= set(documented)
    assert {"Report", "Row"} <= set(documented)  # what jaxode.audit returns


def test_every_example_is_listed():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    for text in ((ROOT / "README.md").read_text(), PAGES["index.md"]):
        assert names == set(re.findall(r"`(\w+\.py)`", text))


@pytest.mark.parametrize("page", ["index.md", "start.md", "failure.md", "tolerance.md"])
def test_the_audit_is_named_where_it_is_needed(page):
    assert "jaxode.audit" in PAGES[page]


def test_every_equation_names_its_test():
    tests = re.findall(r"^def (test_\d\d_\w+)", (ROOT / "tests/test_theory.py").read_text(), re.M)
    assert re.findall(r"`(test_\d\d_\w+)`", PAGES["equations.md"]) == tests


def test_every_result_has_its_cause_and_remedy_on_the_page_on_failure():
    from jaxode.results import _EXPLANATIONS

    for result in jaxode.Result:
        assert f"`{result.name}`" in PAGES["failure.md"]
    for cause, remedy in _EXPLANATIONS.values():
        assert f"{cause[0].upper()}{cause[1:]}." in PAGES["failure.md"]
        assert remedy in PAGES["failure.md"]


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["tolerance", "adjoints"])
def test_tables_are_those_of_the_results(name):
    module = importlib.import_module(f"benchmarks.{name}")
    page = PAGES[{"adjoints": "adjoint.md"}.get(name, f"{name}.md")]
    for table in module.tables(results(name)):
        assert table in page
