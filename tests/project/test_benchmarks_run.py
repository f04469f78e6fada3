"""Every benchmark runs to its end, at a size of seconds: its contenders, table, picture.

Contenders whose library is installed for benchmarks only are left out, as the runner does.
"""

import json
import re
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import diffrax
import jax
import joblib
import numpy as np
import pytest
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cases
from benchmarks.cases import (
    accelerators,
    adjoints,
    angles,
    compile_time,
    cores,
    divergence,
    energy,
    estimate,
    evaluate,
    ffjord_step,
    images,
    memory,
    mixed,
    posterior,
    ragged,
    regression,
    regularizers,
    rows,
    series,
    stiff,
    summaries,
    tables,
    tolerance,
)
from benchmarks.cases import time_to_nll as to_level
from benchmarks.harness import (
    benchmark,
    estimate_problems,
    fairness,
    problems,
    runner,
    series_data,
    show,
)  # fmt: skip
from benchmarks.peers import (
    estimators,
    flows,
    odes,
    parameter_fits,
    regressors,
    series_models,
    tabular,
)  # fmt: skip

pytestmark = pytest.mark.benchmarks
# The same for all, so that the steps are compiled once.
FLOW = problems.Workload(3, 8, (5, 5), own=True)
ODE = {"state": 4, "width": 4, "batch": 4, "times": 2, "own": True}
IMAGES = problems.Images(4, 4, 1, (4, 4), patch=2)
MAX_STEPS = 4096  # the default of all
KINDS = ("none", "RNODE: both, (0.05), (0.02)")
OF_VALUES = ("jaxode", "diffrax, vmap", "torchode", "scipy")
OF_GRADIENTS = ("jaxode, vmap", "torchode", "scipy")

# The cases of each benchmark at a tiny size, and other attributes.
TINY = {
    "ffjord_step": {"tiny": FLOW},
    "neural_ode_step": {"tiny": ODE},
    "per_sample": {"tiny": FLOW},
    "evaluate": {"of the user": problems.Posterior(20, True, width=4, simulations=40)},
    "ragged": {"tiny": ragged.Size(4, 3, (4,))},
    "rows": {
        "solve": rows.Size(2, False, (3,), OF_VALUES),
        "gradient": rows.Size(2, True, (3,), OF_GRADIENTS),
    },
    "images": {
        "matching": images.Matching(IMAGES),
        "likelihood": images.Likelihood(IMAGES),
        "log-densities": images.LogDensities(IMAGES),
        "training": images.Training(IMAGES, 1e-9, 8),
    },
    "overhead": {"solve": FLOW},
    "divergence": {
        name: divergence.Size(dim, noise, noise, width=4, batch=4, draws=2, steps=2)
        for name, dim, noise in (("2 dimensions", 2, False), ("noise, trained", 32, True))
    },
    "regularizers": {name: regularizers.BENCHMARK.cases[name] for name in KINDS},
    "energy": {
        "wells": energy.Wells(4, steps=2, batch=4, width=4, samples=16),
        "phi^4": energy.Sites(3, steps=2, batch=4, samples=16),
        "ring": energy.Ring(3, steps=2, batch=4, width=4, samples=16),
    },
    "compile_time": {"flow": FLOW, "Neural ODE": ODE},
    "memory": {"width": (5,)},
    "cores": {"tiny": FLOW},
    "stiff": {"rows": False, "their gradient": True, "alone": "robertson"},
}
BESIDES = {
    "overhead": {"count": 2},
    "regularizers": {"training": regularizers.Training((0,), steps=2, batch=4, widths=(4,))},
    "memory": {"base": {"max_steps": MAX_STEPS, "width": 5, "batch": FLOW.batch, "dim": FLOW.dim}},
    "stiff": {"number": 2},
}
NOT_ON_THE_PAGE = ("overhead", "divergence", "regularizers")
AT_EQUAL_ERROR = (
    "ffjord_step", "neural_ode_step", "per_sample", "evaluate", "ragged", "images", "cores",
)  # fmt: skip

MAKERS = [
    (module, name, getattr(module, name))
    for module in (flows, odes)
    for name in ("jaxode_step", "diffrax_step", "odeint_step", "series_step", "exact")
    if hasattr(module, name)
]
DEFAULTS = [repr(each) for each in (diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint())]
_made = {}


