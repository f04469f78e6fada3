"""What a solver's loop costs beside the vector field.

A solve with a known number of evaluations, and as many evaluations in a bare loop: the difference
is overhead, of each solver over its own number. For a training step the bare loops are of the work
that the algorithm needs at least: the evaluations of the forward solve, and for each accepted step
five stages differentiated backwards and three nodes of the divergence differentiated; one node more
at the start.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import Bench, alternate, attempt, ratio, summary, timed

TITLE = "Loop overhead"
TOLERANCE, COUNT = 1e-5, 50
CASES: dict[str, dict[str, Any]] = {
    "solve, 256 x 64, 352-352": {"workload": flows.Workload(64, 256, (352, 352))},
    "training step, 8 Gaussians": {
        "workload": flows.Workload(2, 512, (64, 64, 64)), "step": True,
    },
}  # fmt: skip


def run(case: str, bench: Bench) -> dict[str, Any]:
    p = flows.problem(CASES[case]["workload"])
    stats = forward_stats(p)
    evaluations, accepted = {"jaxode": int(stats.num_evals)}, int(stats.num_accepted)
    work, calls = {"field": evaluations["jaxode"]}, {"field": tight_field(p)}
    if CASES[case].get("step"):
        step = flows.jaxode_step(p)
        calls |= {"jaxode": lambda: step(TOLERANCE), "stage": tight_stage(p), "node": tight_node(p)}
        work |= {"stage": 5 * accepted, "node": 3 * accepted + 1}
    else:
        calls |= {"jaxode": jaxode_solve(p), "diffrax": diffrax_solve(p)}
        evaluations["diffrax"] = diffrax_evaluations(p)
    failed: dict[str, str] = {}
    calls = {n: c for n, c in calls.items() if attempt(bench, failed, n, lambda c=c: timed(c))}
    times = alternate(calls, bench.seconds)
    rounds = range(len(times["field"]))
    limits = {"jaxode": [sum(times[n][i] * work[n] / COUNT for n in work) for i in rounds]}
    if "diffrax" in times:
        limits["diffrax"] = [t * evaluations["diffrax"] / COUNT for t in times["field"]]
    contenders = {n: times[n] for n in limits if n in times}
    return {
        "failed": failed, "evaluations": evaluations, "accepted": accepted,
        "rejected": int(stats.num_rejected),
        "evaluation": summary([t / COUNT for t in times["field"]]),
        "times": {n: summary(t) for n, t in contenders.items()},
        "bare": {n: summary(t) for n, t in limits.items()},
        "over_limit": {n: ratio(t, limits[n]) for n, t in contenders.items()},
        "ratios": {"bare loops": ratio(times["jaxode"], limits["jaxode"])},
    }  # fmt: skip


def field(t, z, params):
    return jax.vmap(lambda z: params(t, z))(z)


def forward_stats(p: flows.Problem):
    solve = lambda m, x: jaxode.solve(
        jaxode.nn.field, x, 1.0, 0.0, m, rtol=TOLERANCE, atol=TOLERANCE, throw=False,
        batch="joint",
    ).stats  # fmt: skip
    return jax.jit(solve)(p.params, p.x)


def jaxode_solve(p: flows.Problem):
    solve = lambda m, x: jaxode.solve(
        jaxode.nn.field, x, 1.0, 0.0, m, rtol=TOLERANCE, atol=TOLERANCE, throw=False,
        batch="joint",
    )  # fmt: skip
    return lambda solve=jax.jit(solve): solve(p.params, p.x)


def diffrax_solution(p: flows.Problem, m, x):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 1.0, 0.0, None, x, args=m, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
    )  # fmt: skip


def diffrax_solve(p: flows.Problem):
    solve = jax.jit(lambda m, x: diffrax_solution(p, m, x).ys)
    return lambda: solve(p.params, p.x)


def diffrax_evaluations(p: flows.Problem) -> int:
    """Six a step, one for its first stage, two for its first step size: diffrax counts steps."""
    return 6 * int(diffrax_solution(p, p.params, p.x).stats["num_steps"]) + 3


def repeated(body, p: flows.Problem):
    """`COUNT` times `z <- z + 1e-3 body(t, z)`, in one compiled loop that cannot be shortened."""

    def loop(m, x, probe):
        def one(i, carry):
            z, total = carry
            dz, extra = body(i / COUNT, z, m, probe)
            return z + 1e-3 * dz, jax.tree.map(jnp.add, total, extra)

        extra = jax.eval_shape(body, jnp.float32(0), x, m, probe)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), extra)
        return jax.lax.fori_loop(0, COUNT, one, (x, zeros))

    return lambda loop=jax.jit(loop): loop(p.params, p.x, p.probe)


def tight_field(p: flows.Problem):
    return repeated(lambda t, z, m, probe: (field(t, z, m), ()), p)


def tight_stage(p: flows.Problem):
    """The product of a cotangent with the Jacobian of the field, for state and parameters."""

    def body(t, z, m, probe):
        _, vjp = jax.vjp(lambda m, z: field(t, z, m), m, z)
        parameters, state = vjp(probe)
        return state, parameters

    return repeated(body, p)


def tight_node(p: flows.Problem):
    """The estimate of the divergence and its gradient, for state and parameters."""

    def body(t, z, m, probe):
        total = lambda m, z: jnp.sum(flows.augmented(t, (z,), m, probe)[1])
        value, (parameters, state) = jax.value_and_grad(total, (0, 1))(m, z)
        return state, (value, parameters)

    return repeated(body, p)


def table(cases: dict[str, Any]) -> str:
    spread = lambda t: f"{report.ms(t['median'])} ({report.ms(t['min'])}-{report.ms(t['max'])})"
    rows = [
        [
            case, name, spread(time), spread(result["bare"][name]),
            f"{result['over_limit'][name]:.2f}", str(result["evaluations"][name]),
        ]
        for case, result in cases.items()
        for name, time in result["times"].items()
    ]  # fmt: skip
    header = ["", "", "ms, median (min-max)", "bare loops", "ratio", "evaluations of the field"]
    return report.markdown(header, rows)


def draw(cases: dict[str, Any], path: str) -> None:
    report.draw_bars(
        {
            case: {
                label: 1e3 * t["median"]
                for n in r["times"]
                for label, t in ((n, r["times"][n]), (f"{n}: its bare loops", r["bare"][n]))
            }
            for case, r in cases.items()
        },
        path, TITLE, "ms",
    )  # fmt: skip


def sentence(cases: dict[str, Any]) -> str:
    parts = [
        f"{name} takes {over:.2f}x as long as its evaluations in a bare loop ({case})"
        for case, result in cases.items()
        for name, over in result["over_limit"].items()
    ]
    return "; ".join(parts) + "."
