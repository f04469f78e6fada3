"""Parameters of ODEs from noisy observations, from twenty starts that are far from the truth.

    make estimate                                     hours on one core; continue as you like
    python -m benchmarks estimate --match "Goodwin"   one problem

Rates of a start are log-uniform within a factor of ten of the truth. All contenders have the same
data, starts and parameters, which are logarithms of rates; `estimate_problems.py` has the problems,
`parameter_fits.py` the settings. A start ends at the truth if its cost, half the sum of squares, is
at most 1.02 times the least cost near the truth. One referee, SciPy's LSODA at 1e-8, computes all
costs; what a contender thinks of its own end does not count.

Seconds are those of one core's work for all starts, compilation included: other processes on the
machine do not count.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.cases.tables import own_core
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.estimate_problems import EXCESS, PROBLEMS, cost, least, observe
from benchmarks.harness.fairness import Bench, double_precision
from benchmarks.peers.parameter_fits import CONTENDERS

KEYS = {
    "at_truth": ("percent of starts that end at the truth", ".0f"),
    "seconds_of_fits": ("seconds of one core, all starts", ".1f"),
}


class Case(NamedTuple):
    problem: str
    contender: str

    @property
    def name(self) -> str:
        return f"{self.problem}: {self.contender}"


class Estimate(Benchmark):
    title = "Parameters of ODEs from far starts"
    timed = False  # each case has a core
    limit = 7200.0
    cases = {
        case.name: case
        for case in (Case(problem, name) for problem in PROBLEMS for name in CONTENDERS)
    }

    def run(self, case: str, bench: Bench) -> Result:
        problem, contender = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        own_core()
        with double_precision():
            data = observe(PROBLEMS[problem])
            bench.announce(contender)
            found = CONTENDERS[contender](data)
        lowest, costs = least(data), np.array([cost(data, params) for params in found.params])
        return {
            "starts": len(costs), "at_truth": 100 * float(np.mean(costs <= EXCESS * lowest)),
            "seconds_of_fits": round(found.seconds, 1), "least": lowest,
            "relative_costs": [
                round(float(each), 3) if np.isfinite(each) else None for each in costs / lowest
            ],
            **found.told,
        }  # fmt: skip

    def by_problem(self, results: Results) -> dict[str, dict[str, Result]]:
        found: dict[str, dict[str, Result]] = {}
        for case, result in results.items():
            problem, contender = self.cases[case]
            found.setdefault(problem, {})[contender] = result
        return found

    def table(self, results: Results) -> str:
        problems = self.by_problem(results)
        named = [name for name in CONTENDERS if any(name in row for row in problems.values())]

        def part(key: str) -> str:
            told, digits = KEYS[key]
            rows = []
            for problem, row in problems.items():
                cells = {name: f"{result[key]:{digits}}" for name, result in row.items()}
                rows.append([problem, *(cells.get(name, "") for name in named)])
            return show.markdown([told, *named], rows)

        return "\n\n".join([*map(part, KEYS), *adams(problems)])

    def brief(self, results: Results) -> str:
        problems = self.by_problem(results)
        named = [name for name in CONTENDERS if any(name in row for row in problems.values())]
        cell = lambda found: f"{found['at_truth']:.0f}, {found['seconds_of_fits']:.1f} s"
        rows = [
            [problem, *(cell(row[name]) if name in row else "" for name in named)]
            for problem, row in problems.items()
        ]
        return show.markdown([", ".join(told for told, _ in KEYS.values()), *named], rows)


def adams(problems: dict[str, dict[str, Result]]) -> Iterator[str]:
    """What Adam took, which the tables do not say."""
    told = [
        f"{result['steps']:,} steps at {result['rate']:g} on {problem}"
        for problem, row in problems.items()
        for result in row.values()
        if "rate" in result
    ]
    if told:
        yield f"Adam took {', '.join(told)}; seconds are those of this rate, the best of three."


BENCHMARK = Estimate()