def once(make):
    """The same step again for the same problem and settings."""

    def step(p, *args, **options):
        settings = {**dict(enumerate(args)), "max_steps": MAX_STEPS, **options}
        # Some adjoints cannot be hashed, and are passed by place or by name.
        told = {repr(each): None for each in settings.values()}
        key = make, id(p), *(each for each in told if each not in DEFAULTS)
        if key not in _made:
            _made[key] = make(p, *args, **options), p  # which keeps its id
        return _made[key][0]

    return step


def untrained(loss, steps, rate=None):
    """In place of `problems.trainer`: the loss is traced, and the parameters stay."""
    return lambda params, key: (jax.eval_shape(loss, params, key), params)[1]


@pytest.fixture
def quick(default_settings, monkeypatch):
    """Nothing is timed: whatever would be, has run before. One tolerance, which is enough."""
    untimed = lambda calls, *args, **kwargs: {
        name: [1.0 + i, 2.0 + i] for i, name in enumerate(calls)
    }
    for module in [fairness, *(sys.modules[type(cases.load(name)).__module__] for name in TINY)]:
        if hasattr(module, "alternate"):
            monkeypatch.setattr(module, "alternate", untimed)
    for module, name, make in MAKERS:
        monkeypatch.setattr(module, name, once(make))
    monkeypatch.setattr(problems, "trainer", untrained)
    monkeypatch.setattr(memory, "untrained", problems.flow)
    # The exact gradient of a flow is exact here, too; the others are those of a contender.
    monkeypatch.setattr(diffrax, "Dopri8", diffrax.Tsit5)
    monkeypatch.setattr(rows, "EXACT", 1e-6)
    by_contender = lambda make, p: [np.asarray(leaf) for leaf in make(p)(1e-5)[1]]
    monkeypatch.setattr(odes, "exact_gradient", by_contender)
    monkeypatch.setattr(compile_time, "BACKSOLVE", flows.seminorm_backsolve)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    compare = lambda bench, makers, exact, tolerances, *rest: fairness.work_precision(
        bench, makers, exact, (1e-5,), *rest
    )
    monkeypatch.setattr(benchmark, "work_precision", compare)
    return monkeypatch


def of_sizes(patch, name):
    """The cases of `TINY`."""
    patch.setattr(cores, "device_count", lambda: 8)
    patch.setattr(evaluate, "SECONDS", 0.1)
    x = np.random.default_rng(0).integers(0, 256, (40, IMAGES.dim), np.uint8)
    patch.setattr(images, "mnist", lambda: (x, x[:8]))
    few = {name: each._replace(batch=4) for name, each in images.TRAINED.items()}
    patch.setattr(images, "TRAINED", few)
    # One of the solvers, and one number of products: the others are the same code.
    tsit5 = {name: way for name, way in ffjord_step.DIFFRAX.items() if "Tsit5" in name}
    patch.setattr(ffjord_step, "DIFFRAX", tsit5)
    for solvers in (stiff.OURS, stiff.THEIRS):
        for other in [*solvers][1:]:
            patch.delitem(solvers, other)
    least = {name: dict([*by.items()][:1]) for name, by in divergence.by_noise().items()}
    patch.setattr(divergence, "by_noise", lambda: least)
    for attribute, value in ({"cases": TINY[name]} | BESIDES.get(name, {})).items():
        patch.setattr(cases.load(name), attribute, value)
    for case in TINY[name]:
        yield case, float("inf")
        patch.setattr(stiff, "THEIRS", {})  # one case has them


def of_training(patch, name):
    x = problems.eight_gaussians(np.random.default_rng(0), 16)
    task = to_level.Task(lambda: to_level.Data(x, x[:8]), FLOW.widths, 4, level=1e9)
    phases = [phase._replace(steps=2, block=2) for phase in to_level.PHASES[name]]
    patch.setattr(to_level, "TASKS", {"tiny": task})
    patch.setitem(to_level.PHASES, name, phases[: 1 if "transport" in name else None])
    patch.setattr(to_level.BENCHMARK, "cases", {"case": ("tiny", name, 0)})
    yield "case", float("inf")


