"""Every benchmark runs to its end, at a size of seconds: its contenders, table, picture.

Contenders whose library is installed for benchmarks only are left out, as the runner does.
`accelerators` is not among them: it compiles with libraries that only its own environment has.
"""

import json
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cases
from benchmarks.cases import (
    compile_time,
    cores,
    divergence,
    energy,
    evaluate,
    ffjord_step,
    memory,
    posterior,
    ragged,
    regularizers,
    rows,
    stiff,
    tables,
)
from benchmarks.cases import time_to_nll as to_level
from benchmarks.harness import benchmark, fairness, problems, show
from benchmarks.peers import estimators, flows, odes

pytestmark = pytest.mark.shown
# The same for all, so that the steps are compiled once.
FLOW = problems.Workload(3, 8, (5, 5), own=True)
ODE = {"state": 4, "width": 4, "batch": 4, "times": 2, "own": True}
MAX_STEPS = 4096  # the default of all
KINDS = ("RNODE: both, (0.05), (0.02)", "STEER: steer=0.1")
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
    "overhead": {"solve": FLOW},
    "divergence": {
        name: divergence.Size(dim, noise, noise, width=4, batch=4, draws=2, steps=2)
        for name, dim, noise in (("2 dimensions", 2, False), ("noise, trained", 32, True))
    },
    "regularizers": {name: regularizers.BENCHMARK.cases[name] for name in KINDS},
    "energy": {
        "wells": energy.Wells(4, steps=2, batch=4, width=4, samples=16),
        "phi^4": energy.Sites(3, steps=2, batch=4, samples=16),
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

AT_EQUAL_ERROR = ("ffjord_step", "neural_ode_step", "per_sample", "evaluate", "ragged", "cores")

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


def run(name, case, picture, seconds=float("inf")):
    """The result of a case as the runner keeps it, after it was reported."""
    chosen = cases.load(name)
    result = chosen.run(case, fairness.Bench(seconds))
    assert "crashed" not in result, result
    for contender, reason in result.get("failed", {}).items():
        assert reason.startswith("ModuleNotFoundError"), (contender, reason)
    for contender, curve in result["curves"].items() if name in AT_EQUAL_ERROR else ():
        assert curve[0]["error"] < 2e-3, contender  # float32, and a tolerance of 1e-5
    result = json.loads(json.dumps(result)) | {"code": "abc"}
    show.save(chosen.draw({case: result}), chosen.title, picture)
    assert chosen.table({case: result})
    assert picture.stat().st_size > 0
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.BENCHMARKS)
def test_every_benchmark_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    if name == "cores" and not hasattr(jax.lax, "pcast"):
        pytest.skip("needs JAX 0.8 or newer")
    chosen = cases.load(name)
    monkeypatch.setattr(cores, "device_count", lambda: 8)
    monkeypatch.setattr(evaluate, "SECONDS", 0.1)
    # One of the solvers, and one number of products: the others are the same code.
    tsit5 = {name: way for name, way in ffjord_step.DIFFRAX.items() if "Tsit5" in name}
    monkeypatch.setattr(ffjord_step, "DIFFRAX", tsit5)
    for solvers in (stiff.OURS, stiff.THEIRS):
        for other in [*solvers][1:]:
            monkeypatch.delitem(solvers, other)
    least = {name: dict([*by.items()][:1]) for name, by in divergence.by_noise().items()}
    monkeypatch.setattr(divergence, "by_noise", lambda: least)
    for attribute, value in ({"cases": TINY[name]} | BESIDES.get(name, {})).items():
        monkeypatch.setattr(chosen, attribute, value)
    for case in chosen.cases:
        run(name, case, tmp_path / "picture.png")
        monkeypatch.setattr(stiff, "THEIRS", {})  # one case has them


def needs(library):
    if library in ("torchcfm", "torchdiffeq", "zuko", "flowjax", "sbi"):
        pytest.importorskip(library, reason=f"{library} is installed for benchmarks: make bench")


