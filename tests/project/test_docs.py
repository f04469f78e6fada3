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

import jaxode

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.harness import report

pytestmark = [pytest.mark.slow, pytest.mark.shown]
ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)


def fences(text):
    return [(name, info, textwrap.dedent(block)) for _, name, info, block in FENCE.findall(text)]


def with_includes(path):
    return INCLUDE.sub(lambda match: (ROOT / match[1]).read_text(), path.read_text())


PAGES = {
    str(path.relative_to(ROOT / "docs")): with_includes(path)
    for path in sorted((ROOT / "docs").rglob("*.md"))
}


NEED_LIBRARIES = {"gallery.md": ("flax", "numpyro")}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_code_blocks_run(page, default_settings):
    if page == "devices.md" and not hasattr(jax.lax, "pcast"):
        pytest.skip("needs JAX 0.8 or newer")
    for library in NEED_LIBRARIES.get(page, ()):
        pytest.importorskip(library)
    # The page on contributing says what to write into a module.
    scope = dict(vars(jaxode.divergence)) if page == "contributing.md" else {}
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
def test_every_python_block_is_run_or_says_that_it_is_not(page):
    for language, info, _ in fences(PAGES[page]):
        assert language != "py" or "not run" in info
    # An indented block has no language, so nobody would run it.
    unfenced = FENCE.sub("", PAGES[page])
    assert not re.findall(r"^ {4,}(?:def|class|import|from|return) .*$", unfenced, re.MULTILINE)


CONTRIBUTED = [b for language, _, b in fences(PAGES["contributing.md"]) if language == "python"]


def contributed(name):
    """What the block of the page on contributing defines that has this name in it."""
    scope = dict(vars(jaxode.divergence))
    exec(next(block for block in CONTRIBUTED if name in block), scope)
    return scope


def test_what_the_page_on_contributing_shows_can_be_imported_by_the_package():
    assert not re.findall(r"^(?:import jaxode|from jaxode import)\b", "".join(CONTRIBUTED), re.M)


