"""The first call: trace, compile and run, with no program in any cache."""

from typing import Any

import diffrax
import jax
import numpy as np
from jax.experimental.ode import odeint

import jaxode
from benchmarks import flows, neural_ode_step, report
from benchmarks.fairness import Bench, alternate, attempt, ratio, summary, timed

TITLE = "First call"
SHORT = "first call"
TOLERANCE = 1e-5
CASES = {"flow, 8 Gaussians, a user's own field": "flow", "Neural ODE, state 4": "neural_ode"}
FLOW = flows.Workload(2, 512, (64, 64, 64), own=True)
NEURAL_ODE = {"state": 4, "width": 64, "batch": 256, "times": 20}


def makers(case: str) -> dict[str, Any]:
    """Functions that make a step anew, so that nothing is found in a cache."""
    checkpointed, backsolve = diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()
    if CASES[case] == "flow":
        p = flows.problem(FLOW)
        return {
            "jaxode": lambda: flows.jaxode_step(p),
            "diffrax checkpointed": lambda: flows.diffrax_step(p, diffrax.Tsit5(), checkpointed),
            "diffrax checkpointed, dt0 given": lambda: flows.diffrax_step(
                p, diffrax.Tsit5(), checkpointed, dt0=-0.1
            ),
            "diffrax backsolve": lambda: flows.diffrax_step(p, diffrax.Tsit5(), backsolve),
            "jax odeint": lambda: flows.odeint_step(p),
        }
    q = neural_ode_step.problem(**NEURAL_ODE)
    return {
        "jaxode": lambda: neural_ode_step.jaxode_step(q, jaxode.DiscreteAdjoint()),
        "jaxode.odeint": lambda: neural_ode_step.odeint_step(q, jaxode.odeint),
        "diffrax checkpointed": lambda: neural_ode_step.diffrax_step(q, checkpointed),
        "diffrax backsolve": lambda: neural_ode_step.diffrax_step(q, backsolve),
        "jax odeint": lambda: neural_ode_step.odeint_step(q, odeint),
    }


def run(case: str, bench: Bench) -> dict[str, Any]:
    failed: dict[str, str] = {}

    def first(make):
        jax.clear_caches()
        return make()(TOLERANCE)

    calls = {name: lambda make=make: first(make) for name, make in makers(case).items()}
    # The first round is not counted: it also pays for what each library does once in a process.
    calls = {n: c for n, c in calls.items() if attempt(bench, failed, n, lambda c=c: timed(c))}
    bench.announce("timing all")
    times = alternate(calls, bench.seconds, least=3, most=7)
    peers = [name for name in times if not name.startswith("jaxode")]
    ratios = {}
    for library in ("diffrax", "jax odeint"):
        theirs = [times[peer] for peer in peers if peer.startswith(library)]
        if theirs and "jaxode" in times:
            ratios[library] = ratio(times["jaxode"], min(theirs, key=np.median))
    return {
        "failed": failed, "times": {n: summary(t) for n, t in times.items()}, "ratios": ratios,
    }  # fmt: skip


def table(cases: dict[str, Any]) -> str:
    rows = [
        [case, name, f"{t['median']:.2f} ({t['min']:.2f}-{t['max']:.2f})"]
        for case, result in cases.items()
        for name, t in result["times"].items()
    ]
    return report.markdown(["", "", "s, median (min-max)"], rows)


def draw(cases: dict[str, Any], path: str) -> None:
    bars = {c: {n: t["median"] for n, t in r["times"].items()} for c, r in cases.items()}
    report.draw_bars(bars, path, TITLE, "s")


def sentence(cases: dict[str, Any]) -> str:
    parts = []
    for case, result in cases.items():
        medians = {n: t["median"] for n, t in result["times"].items()}
        best = min((n for n in medians if not n.startswith("jaxode")), key=medians.__getitem__)
        parts.append(f"{case}: {report.against(medians['jaxode'], medians[best], best)}")
    return "; ".join(parts) + "."
