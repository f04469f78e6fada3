"""What the regularizers of the training loss do to the flow that comes out.

The same network, data and steps of Adam for all; only the regularizer differs. Counted are the
evaluations of the field that `log_prob` of held-out samples takes at a tolerance of 1e-5, beside
the exact held-out likelihood. Three trainings each, with other initial weights and batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import Bench
from jaxode.regularizers import jacobian_frobenius, kinetic_energy

TITLE = "Evaluations of a flow trained with a regularizer"
TIMED = False
CASES: dict[str, dict[str, Any]] = {  # options of cnf
    "none": {},
    "kinetic_energy(0.05)": {"regularizers": (kinetic_energy(0.05),)},
    "kinetic_energy(0.2)": {"regularizers": (kinetic_energy(0.2),)},
    "jacobian_frobenius(0.02)": {"regularizers": (jacobian_frobenius(0.02),)},
    "jacobian_frobenius(0.05)": {"regularizers": (jacobian_frobenius(0.05),)},
    "RNODE: both, (0.05), (0.02)": {
        "regularizers": (kinetic_energy(0.05), jacobian_frobenius(0.02))
    },
    "STEER: steer=0.1": {"steer": 0.1},
    "STEER: steer=0.25": {"steer": 0.25},
}
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE, WIDTHS = 1000, 128, 5e-3, (64, 64, 64)
BASE = jaxode.standard_normal(2)
EXACT = jaxode.divergence.exact()


def trainer(options: dict[str, Any], data: jax.Array):
    """`train(m, key) -> m`, compiled once for all seeds."""
    flow = jaxode.cnf(
        jaxode.nn.field, BASE, divergence=EXACT, rtol=1e-3, atol=1e-3, **options
    )  # fmt: skip
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(carry, key):
        m, state = carry
        batch_key, noise_key = jax.random.split(key)
        x = jax.random.choice(batch_key, data, (BATCH,))
        updates, state = optimizer.update(jax.grad(flow.nll)(m, x, key=noise_key), state)
        return (optax.apply_updates(m, updates), state), None

    def train(m, key):
        return jax.lax.scan(step, (m, optimizer.init(m)), jax.random.split(key, STEPS))[0][0]

    return jax.jit(train)


def evaluate(m, x: jax.Array) -> dict[str, float]:
    """The held-out likelihood, and what it takes: one solve for the batch, and one for each sample.

    With an adjoint ODE, the loss solves for a sample and its log-determinant together, as
    `log_prob` does, and it reports the work.
    """
    augmented = {"divergence": EXACT, "adjoint": jaxode.BacksolveAdjoint()}
    joint = jaxode.cnf(jaxode.nn.field, BASE, **augmented)
    each = jaxode.cnf(jaxode.nn.field, BASE, batch="per_sample", **augmented)
    loss, aux = jax.jit(joint.nll_and_stats)(m, x)
    own = jax.jit(each.nll_and_stats)(m, x)[1]
    return {
        "nll": float(loss), "joint": int(aux.stats.num_evals),
        "per_sample": float(own.stats.num_evals.mean()),
    }  # fmt: skip


def run(case: str, bench: Bench) -> dict[str, Any]:
    data = jnp.asarray(flows.eight_gaussians(np.random.default_rng(10), 50_000))
    held_out = jnp.asarray(flows.eight_gaussians(np.random.default_rng(11), 1000))
    train, runs = trainer(CASES[case], data), []
    for seed in SEEDS:
        bench.announce(f"seed {seed}")
        start, batches = jax.random.split(jax.random.key(seed))
        m = jaxode.nn.ConcatSquash(2, WIDTHS, key=start, activation=jaxode.nn.softplus)
        runs.append({"seed": seed, **evaluate(train(m, batches), held_out)})
    return {"failed": {}, "runs": runs}


def mean(result: dict[str, Any], key: str) -> float:
    return float(np.mean([run[key] for run in result["runs"]]))


def table(cases: dict[str, Any]) -> str:
    header = [
        "regularizer", "evaluations a sample", "of each training", "evaluations for the batch",
        "held-out nats",
    ]  # fmt: skip
    rows = []
    for case, result in cases.items():
        each = ", ".join(f"{run['per_sample']:.1f}" for run in result["runs"])
        batch = ", ".join(f"{run['joint']}" for run in result["runs"])
        nll = f"{mean(result, 'nll'):.3f}"
        rows.append([case, f"{mean(result, 'per_sample'):.1f}", each, batch, nll])
    return report.markdown(header, rows)


def draw(cases: dict[str, Any], path: str) -> None:
    groups = {
        "evaluations a sample": {c: mean(r, "per_sample") for c, r in cases.items()},
        "held-out negative log-likelihood, nats": {c: mean(r, "nll") for c, r in cases.items()},
    }
    report.draw_bars(groups, path, TITLE, "mean of three trainings")


def sentence(cases: dict[str, Any]) -> str:
    if "none" not in cases:
        return "No training without a regularizer to compare with."
    plain, nll = mean(cases["none"], "per_sample"), mean(cases["none"], "nll")
    parts = [
        f"{case}: {mean(result, 'per_sample') / plain - 1:+.0%} evaluations for "
        f"{mean(result, 'nll') - nll:+.3f} nats"
        for case, result in cases.items()
        if case != "none"
    ]
    return (
        f"Against {plain:.1f} evaluations per sample and {nll:.3f} nats: " + "; ".join(parts) + "."
    )
