"""The training step when every sample has its own steps, as diffrax under vmap and torchode."""

from benchmarks.cases import ffjord_step
from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness.benchmark import Contest, WorkPrecision
from benchmarks.harness.problems import flow
from benchmarks.peers import flows

SIZE = "8 Gaussians, 512 x 2, 64-64-64"


class PerSample(WorkPrecision):
    title = "Training step with per-sample steps"
    cases = {
        case: workload for case, workload in ffjord_step.BENCHMARK.cases.items() if SIZE in case
    }
    target = 1e-3
    groups = {
        "best of diffrax": ["diffrax vmap Tsit5 checkpointed"],
        "torchode": ["torchode"],
        "jaxode with joint steps": ["jaxode joint"],
    }

    def contest(self, case: str) -> Contest:
        p = flow(self.cases[case])
        makers = {
            "jaxode": lambda: flows.jaxode_step(p, batch="per_sample"),
            "jaxode joint": lambda: flows.jaxode_step(p),
            "diffrax vmap Tsit5 checkpointed": lambda: flows.diffrax_step(p, per_sample=True),
            "torchode": lambda: in_torch().torchode_step(p),
        }
        check = lambda: in_torch().check_networks(p)
        return Contest(makers, lambda: flows.exact(p), check)


BENCHMARK = PerSample()