def of_posterior(patch, name):
    fit = {"steps": 2, "batch_size": 4, "time_power": 2.0}
    patch.setattr(posterior.BENCHMARK, "size", posterior.Size(20, {"width": 4, "blocks": 1}, fit))
    patch.setattr(posterior, "OBSERVATIONS", 1)
    patch.setattr(posterior, "MEMBERS", 2)
    task, dim, data = ("slcp", 5, 8) if "DeepSet" in name else ("two moons", 2, 2)
    samples = np.random.default_rng(0).uniform(-1, 1, (20, dim)).astype(np.float32)
    patch.setattr(posterior, "reference", lambda task, number: (np.ones(data, "f"), samples))
    patch.setattr(posterior, "WITH_WEIGHTS", 200)
    cases = {"tiny": posterior.Case(task, name, 100 if "five" in name else 200)}
    patch.setattr(posterior.BENCHMARK, "cases", cases)
    with joblib.parallel_config("sequential"):
        yield "tiny", float("inf")


class Ticks:
    """A clock by which each candidate takes a second."""

    now = 0.0

    def perf_counter(self):
        self.now += 0.5
        return self.now


def of_table(patch, of):
    name, _, setting = of.partition("; ")
    patch.setattr(tables, "time", Ticks())
    patch.setattr(tables, "own_core", lambda: None)  # this process runs other tests, too
    patch.setattr(tables, "TIMES", () if setting else (1.5,))
    patch.setattr(estimators, "OF_FIELD", (2, 1.15))
    patch.setattr(estimators, "OF_MAP", (2, 1.05))
    if name.startswith(("jaxode", "torchcfm")):  # of one block in place of three
        contender = estimators.CONTENDERS[name]
        one = {label: size | {"blocks": 1} for label, size in contender.settings.items()}
        patch.setitem(estimators.CONTENDERS, name, contender._replace(settings=one))
    x = np.random.default_rng(0).standard_normal((120, 3))
    patch.setattr(tables, "TABLES", {"banana": lambda: x})
    yield tables.Case("banana", name, setting, 0).name, 2.5


def of_angles(patch, of):
    patch.setattr(tables, "time", Ticks())
    patch.setattr(tables, "own_core", lambda: None)
    patch.setattr(estimators, "OF_MAP", (2, 1.05))
    small = estimators.Contender(partial(angles.CONTENDERS["jaxode"].train, width=4, blocks=1))
    patch.setitem(angles.CONTENDERS, "jaxode", small)
    table = "mixture of von Mises, 2 angles"
    patch.setattr(angles, "TABLES", {table: lambda: angles.mixture(2, 150)})
    yield f"{table}: {of}", 2.5


def of_regression(patch, of):
    """A small table of its own, with levels."""
    patch.setattr(regression, "own_core", lambda: None)
    patch.setattr(regression, "ROWS", 5)
    patch.setattr(regressors, "SECONDS", 0.0)
    patch.setattr(regressors, "PATIENCE", 1)
    patch.setattr(regressors, "SETTINGS", ((4, 0.1),))
    patch.setattr(regressors, "LEAVES", (5,))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 2))
    y = np.round(x[:, :1] + 0.3 * rng.standard_normal((60, 1)))
    patch.setattr(regression, "read", lambda name: np.hstack([x, y]))
    yield regression.Case("wine", of, 0).name, 0.0


def of_series(patch, of):
    """Few series; of the last value, also patients whose files are written here."""
    patch.setattr(series, "own_core", lambda: None)
    patch.setattr(series_models, "HIDDEN", 4)
    patch.setattr(series_models, "LATENT", 2)
    patch.setattr(series_models, "LOOK", 1)
    few = series.parted(series_data.linear(12, 0), series_data.linear(8, 1), 0, 3.0)
    small = {"linear": series.Table(lambda seed: few, series.of_linear, 0.01)}
    patch.setattr(series, "TABLES", series.TABLES | small)
    yield series.Case("linear", of, 0).name, 0.0
    if of == "last value":
        folder = Path(tempfile.mkdtemp())
        patch.setenv(series_data.FOLDER, str(folder))
        for part in "ab":
            (folder / f"set-{part}").mkdir()
            outcomes = ["RecordID,SAPS-I,In-hospital_death"]
            for number in range(10):
                lines = ["Time,Parameter,Value", "00:00,Age,60", "00:00,Height,-1"]
                lines += [f"{hour}:07,HR,{70 + hour + number}" for hour in range(10, 48, 6)]
                lines += [f"{hour}:10,HR,{71 + hour + number}" for hour in range(10, 48, 6)]
                (folder / f"set-{part}" / f"{number}{part}.txt").write_text("\n".join(lines))
                outcomes.append(f"{number}{part},5,{number % 2}")
            (folder / f"Outcomes-{part}.txt").write_text("\n".join(outcomes))
        series_data._lines.cache_clear()
        yield series.Case("PhysioNet", of, 0).name, 0.0
        series_data._lines.cache_clear()


