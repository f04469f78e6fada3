"""What a solver's loop costs beside the vector field.

A solve with a known number of evaluations, and as many evaluations in a bare loop: the difference
is overhead, of each solver over its own number.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import diffrax
import jax

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate_working, ratio, summary
from benchmarks.harness.problems import FlowProblem, Workload, batched, flow

TOLERANCE = 1e-5


def by_jaxode(m, x):
    """The state and the number of evaluations."""
    solution = jaxode.solve(
        jaxode.nn.field, x, 1.0, 0.0, m, rtol=TOLERANCE, atol=TOLERANCE, throw=False,
        batch="joint",
    )  # fmt: skip
    return solution.y1, solution.stats.num_evals


def by_diffrax(m, x):
    """diffrax counts steps: six evaluations each, one for the first stage, two for its size."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(batched), diffrax.Tsit5(), 1.0, 0.0, None, x, args=m, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
    )  # fmt: skip
    return solution.ys, 6 * solution.stats["num_steps"] + 3


def bare_loop(p: FlowProblem, count: int):
    """`count` times `z <- z + 1e-3 f(t, z)`, in one compiled loop that cannot be shortened."""

    @jax.jit
    def loop(m, x):
        one = lambda i, z: z + 1e-3 * batched(i / count, z, m)
        return jax.lax.fori_loop(0, count, one, x)

    return partial(loop, p.params, p.x)


class Overhead(Benchmark):
    title = "Loop overhead"
    header = ("", "", "ms, median (min-max)", "bare loops", "ratio", "evaluations of the field")
    cases = {"solve, 256 x 64, 352-352": Workload(64, 256, (352, 352))}
    count = 50
    """Of evaluations in the bare loop."""

    def run(self, case: str, bench: Bench) -> Result:
        p, failed = flow(self.cases[case]), {}
        solves = {"jaxode": jax.jit(by_jaxode), "diffrax": jax.jit(by_diffrax)}
        calls = {name: partial(solve, p.params, p.x) for name, solve in solves.items()}
        times = alternate_working(bench, failed, calls | {"bare": bare_loop(p, self.count)})
        each = [t / self.count for t in times.pop("bare")]
        evaluations = {name: int(calls[name]()[1]) for name in times}
        bare = {name: [t * evaluations[name] for t in each] for name in times}
        over = {name: ratio(times[name], bare[name]) for name in times}
        return {
            "failed": failed, "evaluations": evaluations, "over_limit": over,
            "times": {name: summary(t) for name, t in times.items()},
            "bare": {name: summary(t) for name, t in bare.items()},
            "ratios": {"bare loops": over["jaxode"]},
        }  # fmt: skip

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            for name, time in result["times"].items():
                told = f"{result['over_limit'][name]:.2f}", str(result["evaluations"][name])
                yield case, name, show.spread(time), show.spread(result["bare"][name]), *told

    def brief(self, results: Results) -> str:
        return ""  # no peer in the ratio


BENCHMARK = Overhead()
