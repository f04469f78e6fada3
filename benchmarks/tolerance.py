"""What a tolerance buys: errors of a trained flow, and evaluations of its field.

    python -m benchmarks.tolerance

The flow of 8 Gaussians that the other benchmarks use, 512 samples, float32, one probe. Errors are
against diffrax's Dopri8 in float64 at 1e-11. Nothing is timed, so the numbers do not depend on the
load of the machine. Prints the tables; writes benchmarks/results/tolerance.json and
docs/images/tolerance.png.
"""

import json
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks import fairness, flows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tolerance.json"
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SOLVERS = {
    "Bosh3": diffrax.Bosh3(),
    "Dopri5": diffrax.Dopri5(),
    "Tsit5": diffrax.Tsit5(),
    "Dopri8": diffrax.Dopri8(),
}
ERRORS = {
    "loss": "training loss, nats",
    "gradient": "its gradient, relative",
    "log_prob": "log_prob, rms, nats",
    "round_trip": "round trip, max",
}


def measure(workload: flows.Workload, tolerances=TOLERANCES, solvers=tuple(SOLVERS)) -> list[dict]:
    """One row for each solver and tolerance."""
    p = flows.problem(workload)
    loss, gradient, log_prob = exact(p)
    rows = []
    for name in solvers:

        @jax.jit
        def outcome(tolerance, name=name):
            flow = make(p, SOLVERS[name], tolerance)
            training = jax.value_and_grad(flow.nll_and_stats, has_aux=True)
            (loss, aux), gradient = training(p.params, p.x, key=p.key)
            there_and_back = flow.from_base(p.params, flow.to_base(p.params, p.x))
            log_prob = flow.log_prob(p.params, p.x, key=p.key)
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


def make(p: flows.Problem, solver, tolerance):
    return jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(p.x.shape[1]), solver=solver,
        rtol=tolerance, atol=tolerance, divergence=jaxode.divergence.hutchinson(), throw=False,
    )  # fmt: skip


def exact(p: flows.Problem) -> tuple[float, list[np.ndarray], np.ndarray]:
    """Loss, gradient and log-densities, for the same probe, not by the library under test."""
    with fairness.double_precision():
        q = p.double()
        adjoint = diffrax.RecursiveCheckpointAdjoint()
        loss = flows.diffrax_loss(q, diffrax.Dopri8(), adjoint)
        step = jax.jit(jax.value_and_grad(loss))
        value, gradient = step(q.params, q.x, q.probe, 1e-11)
        each = jax.jit(
            jax.vmap(lambda x, v: -loss(q.params, x[None], v[None], 1e-11), in_axes=(0, 0))
        )
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        return float(value), leaves, np.asarray(each(q.x, q.probe))


def tables(results: dict) -> list[str]:
    """One of Tsit5, over the tolerance."""
    lines = [f"| `rtol` = `atol` | evaluations | {' | '.join(ERRORS.values())} |", "|---" * 6 + "|"]
    for row in results["rows"]:
        if row["solver"] == "Tsit5":
            errors = " | ".join(f"{row[name]:.0e}" for name in ERRORS)
            lines.append(f"| {row['tolerance']:.0e} | {row['evaluations']} | {errors} |")
    return ["\n".join(lines)]


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    rows = results["rows"]
    tsit5 = [row for row in rows if row["solver"] == "Tsit5"]
    for name, label in ERRORS.items():
        points = [(r["tolerance"], r[name]) for r in tsit5]
        left.loglog(*zip(*points, strict=True), "o-", ms=4, label=label)
    left.set(xlabel="rtol = atol", title="Errors with Tsit5")
    for name in dict.fromkeys(row["solver"] for row in rows):
        points = [(r["evaluations"], r["gradient"]) for r in rows if r["solver"] == name]
        right.loglog(*zip(*points, strict=True), "o-", ms=4, label=name)
    right.set(
        xlabel="evaluations in the solve for the samples", title="Relative error of the gradient"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    rows = measure(flows.Workload(2, 512, (64, 64, 64)))
    results = {"jax": jax.__version__, "rows": rows}
    print(*tables(results))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, ROOT / "docs" / "images" / "tolerance.png")


if __name__ == "__main__":
    main()
