"""The benchmarks, a file each. The names are in the order of RESULTS.md."""

import importlib

from benchmarks.harness.benchmark import Benchmark

BENCHMARKS = (
    "ffjord_step", "neural_ode_step", "per_sample", "evaluate", "ragged", "rows", "stiff",
    "images", "angles", "overhead", "divergence", "regularizers", "energy", "compile_time",
    "memory", "cores",
)  # fmt: skip
ON_ITS_OWN = (
    "time_to_nll", "posterior", "tables", "regression", "mixed", "estimate", "series",
)  # fmt: skip


def load(name: str) -> Benchmark:
    return importlib.import_module(f"benchmarks.cases.{name}").BENCHMARK
