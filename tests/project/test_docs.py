"""Every page of the documentation runs, and says what the code and the results say.

A page is one program: its `python` blocks in order. An `output` block is what the block before it
prints. Code that is not run is fenced as `py`, with a title that says so.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from helpers import METHODS

import jaxode

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cases import accelerators, adjoints, divergence, regularizers, tolerance
from benchmarks.harness import report, show

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)


def fences(text, language=""):
    found = [(name, info, textwrap.dedent(block)) for _, name, info, block in FENCE.findall(text)]
    return [block for name, _, block in found if name == language] if language else found


def with_includes(path):
    return INCLUDE.sub(lambda match: (ROOT / match[1]).read_text(), path.read_text())


DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): with_includes(path) for path in sorted(DOCS.rglob("*.md"))}
NEED_LIBRARIES = {"gallery.md": ("flax", "numpyro"), "estimate.md": ("numpyro",)}


SMOKE = {"start.md": pytest.mark.smoke}
RUN = [page for page, text in PAGES.items() if "```python" in text]


@pytest.mark.slow  # pages that train, each a program of a reader
@pytest.mark.parametrize("page", [pytest.param(page, marks=SMOKE.get(page, ())) for page in RUN])
def test_code_blocks_run(page, default_settings):
    for library in NEED_LIBRARIES.get(page, ()):
        pytest.importorskip(library)
    # The page on contributing says what to write into a module.
    scope = (
        dict(vars(importlib.import_module("jaxode.divergence")))
        if page == "contributing.md"
        else {}
    )
    printed = None
    for language, _, block in fences(PAGES[page]):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, page, "exec"), scope)
            printed = out.getvalue()
        elif language == "output":
            assert printed == block
            printed = None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_run_or_says_that_it_is_not_and_fits(page):
    """Lines have what docs/stylesheets/extra.css makes room for. Output wraps."""
    for language, info, block in fences(PAGES[page]):
        assert language != "py" or "not run" in info
        assert language == "output" or max(map(len, block.splitlines()), default=0) <= 100
    # An indented block has no language, so nobody would run it.
    unfenced = FENCE.sub("", PAGES[page])
    assert not re.findall(r"^ {4,}(?:def|class|import|from|return) .*$", unfenced, re.MULTILINE)


# What the page on contributing shows.
CONTRIBUTED = fences(PAGES["contributing.md"], "python")


def contributed(name):
    """What the block that has this name in it defines."""
    scope = dict(vars(importlib.import_module("jaxode.divergence")))
    exec(next(block for block in CONTRIBUTED if name in block), scope)
    return scope[name]


def test_the_gradient_method_of_the_page_on_contributing_is_exact_and_fails_as_others():
    """Rows that succeed, explode, go nowhere by a field that is NaN, and have no end."""
    # What the package imports itself, it must not import from.
    assert not re.findall(r"^(?:import jaxode|from jaxode import)\b", "".join(CONTRIBUTED), re.M)
    f = lambda t, y, a: -a * y * y / jnp.where(t == 5.0, jnp.nan, 1.0)
    y0, t0 = jnp.array([[1.0], [-2.0], [1.0], [1.0]]), jnp.array([0.0, 0.0, 5.0, 0.0])
    t1, stored = jnp.array([1.0, 9.0, 5.0, jnp.inf]), contributed("StoredSteps")()

    def end(*inputs, adjoint=stored):
        options = {"steps": 40, "batch": "per_sample", "throw": False, "adjoint": adjoint}
        solution = jaxode.solve(f, *inputs, **options)
        return solution.y1.sum(), solution

    go = jax.grad(end, (0, 1, 2, 3), has_aux=True)
    bars, own = go(y0, t0, t1, 0.7)
    _, others = end(y0, t0, t1, 0.7, adjoint=jaxode.DiscreteAdjoint())
    assert own.ok.tolist() == [True, False, True, False]
    work = lambda stats: (stats.num_steps, stats.num_accepted, stats.num_rejected)
    of = lambda s: (s.result, s.y1, s.t_reached, *work(s.stats))
    for a, b in zip(of(own), of(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert all(jnp.isnan(bar)[jnp.array([1, 3])].all() for bar in bars[:3])
    assert jnp.isnan(bars[3])
    one = (y0[:1], t0[:1], t1[:1], 0.7)
    exact = jax.grad(partial(end, adjoint=jaxode.DiscreteAdjoint()), (0, 1, 2, 3), has_aux=True)
    for a, b in zip(go(*one)[0], exact(*one)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    for options in ({}, {"steps": 8, "ts": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"^StoredSteps: needs equal steps and has no outputs"):
            jaxode.solve(f, y0[0], 0.0, 1.0, 0.7, adjoint=stored, **options)


def test_the_estimator_of_the_page_on_contributing_is_unbiased():
    """And equal to its like, as those of the library."""
    uniform = contributed("uniform")
    assert uniform(2) == uniform(np.int64(2)) != uniform(3)
    matrix, z, estimator = jnp.arange(9.0).reshape(3, 3) / 3, jnp.ones(3), uniform(probes=4000)
    dz, div = estimator.apply(lambda z: matrix @ z, z, estimator.init(jax.random.key(0), z))
    np.testing.assert_allclose(dz, matrix @ z)
    # Five standard errors of 0.09.
    np.testing.assert_allclose(div, jnp.trace(matrix), atol=0.45)


DOCSTRINGS = ("flows.bases", "images", "plot", "standardize")


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_code_blocks_of_docstrings_run(name, default_settings):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    module, f = importlib.import_module(f"jaxode.{name}"), jaxode.nn.field
    params = jaxode.nn.MLP(2, (4,), key=jax.random.key(0))
    scope = vars(module) | {
        "jaxode": jaxode, "flow": jaxode.cnf(f, jaxode.standard_normal(2)), "params": params,
        "f": f, "key": jax.random.key(1), "x": jnp.array([[3, 200], [0, 255]]),
        "data": np.eye(3, 2), "losses": [2.0, 1.0], "plt": plt, "partial": partial,
    }  # fmt: skip
    blocks = fences(module.__doc__)
    assert blocks
    for _, _, block in blocks:
        exec(compile(block, name, "exec"), scope)
    plt.close("all")
    if name == "images":
        assert scope["bits"].shape == (2,)
    if name == "flows.bases":
        base = jaxode.diagonal_normal(2)
        loss, _ = jax.value_and_grad(scope["loss"])((params, base), jnp.ones((4, 2)))
        assert np.isfinite(loss)


def test_no_docstring_has_code_that_is_not_run_or_becomes_a_box_of_the_reference():
    """Code in a docstring of a module is fenced; the indented lines are formulas."""
    code = re.compile(r"^    (?:def |\w+(?:, \w+)* = \w+\(|\w+\.\w+.*\()", re.MULTILINE)
    # mkdocstrings makes a box of a line with a colon whose next line is indented.
    box = re.compile(r"^( *)Differentiation: .*\n\1 +\S", re.MULTILINE)
    for path in (ROOT / "jaxode").rglob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert not code.search(doc), path
        assert any(name.endswith(path.stem) for name in DOCSTRINGS) or "```" not in doc, path
        assert not box.search(path.read_text()), path


def test_pages_name_all_that_they_are_about():
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
    documented = set(re.findall(r"^::: jaxode\.(?:\w+\.)*(\w+)$", reference, re.MULTILINE))
    assert {*jaxode.__all__, "Row"} <= documented
    grouped = re.findall(r"\[`(\w+)`\]", PAGES["api/names.md"])
    assert sorted(grouped) == sorted(jaxode.__all__)
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == set(re.findall(r"`(\w+\.py)`", PAGES["gallery.md"]))
    tests = re.findall(r"^def (test_\d\d_\w+)", (ROOT / "tests/test_theory.py").read_text(), re.M)
    assert re.findall(r"`(test_\d\d_\w+)`", PAGES["equations.md"]) == tests
    assert [r for r in jaxode.Result if f"`{r.name}`" not in PAGES["failure.md"]] == []


@pytest.mark.parametrize("page", ["start.md", "training.md"])
def test_notebooks_have_the_code_of_their_pages(page):
    """`test_code_blocks_run` runs that code."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/hooks/notebooks.py")
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    assert notebooks.MARK in PAGES[page]
    cells = [c for c in notebooks.notebook(PAGES[page])["cells"] if c["cell_type"] == "code"]
    assert [c["source"] for c in cells] == [b.strip() for b in fences(PAGES[page], "python")]
    printed = [out["text"] for c in cells for out in c["outputs"]]
    assert printed == fences(PAGES[page], "output")


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