def of_mixed(patch, of):
    """A small table of its own, with all that a column may hold."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn", reason="scikit-learn is installed for benchmarks: make bench")
    patch.setattr(mixed, "own_core", lambda: None)
    patch.setattr(mixed, "FOLDS", 2)
    patch.setattr(tabular, "EPOCHS", 1)
    patch.setattr(tabular, "TREES", 2)
    rng = np.random.default_rng(0)
    words, numbers = rng.choice(["a", "b"], 200), rng.standard_normal((2, 200))
    frame = pandas.DataFrame({"word": words, "whole": np.round(30 * numbers[0])})
    frame = frame.assign(rounded=np.round(numbers[1], 1), number=numbers.sum(axis=0))
    frame.loc[:20, "whole"] = np.nan
    frame.loc[10:30, "word"] = None
    patch.setattr(mixed, "TABLES", {"german": lambda: frame})
    yield mixed.Case("german", of).name, 0.5


def of_estimate(patch, of):
    """A short series, and starts close to the truth."""
    patch.setattr(estimate, "own_core", lambda: None)
    patch.setattr(estimate_problems, "STARTS", 2)
    patch.setattr(estimate_problems, "SPREAD", 1.2)
    patch.setattr(parameter_fits, "STEPS", 30)
    patch.setattr(parameter_fits, "RATES", (1e-2, 3e-2))
    name = "Lotka-Volterra, 20 periods"
    short = estimate_problems.PROBLEMS[name]._replace(ts=np.linspace(0.2, 6, 30))
    patch.setitem(estimate_problems.PROBLEMS, name, short)
    yield estimate.Case(name, of).name, 0.0


# Matching alone is the first phase of matching and then likelihood. Of contenders for tables that
# share their settings, one has them all; widths are one.
TRAININGS = [name for name in to_level.PHASES if name != "jaxode, Residual, matching"]
WITH_SETTINGS = ("jaxode", "torchcfm", "zuko NSF", "flowjax coupling")
OF_TABLES = [
    f"{name}; {setting}" if setting else name
    for name, each in estimators.CONTENDERS.items()
    for setting in each.settings
    if not setting or (name in WITH_SETTINGS and setting != "width 256")
]
MODULES = {"quantile": "quantile_forest", "tvae": "ctgan", "arf": "arfpy"}
RUNS = [(name, of_sizes, name) for name in cases.BENCHMARKS if name != "angles"]
RUNS += [("angles", of_angles, contender) for contender in angles.CONTENDERS]
RUNS += [("time_to_nll", of_training, contender) for contender in TRAININGS]
RUNS += [("posterior", of_posterior, contender) for contender in posterior.CONTENDERS]
RUNS += [("tables", of_table, contender) for contender in OF_TABLES]
RUNS += [("regression", of_regression, contender) for contender in regressors.CONTENDERS]
RUNS += [("series", of_series, contender) for contender in series_models.CONTENDERS]
RUNS += [("mixed", of_mixed, contender) for contender in tabular.CONTENDERS]
RUNS += [("estimate", of_estimate, contender) for contender in parameter_fits.CONTENDERS]


SMOKE = {"neural_ode_step": pytest.mark.smoke}


@pytest.mark.filterwarnings("ignore:.*fit.seconds")  # a few steps are enough here
@pytest.mark.parametrize(
    ("name", "small", "of"),
    [pytest.param(*row, marks=SMOKE.get(row[0], ())) for row in RUNS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_benchmark_runs_to_its_end(name, small, of, quick, tmp_path):
    library = of.replace(",", " ").replace(";", " ").split(".")[0].split()[0].lower()
    if library in (
        "torchcfm",
        "torchdiffeq",
        "zuko",
        "flowjax",
        "sbi",
        "ngboost",
        "quantile",
        "treeffuser",
        "ctgan",
        "tvae",
        "arf",
    ):
        pytest.importorskip(
            MODULES.get(library, library),
            reason=f"{library} is installed for benchmarks: make bench",
        )
    for case, seconds in small(quick, of):
        chosen, picture = cases.load(name), tmp_path / "picture.png"
        result = chosen.run(case, fairness.Bench(seconds))
        assert "crashed" not in result, result
        for contender, reason in result.get("failed", {}).items():
            assert reason.startswith("ModuleNotFoundError"), (contender, reason)
        curves = result.get("curves", {}) if name in AT_EQUAL_ERROR else {}  # matching has none
        for contender, curve in curves.items():
            assert curve[0]["error"] < 2e-3, contender  # float32, and a tolerance of 1e-5
        kept = json.loads(json.dumps(result)) | {"code": "abc"}  # as the runner does
        assert chosen.table({case: kept})
        has_brief = name not in NOT_ON_THE_PAGE and kept.get("ratios") != {}
        assert bool(chosen.brief({case: kept})) == has_brief
        figure = chosen.draw({case: kept})
        if figure is not None:
            show.save(figure, chosen.title, picture)
            assert picture.stat().st_size > 0
    if name == "images":  # the last case, of uniform levels: the truth is 8
        assert all(7 < one["bits"] < 14 for one in result["trained"].values())
        assert len(result["trained"]) + len(set(result["failed"]) & set(images.TRAINED)) == 4
    if name == "time_to_nll":
        assert result["steps"] == 2 * len(to_level.PHASES[of])
    if name == "regression":
        assert result["crps"] < 1.5
        assert set(result["covered"]) == {"50", "90"}
    if name == "series":
        # The last value of HR is 6 beats an hour behind: 12 at a mean lag of two times.
        assert (result["rows"], len(result["scores"])) in ((9, 1), (9, 2), (13, 2))
    if name == "mixed":
        assert (result["rows"], result["columns"]) == (160, 4)
        assert 0.3 < result["auc"] <= 1
    if name == "angles":
        assert (result["rows"], result["columns"]) == (120, 2)
        # Of uniform angles 3.68; of the truth 2.8, of 15 rows.
        assert result["truth"] - 0.5 < result["nats"] < 4.5
    if name == "estimate":
        assert result["starts"] == len(result["relative_costs"]) == 2
        # Adam has a few steps.
        assert result["at_truth"] == 100 or "rate" in result
    if name == "tables":
        assert (result["rows"], result["columns"]) == (96, 3)
        assert result["times"] == list(result["scores"]) == ["1.5", "2.5"][";" in of :]
        # A standard normal has 4.26 nats; nothing has learned much else in a few steps.
        assert all(3 < score["nats"] < 8 for score in result["scores"].values())


def test_programs_for_accelerators_are_measured_and_stand_on_their_page(
    monkeypatch, tmp_path, default_settings
):
    """Here for two CPUs, without the libraries that describe others."""
    page = tmp_path / "devices.md"
    page.write_text("kept <!-- accelerators -->old<!-- end of accelerators -->")
    mesh = lambda target: Mesh(np.array(jax.devices()[: target.chips]), (flows.AXIS,))
    targets = {f"{n} CPUs": accelerators.Target("cpu", "", n) for n in (1, 2)}
    compared = accelerators.contenders
    # CPUs have loops of their own, for random numbers, too.
    ours = lambda *args: {
        k: v._replace(once=(2, 1, 1)) for k, v in compared(*args).items() if "joint" in k
    }
    for module, name, value in (
        (accelerators, "mesh_of", mesh), (accelerators, "TARGETS", targets),
        (accelerators, "WORKLOADS", {"flow": FLOW}), (accelerators, "JAXODE", {"flow": (0, 3, 5)}),
        (accelerators, "STIFF", {"stiff": "robertson"}), (accelerators, "ENVIRONMENT", {}),
        (accelerators, "RESULTS", tmp_path / "results.json"), (accelerators, "PAGE", page),
        (accelerators, "contenders", ours), (stiff, "ROWS", 3), (runner, "code", lambda: "abc"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    small = {"one": ("1 CPUs", "stiff"), "two": ("2 CPUs", "flow")}
    monkeypatch.setattr(accelerators.BENCHMARK, "cases", small)
    here = lambda name, case, *_: accelerators.BENCHMARK.run(case, fairness.Bench(0.0))
    monkeypatch.setattr(runner, "measure", here)
    assert accelerators.measured(Namespace(fresh=False)) == 0
    found = json.loads(accelerators.RESULTS.read_text())["cases"]
    assert [found[case]["failed"] for case in small] == [{}, {}]
    text = page.read_text()
    assert text.startswith("kept <!-- accelerators -->\n\n| 1 CPUs |")
    assert "\n| stiff | jaxode | full |" in text
    assert re.search(
        r"\n\| 2 CPUs \| flow \| jaxode, shard_map, joint steps \| \d+, \d+ bytes", text
    )
    monkeypatch.setattr(runner, "measure", None)  # an interrupted run goes on; nothing is left
    accelerators.measured(Namespace(fresh=False))
    assert page.read_text() == text


def test_the_scripts_behind_the_pictures_of_the_documentation(
    tmp_path, monkeypatch, default_settings
):
    """On tiny settings: errors fall with the tolerance, and the adjoint ODE needs less memory."""
    for other in set(adjoints.ADJOINTS) - {"DiscreteAdjoint()", "BacksolveAdjoint()"}:
        monkeypatch.delitem(adjoints.ADJOINTS, other)
    workload = problems.Workload(2, 4, (5,), steps=200)
    loose, tight = found = tolerance.measure(workload, (1e-1, 1e-5), ("Tsit5",))
    assert tight["gradient"] < loose["gradient"]
    assert tight["evaluations"] > loose["evaluations"]
    tolerance.draw({"rows": found}, tmp_path / "tolerance.png")
    measured = {"memory": adjoints.memory((4,)), "contraction": adjoints.contraction((1,))}
    states = {row["adjoint"]: row["states"] for row in measured["memory"]}
    assert states["BacksolveAdjoint()"] < states["DiscreteAdjoint()"]
    # The tolerance is 1e-5; the gradient multiplies the error by less than a hundred.
    assert all(row["error"] < 1e-3 for row in measured["contraction"])
    adjoints.draw(measured, tmp_path / "adjoints.png")
    loose, tight = adjoints.moving_mesh((1e-2, 1e-6))
    gap = lambda row: abs(row["gradient"] - row["finite difference of the computed loss"])
    # What the page on gradients says: they agree as the tolerance is tightened, and not before.
    assert gap(loose) > 1 > 1e-4 > gap(tight)
    assert {path.name for path in tmp_path.iterdir()} == {"tolerance.png", "adjoints.png"}
    measured = adjoints.modes(seconds=0.1, few=2, many=20)
    assert min(row["solves"] for row in measured if "jac" in row["mode"]) > 1


def of_plane(points):
    mean, deviation = points.mean(0), points.std(0)
    rho = np.corrcoef(points.T)[0, 1]
    return [*mean, *np.log(deviation), np.arctanh(0.999 * rho)]


def of_octiles(points):
    draws = points[~np.isnan(points)]
    a, b, c, d, e, f, g = np.quantile(draws, np.arange(1, 8) / 8)
    scale = f - b
    return [d, np.log(scale), (f + b - 2 * d) / scale, np.log((g - e + c - a) / scale),
            np.log(len(draws))]  # fmt: skip


def of_populations(points):
    _, *both = points.T
    mean, deviation = np.mean(both, axis=1), np.std(both, axis=1)
    prey, predators = y = (both - mean[:, None]) / deviation[:, None]
    before = [np.mean(row[lag:] * row[:-lag]) for lag in (1, 2) for row in y]
    return [*mean, *2 * np.log(deviation), *before, np.mean(prey * predators)]


BY_HAND = {
    summaries.mean_and_covariance: of_plane,
    summaries.octiles: of_octiles,
    summaries.wilkinson: of_populations,
}


@pytest.mark.parametrize("name", summaries.SIMULATORS)
def test_observations_have_statistics_made_by_hand(name, default_settings):
    simulator = summaries.SIMULATORS[name]
    theta, points = simulator.simulate(jax.random.key(0), 50)
    made = simulator.by_hand(points)
    assert len(theta) == len(points) == len(made)
    expected = BY_HAND[simulator.by_hand]
    points = np.asarray(points, float)
    # Correlations of almost one cost digits of float32.
    np.testing.assert_allclose(made, [expected(row) for row in points], rtol=1e-3, atol=1e-3)


def test_points_that_are_equal_have_statistics_too(default_settings):
    assert np.isfinite(summaries.mean_and_covariance(np.ones((1, 4, 2), "f"))).all()


def test_each_summary_of_a_series_is_a_context_for_its_posterior(
    monkeypatch, capsys, default_settings
):
    tiny = ("--match", "Lotka", "--seeds", "1", "--simulations", "60", "--steps", "3")
    monkeypatch.setattr(sys, "argv", ["summaries", *tiny])
    summaries.main()
    cells = r" \| [-\d.]+ ± 0.00, \d+ s" * 4
    assert re.search(rf"Lotka-Volterra, 20 times{cells}", capsys.readouterr().out)
