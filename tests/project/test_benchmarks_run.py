"""Every benchmark runs to its end, at a size of seconds: its contenders, table, picture, sentence.

Contenders whose library is installed for benchmarks only are left out, as the runner does.
`accelerators` is not among them: it compiles with libraries that only its own environment has.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import (
    BENCHMARKS,
    fairness,
    ffjord_step,
    flows,
    neural_ode_step,
    posterior,
    regularizers,
    tables,
    time_to_nll,
)

FLOW = flows.Workload(3, 8, (5, 6), steps=20)
ODE = {"state": 4, "width": 4, "batch": 4, "times": 2}
TOLERANCES = (1e-5,)  # reaches the error at which times are compared

# Constants of each benchmark at a tiny size; CASES too, where a case is itself a size.
TINY = {
    "ffjord_step": {
        "CASES": {"tiny": (FLOW, TOLERANCES)},
        "DIFFRAX": {name: way for name, way in ffjord_step.DIFFRAX.items() if "Tsit5" in name},
    },
    "neural_ode_step": {"CASES": {"tiny": ODE}, "TOLERANCES": TOLERANCES},
    "per_sample": {"CASES": {"tiny": FLOW}, "TOLERANCES": TOLERANCES},
    "ragged": {"CASES": {"tiny": (4, 3)}, "LARGE": 64, "TOLERANCES": TOLERANCES},
    "overhead": {
        "CASES": {"solve": {"workload": FLOW}, "training step": {"workload": FLOW, "step": True}},
        "COUNT": 2,
    },
    "divergence": {
        "CASES": {"2 dimensions": 2, "noise, trained": 32},
        "TRAINED": {"noise, trained": 32},
        "STEPS": 2, "WIDTH": 4, "BATCH": 4, "DRAWS": 2,
    },
    "regularizers": {
        "CASES": {name: regularizers.CASES[name] for name in ("none", "STEER: steer=0.1")},
        "SEEDS": (0,), "STEPS": 2, "BATCH": 4, "WIDTHS": (4,),
    },
    "compile_time": {
        "CASES": {"Neural ODE": "neural_ode"}, "FLOW": FLOW, "NEURAL_ODE": ODE,
    },
    "memory": {
        "CASES": {"batch": (2,)},
        "BASE": {"max_steps": 16, "width": 4, "batch": 2, "dim": 3},
    },
    "scaling": {
        "CASES": {"batch": (2,)},
        "BASE": {"dim": 3, "batch": 2, "width": 4, "tolerance": 1e-3},
    },
    "sharding": {"CASES": {"8 devices": 8}, "WORKLOAD": FLOW},
    "cores": {"CASES": {"tiny": FLOW}, "TOLERANCES": TOLERANCES, "device_count": lambda: 8},
}  # fmt: skip
FAILS = {("benchmarks.sharding", "diffrax, shard_map")}  # inside of diffrax; RESULTS.md says so
PROBLEM, REFERENCE = flows.problem, flows.reference

_made = {}


def once(make, argument, name):
    if name not in _made:
        _made[name] = make(argument)
    return _made[name]


@pytest.fixture
def quick(default_settings, monkeypatch):
    """Each network is trained once, and nothing is timed: whatever would be, has run before."""
    untimed = lambda calls, *args, **kwargs: {call: [1.0 + i] for i, call in enumerate(calls)}
    monkeypatch.setattr(fairness, "alternate", untimed)
    monkeypatch.setattr(flows, "problem", lambda workload: once(PROBLEM, workload, workload))
    monkeypatch.setattr(flows, "reference", lambda p: once(REFERENCE, p, id(p)))
    monkeypatch.setattr(neural_ode_step, "STEPS", 2)
    return untimed


def run(module, case, picture, seconds=float("inf")):
    """The result of a case as the runner keeps it, after it was reported."""
    result = module.run(case, fairness.Bench(seconds))
    assert "crashed" not in result, result
    for name, reason in result.get("failed", {}).items():
        known = (module.__name__, name) in FAILS or reason.startswith("ModuleNotFoundError")
        assert known, (name, reason)
    result = json.loads(json.dumps(result)) | {"code": "abc"}
    module.draw({case: result}, str(picture))
    assert module.table({case: result})
    assert module.sentence({case: result})
    assert picture.stat().st_size > 0
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    if name in ("sharding", "cores") and not hasattr(jax.lax, "pcast"):
        pytest.skip("needs JAX 0.8 or newer")
    module = importlib.import_module(f"benchmarks.{name}")
    for constant, value in TINY[name].items():
        monkeypatch.setattr(module, constant, value)
    if hasattr(module, "alternate"):
        monkeypatch.setattr(module, "alternate", quick)
    for case in module.CASES:
        run(module, case, tmp_path / "picture.png")


@pytest.mark.parametrize("name", time_to_nll.PHASES)
def test_every_training_to_a_likelihood_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    library = name.replace(",", "").split()[0]
    pytest.importorskip(library, reason=f"{library} is installed for benchmarks only: make bench")
    x = flows.eight_gaussians(np.random.default_rng(0), 16)
    task = time_to_nll.Task(lambda: time_to_nll.Data(x, x[:8]), FLOW.widths, 4, level=1e9)
    phases = [phase._replace(steps=2, block=2) for phase in time_to_nll.PHASES[name]]
    monkeypatch.setattr(time_to_nll, "TASKS", {"tiny": task})
    monkeypatch.setattr(time_to_nll, "PHASES", {name: phases})
    monkeypatch.setattr(time_to_nll, "CASES", {"case": ("tiny", name, 0)})
    result = run(time_to_nll, "case", tmp_path / "picture.png")
    assert result["steps"] == 2 * len(phases)


@pytest.mark.slow
@pytest.mark.parametrize("name", posterior.CONTENDERS)
def test_every_posterior_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    library = name.split(",")[0]
    pytest.importorskip(library, reason=f"{library} is installed for benchmarks only: make bench")
    sizes = {
        "SIMULATIONS": 200, "HELD_OUT": 20, "SAMPLES": 20, "OBSERVATIONS": 1, "WIDTH": 4,
        "DEPTH": 1, "BATCH": 4, "MATCHING": (20, 1e-3, 0.1), "LIKELIHOOD": (20, 1e-3, 0.1),
    }  # fmt: skip
    for constant, value in sizes.items():
        monkeypatch.setattr(posterior, constant, value)
    samples = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    monkeypatch.setattr(posterior, "reference", lambda task, number: (samples[number], samples))
    run(posterior, f"two moons: {name}", tmp_path / "picture.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.CONTENDERS)
def test_every_estimator_of_tables_runs_to_its_end(name, quick, monkeypatch, tmp_path):
    library = name.split()[0].lower()
    if library in ("torchcfm", "zuko", "flowjax"):
        pytest.importorskip(library, reason=f"{library} is installed for benchmarks: make bench")
    monkeypatch.setattr(tables, "time", Ticks())
    monkeypatch.setattr(tables, "own_core", lambda: None)  # this process runs other tests, too
    monkeypatch.setattr(tables, "TIMES", (1.5,))
    x = np.random.default_rng(0).standard_normal((120, 3))
    monkeypatch.setattr(tables, "TABLES", {"banana": lambda: x})
    case = f"banana: {name}, seed 0"
    result = run(tables, case, tmp_path / "picture.png", seconds=2.5)
    assert (result["rows"], result["columns"]) == (96, 3)
    assert [float(end) for end in result["scores"]] == [1.5, 2.5]
    # A standard normal has 4.26 nats; nothing has learned much else in a few steps.
    assert all(3 < score["nats"] < 8 for score in result["scores"].values())


class Ticks:
    """A clock by which each candidate takes a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.5
        return self.now