MEASURED = results(report.PUBLISHED)["benchmarks"]


def first_table(module):
    """Of a benchmark, as `make bench` prints it."""
    table = module.BENCHMARK.table(MEASURED[module.__name__.rpartition(".")[2]])
    return [next(part for part in table.split("\n\n") if part.startswith("|")).strip()]


TABLES = {
    "tolerance": lambda: tolerance.tables(results("tolerance")),
    "adjoint": lambda: adjoints.tables(results("adjoints")),
    "devices": lambda: accelerators.tables(results("accelerators")),
    "divergence": lambda: first_table(divergence),
    "regularizers": lambda: first_table(regularizers),
}


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_results(page):
    assert [table for table in TABLES[page]() if table not in PAGES[f"{page}.md"]] == []


def test_the_table_of_modes_is_that_of_the_methods():
    names = {jax.jacfwd: "forward", jax.jacrev: "reverse"}
    (start,) = re.finditer(r"^\| method \| forward .*\n.*\n", PAGES["adjoint.md"], re.MULTILINE)
    _, *heads = [cell.strip() for cell in start[0].splitlines()[0].strip("|").split("|")]
    rows = PAGES["adjoint.md"][start.end() :].split("\n\n")[0].splitlines()
    written = {}
    for row in rows:
        method, *cells = [cell.strip(" `()") for cell in row[1:-1].split("|")]
        written[method] = {head for head, cell in zip(heads, cells, strict=True) if cell == "yes"}
    for name in ("discrete", "backsolve", "forward"):
        method = METHODS[name]
        once = {names[mode] for mode in method.modes}
        twice = {f"{names[then]} of {names[first]}" for first, then in method.pairs}
        assert written.pop(type(method.adjoint).__name__) == once | twice
    assert not written


def test_the_table_at_equal_noise_is_that_of_the_results():
    _, noisy = divergence.BENCHMARK.split(MEASURED["divergence"])
    for case, result in noisy.items():
        place = rf"^\| {case.removeprefix('noise, ')} \|(.*)\|$"
        row = re.search(place, PAGES["divergence.md"], re.MULTILINE)
        cells = [re.sub(" with .*", "", cell.strip(" *")) for cell in row[1].split("|")]
        expected = [
            show.ms(at["median"]) if "median" in at else "not reached"
            for at in result["at_target"].values()
        ]
        assert cells == [*expected, f"{result['exact_ms']:.1f}"]
