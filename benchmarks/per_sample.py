"""The training step when every sample has its own steps, as diffrax under vmap and torchode."""

from typing import Any

import diffrax

from benchmarks import ffjord_step, flows, report
from benchmarks.fairness import Bench, check_same, work_precision
from benchmarks.ffjord_step import in_torch

TITLE = "Training step with per-sample steps"
SIZE, TOLERANCES = "8 Gaussians, 512 x 2, 64-64-64", (1e-3, 1e-4, 1e-5, 1e-6)
CASES = {case: workload for case, (workload, _) in ffjord_step.CASES.items() if SIZE in case}
TARGET = 1e-3
DIFFRAX = {
    "diffrax vmap Tsit5 checkpointed": diffrax.RecursiveCheckpointAdjoint(),
    "diffrax vmap Tsit5 backsolve": flows.seminorm_backsolve,
}
GROUPS = {
    "best of diffrax": list(DIFFRAX),
    "torchode": ["torchode"],
    "jaxode with joint steps": ["jaxode joint"],
}


def run(case: str, bench: Bench) -> dict[str, Any]:
    p, failed = flows.problem(CASES[case]), {}
    check_same(failed, "the same network in PyTorch", lambda: in_torch().check_networks(p))
    makers = {
        "jaxode": lambda: flows.jaxode_step(p, batch="per_sample"),
        "jaxode joint": lambda: flows.jaxode_step(p),
        **{
            name: lambda adjoint=adjoint: flows.diffrax_step(
                p, diffrax.Tsit5(), adjoint, per_sample=True
            )
            for name, adjoint in DIFFRAX.items()
        },
        "torchode": lambda: in_torch().torchode_step(p),
    }
    bench.announce("reference")
    exact = flows.reference(p)
    result = work_precision(bench, makers, exact, TOLERANCES, TARGET, GROUPS)
    result["failed"] |= failed
    return result


def table(cases: dict[str, Any]) -> str:
    return report.work_precision_tables(cases)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_work_precision(cases, path, TITLE)


def sentence(cases: dict[str, Any]) -> str:
    return report.work_precision_sentence(cases)
