"""The training step when every sample has its own steps, as diffrax under vmap and torchode."""

import diffrax

from benchmarks.cases import ffjord_step
from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness.benchmark import Contest, WorkPrecision
from benchmarks.harness.problems import flow
from benchmarks.peers import flows

SIZE = "8 Gaussians, 512 x 2, 64-64-64"
DIFFRAX = {
    "diffrax vmap Tsit5 checkpointed": diffrax.RecursiveCheckpointAdjoint(),
    "diffrax vmap Tsit5 backsolve": flows.seminorm_backsolve,
}


class PerSample(WorkPrecision):
    title = "Training step with per-sample steps"
    cases = {
        case: workload for case, workload in ffjord_step.BENCHMARK.cases.items() if SIZE in case
    }
    target = 1e-3
    groups = {
        "best of diffrax": list(DIFFRAX),
        "torchode": ["torchode"],
        "jaxode with joint steps": ["jaxode joint"],
    }

    def contest(self, case: str) -> Contest:
        p = flow(self.cases[case])
        by_diffrax = lambda adjoint: flows.diffrax_step(
            p, diffrax.Tsit5(), adjoint, per_sample=True
        )
        makers = {
            "jaxode": lambda: flows.jaxode_step(p, batch="per_sample"),
            "jaxode joint": lambda: flows.jaxode_step(p),
            **{name: lambda a=adjoint: by_diffrax(a) for name, adjoint in DIFFRAX.items()},
            "torchode": lambda: in_torch().torchode_step(p),
        }
        check = lambda: in_torch().check_networks(p)
        return Contest(makers, lambda: flows.exact(p), check)


BENCHMARK = PerSample()
