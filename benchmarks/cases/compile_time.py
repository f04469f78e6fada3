"""The first call: trace, compile and run, with no program in any cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import diffrax
import jax
import numpy as np
from jax.experimental.ode import odeint

import jaxode
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate_working, ratio, summary
from benchmarks.harness.problems import Workload, flow, neural_ode
from benchmarks.peers import flows, odes

TOLERANCE, BACKSOLVE = 1e-5, diffrax.BacksolveAdjoint()


def makers(size: Workload | dict[str, int]) -> dict[str, Any]:
    """Functions that make a step anew, so that nothing is found in a cache."""
    if isinstance(size, Workload):
        p = flow(size)
        return {
            "jaxode": lambda: flows.jaxode_step(p),
            "diffrax checkpointed": lambda: flows.diffrax_step(p),
            "diffrax checkpointed, dt0 given": lambda: flows.diffrax_step(p, dt0=-0.1),
            "diffrax backsolve": lambda: flows.diffrax_step(p, adjoint=BACKSOLVE),
            "jax odeint": lambda: flows.odeint_step(p),
        }
    q = neural_ode(**size)
    return {
        "jaxode": lambda: odes.jaxode_step(q),
        "jaxode.odeint": lambda: odes.odeint_step(q, jaxode.odeint),
        "diffrax checkpointed": lambda: odes.diffrax_step(q),
        "diffrax backsolve": lambda: odes.diffrax_step(q, BACKSOLVE),
        "jax odeint": lambda: odes.odeint_step(q, odeint),
    }


class CompileTime(Benchmark):
    title = "First call"
    header = ("", "", "s, median (min-max)")
    cases = {
        "flow, 8 Gaussians, a user's own field": Workload(2, 512, (64, 64, 64), own=True),
        "Neural ODE, state 4": {"state": 4, "width": 64, "batch": 256, "times": 20},
    }

    def run(self, case: str, bench: Bench) -> Result:
        failed: dict[str, str] = {}

        def first(make):
            jax.clear_caches()
            return make()(TOLERANCE)

        fresh = makers(self.cases[case])
        calls = {name: lambda make=make: first(make) for name, make in fresh.items()}
        # The first round is not counted: it also pays for what each library does once in a process.
        times = alternate_working(bench, failed, calls, least=3, most=7)
        ratios = {}
        for library in ("diffrax", "jax odeint"):
            theirs = [times[peer] for peer in times if peer.startswith(library)]
            if theirs and "jaxode" in times:
                ratios[library] = ratio(times["jaxode"], min(theirs, key=np.median))
        summaries = {name: summary(taken) for name, taken in times.items()}
        return {"failed": failed, "times": summaries, "ratios": ratios}

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            for name, t in result["times"].items():
                yield case, name, f"{t['median']:.2f} ({t['min']:.2f}-{t['max']:.2f})"


BENCHMARK = CompileTime()