# `make test` runs the loop and its report with trainings that are made up. Matching alone is the
# first phase of matching and then likelihood.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in to_level.PHASES if name != "jaxode, Residual, matching"]
)
def test_every_training_to_a_likelihood_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    needs(name.replace(",", "").split()[0])
    x = problems.eight_gaussians(np.random.default_rng(0), 16)
    task = to_level.Task(lambda: to_level.Data(x, x[:8]), FLOW.widths, 4, level=1e9)
    phases = [phase._replace(steps=2, block=2) for phase in to_level.PHASES[name]]
    if "transport" in name:
        del phases[1:]  # likelihood, as after matching
    monkeypatch.setattr(to_level, "TASKS", {"tiny": task})
    monkeypatch.setitem(to_level.PHASES, name, phases)
    monkeypatch.setattr(to_level.BENCHMARK, "cases", {"case": ("tiny", name, 0)})
    result = run("time_to_nll", "case", tmp_path / "picture.png")
    assert result["steps"] == 2 * len(phases)


@pytest.mark.slow
@pytest.mark.parametrize("name", posterior.CONTENDERS)
def test_every_posterior_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    needs(name.split(",")[0].split(".")[0])
    fit = {"steps": 2, "batch_size": 4, "time_power": 2.0}
    network = {"width": 4, "blocks": 1}
    monkeypatch.setattr(posterior.BENCHMARK, "size", posterior.Size(200, 20, network, fit))
    monkeypatch.setattr(posterior, "OBSERVATIONS", 1)
    samples = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    monkeypatch.setattr(posterior, "reference", lambda task, number: (samples[number], samples))
    with joblib.parallel_config("sequential"):
        run("posterior", f"two moons: {name}", tmp_path / "picture.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", posterior.TASKS)
def test_every_task_has_the_likelihood_of_its_simulator(name, default_settings):
    """Whose ratio has mean one, for any other parameters."""
    task, scale = posterior.TASKS[name], 1.003
    theta, x = task.simulate(jax.random.key(0), 20_000)
    if name == "slcp":  # where its Gaussian is not nearly flat
        wide = ((jnp.abs(theta[:, 2:]) > 0.5) & (jnp.abs(theta[:, 2:]) < 2.0)).all(axis=1)
        theta, x = theta[wide], x[wide]
    log_joint = jax.vmap(task.log_joint)
    ratio = jnp.exp(log_joint(scale * theta, x) - log_joint(theta, x))
    prior = 1.0 if task.bounds else scale ** -theta.shape[1]
    assert abs(float(ratio.mean()) / prior - 1) < 0.01
    assert float(jnp.std(ratio)) > 0.01


# Of contenders that share their settings, one has them all; widths are one.
ALL_OF_THEM = ("jaxode", "torchcfm", "zuko NSF", "flowjax coupling")
SETTINGS = [
    (name, setting)
    for name, each in estimators.CONTENDERS.items()
    for setting in each.settings
    if not setting or (name in ALL_OF_THEM and setting != "width 256")
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fit.seconds")  # a few steps are enough here
@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_estimator_of_tables_runs_to_its_end(name, setting, quick, monkeypatch, tmp_path):
    library = name.split()[0].lower()
    needs(library)
    monkeypatch.setattr(tables, "time", Ticks())
    monkeypatch.setattr(tables, "own_core", lambda: None)  # this process runs other tests, too
    monkeypatch.setattr(tables, "TIMES", () if setting else (1.5,))
    monkeypatch.setattr(estimators, "OF_FIELD", (2, 1.15))
    monkeypatch.setattr(estimators, "OF_MAP", (2, 1.05))
    if library in ("jaxode", "torchcfm"):  # of one block in place of three, which are the same code
        one = {width: size | {"blocks": 1} for width, size in estimators.WIDTHS.items()}
        contender = estimators.CONTENDERS[name]._replace(settings=one)
        monkeypatch.setitem(estimators.CONTENDERS, name, contender)
    x = np.random.default_rng(0).standard_normal((120, 3))
    monkeypatch.setattr(tables, "TABLES", {"banana": lambda: x})
    case = tables.Case("banana", name, setting, 0)
    result = run("tables", case.name, tmp_path / "picture.png", seconds=2.5)
    assert (result["rows"], result["columns"]) == (96, 3)
    assert result["times"] == list(result["scores"]) == ["1.5", "2.5"][bool(setting) :]
    # A standard normal has 4.26 nats; nothing has learned much else in a few steps.
    assert all(3 < score["nats"] < 8 for score in result["scores"].values())


class Ticks:
    """A clock by which each candidate takes a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.5
        return self.now
