"""Bulk evaluation: log-densities of 10,000 conditional rows, at 1e-3 nats.

Flows of the five parameters of SLCP, a task of sbibm, given its eight data, each by matching on
30,000 simulations. All that integrate get the same network and weights, float32, and the exact
trace; errors are the root mean square over a thousand rows. Spline flows take one pass and have no
such error: they stand beside, trained for as long as `SECONDS` says, with their nats of the rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases.ffjord_step import in_torch
from benchmarks.harness import show
from benchmarks.harness.benchmark import Contest, Result, Results, WorkPrecision
from benchmarks.harness.fairness import Bench, alternate, attempt, nats_error, summary
from benchmarks.harness.posterior_tasks import slcp
from benchmarks.harness.problems import OWN, Conditional, Posterior, conditional
from benchmarks.peers import densities

CHECKED = 1000  # rows whose error is looked at
SECONDS = 60.0  # of the training of a spline flow
ZUKO_DEFAULTS = {"atol": 1e-6, "rtol": 1e-5}
SPLINES: dict[str, Callable[[Conditional, float], Callable[[], Any]]] = {
    "flowjax, splines": densities.flowjax_spline,
    "zuko, NSF": densities.zuko_spline,
}


class Evaluate(WorkPrecision):
    title = "Bulk evaluation: log-densities of conditional rows"
    cases = {f"10,000 x 5 given 8, {OWN[own]}": Posterior(10_000, own) for own in (True, False)}
    error_of, error = "error in nats", staticmethod(nats_error)
    target = 1e-3
    limit = 2400.0
    groups = {
        "diffrax": ["diffrax", "diffrax vmap"],
        "zuko": ["zuko", "zuko with its defaults"],
        "jaxode with joint steps": ["jaxode joint"],
    }

    def contest(self, case: str) -> Contest:
        p = conditional(self.cases[case], slcp)
        makers = {
            "jaxode": lambda: densities.of_density(p),
            "jaxode joint": lambda: densities.of_flow(p),
            "diffrax": lambda: densities.of_diffrax(p),
            "diffrax vmap": lambda: densities.of_diffrax(p, per_sample=True),
            "zuko": lambda: in_torch().zuko_log_prob(p),
            "zuko with its defaults": lambda: in_torch().zuko_log_prob(p, **ZUKO_DEFAULTS),
        }
        check = lambda: in_torch().check_conditional(p)
        exact = lambda: densities.exact(p, CHECKED)
        return Contest(makers, exact, check, (1e-2, 1e-3, 1e-4, 1e-5, 1e-6))

    def run(self, case: str, bench: Bench) -> Result:
        result = super().run(case, bench)
        p, failed = conditional(self.cases[case], slcp), {}
        splines = {
            name: attempt(bench, failed, name, lambda train=train: train(p, SECONDS))
            for name, train in SPLINES.items()
        }
        calls = {name: call for name, call in splines.items() if call is not None}
        nats = {name: -float(np.mean(call())) for name, call in calls.items()}
        times = alternate(calls, bench.seconds / 3) if calls else {}
        one_pass = {name: {"nats": nats[name], **summary(times[name])} for name in calls}
        reference = -float(np.mean(densities.of_density(p)(1e-5)[1][0]))
        return {
            **result, "failed": result["failed"] | failed, "one_pass": one_pass, "nats": reference
        }  # fmt: skip

    def table(self, results: Results) -> str:
        parts = [super().table(results)]
        for case, result in results.items():
            rows = [["the flow above", f"{result['nats']:.3f}", ""]]
            rows += [
                [name, f"{row['nats']:.3f}", show.spread(row)]
                for name, row in result["one_pass"].items()
            ]
            header = ["one pass", "nats of these rows", "ms, median (min-max)"]
            parts.append(f"**{case}, beside spline flows**\n\n{show.markdown(header, rows)}")
        return "\n\n".join(parts)

    def brief(self, results: Results) -> str:
        """The ratios, and beside spline flows the nats of the same rows and the time."""
        beside = []
        for case, result in results.items():
            ms = show.ms(result["at_target"]["jaxode"]["median"])
            told = [f"the flow {result['nats']:.3f} nats in {ms} ms"]
            told += [
                f"{name} {row['nats']:.3f} in {show.ms(row['median'])}"
                for name, row in result["one_pass"].items()
            ]
            beside.append(f"{case}: {', '.join(told)}.")
        return f"{super().brief(results)}\n\n{' '.join(beside)}"


BENCHMARK = Evaluate()
