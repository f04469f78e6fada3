"""How the time of a training step of a flow grows, with one thing at a time.

All run at the same tolerance on trained networks, and their errors are given beside: what this
shows is growth. Which is faster at equal error is in `ffjord_step`.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import show
from benchmarks.harness.benchmark import Growth, Point, Result, Results
from benchmarks.harness.fairness import Bench, alternate, attempt, gradient_error, summary, timed
from benchmarks.harness.problems import Workload, flow
from benchmarks.peers import flows


class Scaling(Growth):
    title = "Growth of the time of a training step of a flow"
    base = {"dim": 8, "batch": 256, "width": 64, "tolerance": 1e-5}
    training: dict[str, Any] = {"own": True, "steps": 800}
    cases = {
        "dim": (2, 16, 128),
        "batch": (32, 256, 2048),
        "width": (32, 128, 512),
        "tolerance": (1e-3, 1e-4, 1e-5, 1e-6),
    }
    unit, heading = "ms per step", "ms / gradient error"

    def run(self, case: str, bench: Bench) -> Result:
        failed: dict[str, str] = {}
        curves: dict[str, list[dict[str, float]]] = {}
        for value in self.cases[case]:
            at: dict[str, Any] = {**self.base, case: value}
            size = at["dim"], at["batch"], 2 * (at["width"],)
            p = flow(Workload(*size, **self.training))
            bench.announce("reference")
            exact = flows.exact(p)
            makers = {
                "jaxode": flows.jaxode_step,
                "diffrax checkpointed": flows.diffrax_step,
                "jax odeint": flows.odeint_step,
            }
            calls, errors = {}, {}
            for name, make in makers.items():
                call = lambda step=make(p), at=at: step(at["tolerance"])
                outcome = attempt(bench, failed, name, lambda call=call: timed(call))
                if outcome is not None:
                    calls[name], errors[name] = call, gradient_error(outcome[1][1], exact)
            for name, times in alternate(calls, bench.seconds / len(self.cases[case])).items():
                row = {"value": value, "error": errors[name], **summary(times)}
                curves.setdefault(name, []).append(row)
        return {"failed": failed, "curves": curves}

    def point(self, row: dict[str, float]) -> Point:
        cell = f"{show.ms(row['median'])} / {row['error']:.0e}"
        return Point(row["value"], 1e3 * row["median"], cell)

    def told(self, results: Results) -> Iterator[str]:
        for case, result in results.items():
            grown = [
                f"{curve[-1]['median'] / curve[0]['median']:.1f}-fold ({name})"
                for name, curve in result["curves"].items()
            ]
            start, end = (self.cases[case][at] for at in (0, -1))
            yield f"from {case} {start:g} to {end:g} the time grows {', '.join(grown)}"


BENCHMARK = Scaling()