def test_the_gradient_method_of_the_page_on_contributing_is_exact(default_settings):
    f = lambda t, y, a: -a * y * y
    inputs = (jnp.array([1.0, 2.0]), 0.0, 1.0, 0.7)
    end = lambda *inputs, adjoint: jaxode.solve(f, *inputs, steps=8, adjoint=adjoint).y1.sum()
    adjoint = contributed("StoredSteps")["StoredSteps"]()
    own = jax.grad(partial(end, adjoint=adjoint), (0, 1, 2, 3))(*inputs)
    exact = jax.grad(partial(end, adjoint=jaxode.DiscreteAdjoint()), (0, 1, 2, 3))(*inputs)
    # The same steps, in float32.
    for a, b in zip(own, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for options in ({}, {"steps": 8, "ts": jnp.ones(2)}):
        with pytest.raises(ValueError, match=r"^StoredSteps: needs equal steps and has no outputs"):
            jaxode.solve(f, *inputs, adjoint=adjoint, **options)


def test_the_gradient_method_of_the_page_on_contributing_fails_as_others(default_settings):
    """Rows that succeed, explode, go nowhere by a field that is NaN, and have no end."""
    f = lambda t, y, a: -a * y * y / jnp.where(t == 5.0, jnp.nan, 1.0)
    y0, t0 = jnp.array([[1.0], [-2.0], [1.0], [1.0]]), jnp.array([0.0, 0.0, 5.0, 0.0])
    t1 = jnp.array([1.0, 9.0, 5.0, jnp.inf])

    options = {"steps": 40, "batch": "per_sample", "throw": False}
    stored = contributed("StoredSteps")["StoredSteps"]()

    def end(*inputs):
        solution = jaxode.solve(f, *inputs, adjoint=stored, **options)
        return solution.y1.sum(), solution

    bars, own = jax.grad(end, (0, 1, 2, 3), has_aux=True)(y0, t0, t1, 0.7)
    others = jaxode.solve(f, y0, t0, t1, 0.7, **options)
    assert own.ok.tolist() == [True, False, True, False]
    work = lambda stats: (stats.num_steps, stats.num_accepted, stats.num_rejected)
    of = lambda s: (s.result, s.y1, s.t_reached, *work(s.stats))
    # The same steps, in float32.
    for a, b in zip(of(own), of(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert all(jnp.isnan(bar)[jnp.array([1, 3])].all() for bar in bars[:3])
    assert jnp.isnan(bars[3])
    assert jnp.isfinite(bars[0][0]).all()


def test_the_estimator_of_the_page_on_contributing_is_unbiased(default_settings):
    """And equal to its like, as those of the library."""
    scope = contributed("uniform")
    assert scope["uniform"](2) == scope["uniform"](np.int64(2)) != scope["uniform"](3)
    matrix, z = jnp.arange(9.0).reshape(3, 3) / 3, jnp.ones(3)
    estimator = scope["uniform"](probes=4000)
    dz, div = estimator.apply(lambda z: matrix @ z, z, estimator.init(jax.random.key(0), z))
    np.testing.assert_allclose(dz, matrix @ z, rtol=1e-6)
    # Five standard errors of 0.09.
    np.testing.assert_allclose(div, jnp.trace(matrix), atol=0.45)


DOCSTRINGS = ("distributions", "images", "plot", "standardize")


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_code_blocks_of_docstrings_run(name, default_settings):
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    module, f = importlib.import_module(f"jaxode.{name}"), jaxode.nn.field
    params = jaxode.nn.MLP(2, (4,), key=jax.random.key(0))
    flow = jaxode.cnf(f, jaxode.standard_normal(2))
    scope = vars(module) | {
        "jaxode": jaxode, "flow": flow, "params": params, "f": f, "key": jax.random.key(1),
        "x": jnp.array([[3, 200], [0, 255]]), "data": np.eye(3, 2), "losses": [2.0, 1.0],
        "plt": plt, "partial": partial,
    }  # fmt: skip
    blocks = fences(module.__doc__)
    assert blocks
    for _, _, block in blocks:
        exec(compile(block, name, "exec"), scope)
    plt.close("all")
    if name == "images":
        assert scope["bits"].shape == (2,)
    if name == "distributions":
        base = jaxode.diagonal_normal(2)
        loss, _ = jax.value_and_grad(scope["loss"])((params, base), jnp.ones((4, 2)))
        assert np.isfinite(loss)


def test_no_docstring_has_code_that_is_not_run():
    """Code in a docstring of a module is fenced; the indented lines are formulas."""
    for path in (ROOT / "jaxode").rglob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert not re.findall(
            r"^    (?:def |\w+(?:, \w+)* = \w+\(|\w+\.\w+.*\()", doc, re.MULTILINE
        )
        assert path.stem in DOCSTRINGS or "```" not in doc, path


@pytest.mark.parametrize("page", PAGES)
def test_every_line_of_code_fits_the_page(page):
    """What docs/stylesheets/extra.css makes room for. Output wraps."""
    for language, _, block in fences(PAGES[page]):
        assert language == "output" or max(map(len, block.splitlines()), default=0) <= 100


def test_no_paragraph_of_a_docstring_becomes_a_box_of_the_reference():
    """mkdocstrings makes one of a line with a colon whose next line is indented."""
    for path in (ROOT / "jaxode").rglob("*.py"):
        assert not re.search(r"^( *)Differentiation: .*\n\1 +\S", path.read_text(), re.MULTILINE), (
            path
        )


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("api/"))
    documented = re.findall(r"^::: jaxode\.(?:\w+\.)*(\w+)$", reference, re.MULTILINE)
    assert set(jaxode.__all__) <= set(documented)
    assert {"Report", "Row"} <= set(documented)  # what jaxode.audit returns


def test_every_example_is_in_the_gallery():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == set(re.findall(r"`(\w+\.py)`", PAGES["gallery.md"]))


@pytest.mark.parametrize("page", ["start.md", "training.md"])
def test_notebooks_have_the_code_of_their_pages(page):
    """`test_code_blocks_run` runs that code."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/hooks/notebooks.py")
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    assert notebooks.MARK in PAGES[page]
    cells = [c for c in notebooks.notebook(PAGES[page])["cells"] if c["cell_type"] == "code"]
    blocks = [(language, block) for language, _, block in fences(PAGES[page])]
    assert [c["source"] for c in cells] == [b.strip() for name, b in blocks if name == "python"]
    printed = [out["text"] for c in cells for out in c["outputs"]]
    assert printed == [block for name, block in blocks if name == "output"]


def test_every_equation_names_its_test():
    tests = re.findall(r"^def (test_\d\d_\w+)", (ROOT / "tests/test_theory.py").read_text(), re.M)
    assert re.findall(r"`(test_\d\d_\w+)`", PAGES["equations.md"]) == tests


def test_every_result_is_on_the_page_on_failure():
    for result in jaxode.Result:
        assert f"`{result.name}`" in PAGES["failure.md"]


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


FILES = [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks/results").glob("*.json"))]
MACHINES = [file for file in FILES if "benchmarks" in file]
MACHINE = results(report.PUBLISHED)


def test_the_page_of_results_is_that_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert report.between(readme, "benchmarks", report.ratios(MACHINE)) == readme
    assert report.between(readme, "densities", report.densities(MACHINE)) == readme
    page = (ROOT / "benchmarks/RESULTS.md").read_text()
    for part in (part for machine in MACHINES for part in report.sections(machine)):
        assert part in page


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("tolerance", "tolerance.md"),
        ("adjoints", "adjoint.md"),
        ("accelerators", "devices.md"),
    ],
)
def test_tables_are_those_of_the_results(name, page):
    module = importlib.import_module(f"benchmarks.cases.{name}")
    for table in module.tables(results(name)):
        assert table in PAGES[page]


@pytest.mark.parametrize("name", ["divergence", "regularizers"])
def test_tables_are_those_of_make_bench(name):
    from benchmarks.cases import load

    cases = MACHINE["benchmarks"][name]
    table = load(name).table(cases)
    first = next(part for part in table.split("\n\n") if part.startswith("|"))
    assert first.strip() in PAGES[f"{name}.md"]


def test_the_table_at_equal_noise_is_that_of_make_bench():
    from benchmarks.cases import divergence
    from benchmarks.harness import show

    cases = MACHINE["benchmarks"]["divergence"]
    _, noisy = divergence.BENCHMARK.split(cases)
    for case, result in noisy.items():
        row = re.search(
            rf"^\| {case.removeprefix('noise, ')} \|(.*)\|$", PAGES["divergence.md"], re.MULTILINE
        )
        cells = [re.sub(" with .*", "", cell.strip(" *")) for cell in row[1].split("|")]
        expected = [
            show.ms(at["median"]) if "median" in at else "not reached"
            for at in result["at_target"].values()
        ]
        assert cells == [*expected, f"{result['exact_ms']:.1f}"]
