"""Benchmarks against other libraries; `python -m benchmarks` runs them."""

BENCHMARKS = (
    "ffjord_step", "neural_ode_step", "per_sample", "ragged", "overhead", "divergence",
    "regularizers", "compile_time", "memory", "scaling", "sharding", "cores",
)  # fmt: skip
ON_ITS_OWN = ("time_to_nll", "posterior", "tables")
