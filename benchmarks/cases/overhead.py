"""What a solver's loop costs beside the vector field.

A solve with a known number of evaluations, and as many evaluations in a bare loop: the difference
is overhead, of each solver over its own number. For a training step the bare loops are of the work
that the algorithm needs at least: the evaluations of the forward solve, and for each accepted step
five stages differentiated backwards and three nodes of the divergence differentiated; one node more
at the start.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import jaxode
from benchmarks.cases.ffjord_step import SIZES
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate, attempt, ratio, summary, timed
from benchmarks.harness.problems import FlowProblem, Workload, batched, flow
from benchmarks.peers import flows

TOLERANCE = 1e-5


class Size(NamedTuple):
    workload: Workload
    step: bool = False
    """A training step, not a solve."""
    count: int = 50
    """Of evaluations in the bare loop."""


def jaxode_solution(m, x):
    return jaxode.solve(
        jaxode.nn.field, x, 1.0, 0.0, m, rtol=TOLERANCE, atol=TOLERANCE, throw=False,
        batch="joint",
    )  # fmt: skip


def diffrax_solution(m, x):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(batched), diffrax.Tsit5(), 1.0, 0.0, None, x, args=m, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
    )  # fmt: skip


def diffrax_evaluations(p: FlowProblem) -> int:
    """Six a step, one for its first stage, two for its first step size: diffrax counts steps."""
    return 6 * int(diffrax_solution(p.params, p.x).stats["num_steps"]) + 3


def repeated(body, p: FlowProblem, count: int):
    """`count` times `z <- z + 1e-3 body(t, z)`, in one compiled loop that cannot be shortened."""

    def loop(m, x, probe):
        def one(i, carry):
            z, total = carry
            dz, extra = body(i / count, z, m, probe)
            return z + 1e-3 * dz, jax.tree.map(jnp.add, total, extra)

        extra = jax.eval_shape(body, jnp.float32(0), x, m, probe)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), extra)
        return jax.lax.fori_loop(0, count, one, (x, zeros))

    return lambda loop=jax.jit(loop): loop(p.params, p.x, p.probe)


def evaluation(t, z, m, probe):
    return batched(t, z, m), ()


def stage(t, z, m, probe):
    """The product of a cotangent with the Jacobian of the field, for state and parameters."""
    _, vjp = jax.vjp(lambda m, z: batched(t, z, m), m, z)
    parameters, state = vjp(probe)
    return state, parameters


def node(t, z, m, probe):
    """The estimate of the divergence and its gradient, for state and parameters."""
    total = lambda m, z: jnp.sum(flows.augmented(t, (z,), m, probe)[1])
    value, (parameters, state) = jax.value_and_grad(total, (0, 1))(m, z)
    return state, (value, parameters)


class Overhead(Benchmark):
    title = "Loop overhead"
    header = ("", "", "ms, median (min-max)", "bare loops", "ratio", "evaluations of the field")
    cases = {
        "solve, 256 x 64, 352-352": Size(Workload(64, 256, (352, 352))),
        "training step, 8 Gaussians": Size(SIZES["8 Gaussians, 512 x 2, 64-64-64"], step=True),
    }

    def run(self, case: str, bench: Bench) -> Result:
        workload, step, count = self.cases[case]
        p = flow(workload)
        solve = jax.jit(jaxode_solution)
        stats = solve(p.params, p.x).stats
        evaluations, accepted = {"jaxode": int(stats.num_evals)}, int(stats.num_accepted)
        work: dict[str, int] = {"field": evaluations["jaxode"]}
        bare = {"field": evaluation}
        calls: dict[str, Any] = {}
        if step:
            training = flows.jaxode_step(p)
            calls["jaxode"] = lambda: training(TOLERANCE)
            work |= {"stage": 5 * accepted, "node": 3 * accepted + 1}
            bare |= {"stage": stage, "node": node}
        else:
            of_diffrax = jax.jit(lambda m, x: diffrax_solution(m, x).ys)
            calls |= {"jaxode": lambda: solve(p.params, p.x)}
            calls |= {"diffrax": lambda: of_diffrax(p.params, p.x)}
            evaluations["diffrax"] = diffrax_evaluations(p)
        calls |= {name: repeated(body, p, count) for name, body in bare.items()}
        failed: dict[str, str] = {}
        calls = {n: c for n, c in calls.items() if attempt(bench, failed, n, lambda c=c: timed(c))}
        times = alternate(calls, bench.seconds)
        rounds = range(len(times["field"]))
        limits = {"jaxode": [sum(times[n][i] * work[n] / count for n in work) for i in rounds]}
        if "diffrax" in times:
            limits["diffrax"] = [t * evaluations["diffrax"] / count for t in times["field"]]
        contenders = {n: times[n] for n in limits if n in times}
        return {
            "failed": failed, "evaluations": evaluations, "accepted": accepted,
            "rejected": int(stats.num_rejected),
            "evaluation": summary([t / count for t in times["field"]]),
            "times": {n: summary(t) for n, t in contenders.items()},
            "bare": {n: summary(t) for n, t in limits.items()},
            "over_limit": {n: ratio(t, limits[n]) for n, t in contenders.items()},
            "ratios": {"bare loops": ratio(times["jaxode"], limits["jaxode"])},
        }  # fmt: skip

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            for name, time in result["times"].items():
                told = f"{result['over_limit'][name]:.2f}", str(result["evaluations"][name])
                yield case, name, show.spread(time), show.spread(result["bare"][name]), *told

    def draw(self, results: Results) -> Figure:
        groups = {
            case: {
                label: 1e3 * t["median"]
                for n in r["times"]
                for label, t in ((n, r["times"][n]), (f"{n}: its bare loops", r["bare"][n]))
            }
            for case, r in results.items()
        }
        return show.bars(groups, "ms")


BENCHMARK = Overhead()
