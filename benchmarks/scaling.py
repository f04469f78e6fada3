"""How the time of a training step of a flow grows, with one thing at a time.

All run at the same tolerance on trained networks, and their errors are given beside: what this
shows is growth. Which is faster at equal error is in `ffjord_step`.
"""

from typing import Any

import diffrax

from benchmarks import flows, report
from benchmarks.fairness import Bench, alternate, attempt, gradient_error, summary, timed

TITLE = "Growth of the time of a training step of a flow"
BASE: dict[str, Any] = {"dim": 8, "batch": 256, "width": 64, "tolerance": 1e-5}
CASES: dict[str, tuple[Any, ...]] = {  # what varies, the rest as in BASE
    "dim": (2, 16, 128),
    "batch": (32, 256, 2048),
    "width": (32, 128, 512),
    "tolerance": (1e-3, 1e-4, 1e-5, 1e-6),
}


def makers(p: flows.Problem) -> dict[str, Any]:
    checkpointed = diffrax.RecursiveCheckpointAdjoint()
    return {
        "jaxode": lambda: flows.jaxode_step(p),
        "diffrax checkpointed": lambda: flows.diffrax_step(p, diffrax.Tsit5(), checkpointed),
        "jax odeint": lambda: flows.odeint_step(p),
    }


def run(case: str, bench: Bench) -> dict[str, Any]:
    failed: dict[str, str] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    seconds = bench.seconds / len(CASES[case])
    for value in CASES[case]:
        at: dict[str, Any] = BASE | {case: value}
        workload = flows.Workload(at["dim"], at["batch"], 2 * (at["width"],), own=True, steps=800)
        p = flows.problem(workload)
        bench.announce("reference")
        exact = flows.reference(p)
        calls, errors = {}, {}
        for name, make in makers(p).items():
            step = make()
            call = lambda step=step, at=at: step(at["tolerance"])
            outcome = attempt(bench, failed, name, lambda call=call: timed(call))
            if outcome is not None:
                calls[name], errors[name] = call, gradient_error(outcome[1][1], exact)
        for name, times in alternate(calls, seconds).items():
            row = {"value": value, "error": errors[name], **summary(times)}
            curves.setdefault(name, []).append(row)
    return {"failed": failed, "curves": curves}


def table(cases: dict[str, Any]) -> str:
    parts = []
    for case, result in cases.items():
        header = ["ms / gradient error", *(f"{case} {value:g}" for value in CASES[case])]
        shown = lambda row: f"{report.ms(row['median'])} / {row['error']:.0e}" if row else ""
        rows = [
            [name, *(shown(at.get(value)) for value in CASES[case])]
            for name, curve in result["curves"].items()
            for at in ({row["value"]: row for row in curve},)
        ]
        parts.append(report.markdown(header, rows) + report.failures(result))
    return "\n\n".join(parts)


def draw(cases: dict[str, Any], path: str) -> None:
    panels = {
        case: {
            name: [(row["value"], 1e3 * row["median"]) for row in curve]
            for name, curve in result["curves"].items()
        }
        for case, result in cases.items()
    }
    report.draw_curves(panels, path, TITLE, "ms per step")


def sentence(cases: dict[str, Any]) -> str:
    parts = []
    for case, result in cases.items():
        grown = [
            f"{curve[-1]['median'] / curve[0]['median']:.1f}-fold ({name})"
            for name, curve in result["curves"].items()
        ]
        start, end = CASES[case][0], CASES[case][-1]
        parts.append(f"from {case} {start:g} to {end:g} the time grows {', '.join(grown)}")
    return "; ".join(parts) + "."
