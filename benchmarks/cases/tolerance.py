"""What a tolerance buys: errors of a trained flow, and evaluations of its field.

    python -m benchmarks.cases.tolerance

The flow of 8 Gaussians that the other benchmarks use, 512 samples, float32, one probe. Errors are
against diffrax's Dopri8 in float64 at 1e-11. Nothing is timed, so the numbers do not depend on the
load of the machine. Prints the tables; writes benchmarks/results/tolerance.json and
docs/images/tolerance.png.
"""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.cases.ffjord_step import SIZES
from benchmarks.harness import fairness, runner, show
from benchmarks.harness.machine import ROOT
from benchmarks.harness.problems import FlowProblem, Workload, flow
from benchmarks.peers import flows

RESULTS = runner.RESULTS / "tolerance.json"
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SOLVERS = {name: getattr(diffrax, name)() for name in ("Bosh3", "Dopri5", "Tsit5", "Dopri8")}
PROBE = jaxode.divergence.hutchinson()
ERRORS = {
    "loss": "training loss, nats",
    "gradient": "its gradient, relative",
    "log_prob": "log_prob, rms, nats",
    "round_trip": "round trip, max",
}


def measure(workload: Workload, tolerances=TOLERANCES, solvers=tuple(SOLVERS)) -> list[dict]:
    """One row for each solver and tolerance."""
    p = flow(workload)
    loss, gradient, log_prob = exact(p)
    rows = []
    for name in solvers:

        @jax.jit
        def outcome(tolerance, name=name):
            cnf = jaxode.cnf(
                jaxode.nn.field, jaxode.standard_normal(p.x.shape[1]), solver=SOLVERS[name],
                rtol=tolerance, atol=tolerance, divergence=PROBE, throw=False,
            )  # fmt: skip
            training = jax.value_and_grad(cnf.nll_and_stats, has_aux=True)
            (loss, aux), gradient = training(p.params, p.x, key=p.key)
            there_and_back = cnf.from_base(p.params, cnf.to_base(p.params, p.x))
            log_prob = cnf.log_prob(p.params, p.x, key=p.key)
            return loss, gradient, log_prob, there_and_back - p.x, aux.stats

        for tolerance in tolerances:
            *out, stats = outcome(jnp.float32(tolerance))
            rows.append(
                {
                    "solver": name, "tolerance": tolerance, "evaluations": int(stats.num_evals),
                    "loss": abs(float(out[0]) - loss),
                    "gradient": fairness.gradient_error(jax.tree.leaves(out[1]), gradient),
                    "log_prob": float(np.sqrt(np.mean((np.asarray(out[2]) - log_prob) ** 2))),
                    "round_trip": float(jnp.abs(out[3]).max()),
                }
            )  # fmt: skip
    return rows


def exact(p: FlowProblem) -> tuple[float, list[np.ndarray], np.ndarray]:
    """Loss, gradient and log-densities, for the same probe, not by the library under test."""
    with fairness.double_precision():
        q, loss = fairness.doubled(p), flows.diffrax_loss(diffrax.Dopri8())
        step = jax.jit(jax.value_and_grad(loss))
        value, gradient = step(q.params, q.x, q.probe, 1e-11)
        each = jax.jit(jax.vmap(lambda x, v: -loss(q.params, x[None], v[None], 1e-11)))
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        return float(value), leaves, np.asarray(each(q.x, q.probe))


def tables(results: dict) -> list[str]:
    """One of Tsit5, over the tolerance."""
    rows = [
        [f"{row['tolerance']:.0e}", str(row["evaluations"]), *(f"{row[e]:.0e}" for e in ERRORS)]
        for row in results["rows"]
        if row["solver"] == "Tsit5"
    ]
    return [show.markdown(["`rtol` = `atol`", "evaluations", *ERRORS.values()], rows)]


def draw(results: dict, path: Path) -> None:
    rows = results["rows"]
    of = lambda solver, x, y: [(r[x], r[y]) for r in rows if r["solver"] == solver]
    solvers = dict.fromkeys(row["solver"] for row in rows)
    errors = {label: of("Tsit5", "tolerance", name) for name, label in ERRORS.items()}
    work = {solver: of(solver, "evaluations", "gradient") for solver in solvers}
    panels = [
        show.Panel("rtol = atol", "", errors, "Errors with Tsit5"),
        show.Panel(
            "evaluations in the solve for the samples", "", work, "Relative error of the gradient"
        ),
    ]
    show.save(show.curves(panels), "What a tolerance buys", path)


def main() -> None:
    results = {"rows": measure(SIZES["8 Gaussians, 512 x 2, 64-64-64"])}
    print(*tables(results))
    runner.save(RESULTS, {"jax": jax.__version__} | results)
    draw(results, ROOT / "docs" / "images" / "tolerance.png")


if __name__ == "__main__":
    main()
