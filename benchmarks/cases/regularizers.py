"""What the regularizers of the training loss do to the flow that comes out.

The same network, data and steps of Adam for all; only the regularizer differs. Counted are the
evaluations of the field that `log_prob` of held-out samples takes at a tolerance of 1e-5, beside
the exact held-out likelihood. Three trainings each, with other initial weights and batches.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.problems import eight_gaussians, squash, trainer
from jaxode.regularizers import jacobian_frobenius, kinetic_energy

RATE = 5e-3
BASE = jaxode.standard_normal(2)
EXACT = jaxode.divergence.exact()


class Training(NamedTuple):
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    batch: int = 128
    widths: tuple[int, ...] = (64, 64, 64)


@functools.cache
def judge(batch: Any):
    """With an adjoint ODE, the loss solves for a sample and its log-determinant together, as
    `log_prob` does, and it reports the work."""
    options: dict[str, Any] = {"divergence": EXACT, "adjoint": jaxode.BacksolveAdjoint()}
    flow = jaxode.cnf(jaxode.nn.field, BASE, batch=batch, **options)
    return jax.jit(flow.nll_and_stats)


def mean(result: Result, key: str) -> float:
    return float(np.mean([run[key] for run in result["runs"]]))


class Regularizers(Benchmark):
    title = "Evaluations of a flow trained with a regularizer"
    timed = False
    cases: dict[str, dict[str, Any]] = {  # options of cnf
        "none": {},
        "kinetic_energy(0.05)": {"regularizers": (kinetic_energy(0.05),)},
        "kinetic_energy(0.2)": {"regularizers": (kinetic_energy(0.2),)},
        "jacobian_frobenius(0.02)": {"regularizers": (jacobian_frobenius(0.02),)},
        "jacobian_frobenius(0.05)": {"regularizers": (jacobian_frobenius(0.05),)},
        "RNODE: both, (0.05), (0.02)": {
            "regularizers": (kinetic_energy(0.05), jacobian_frobenius(0.02))
        },
    }
    training = Training()
    header = (
        "regularizer", "evaluations a sample", "of each training", "evaluations for the batch",
        "held-out nats",
    )  # fmt: skip

    def run(self, case: str, bench: Bench) -> Result:
        data = jnp.asarray(eight_gaussians(np.random.default_rng(10), 50_000))
        held_out = jnp.asarray(eight_gaussians(np.random.default_rng(11), 1000))
        seeds, steps, batch, widths = self.training
        options = {"divergence": EXACT, "rtol": 1e-3, "atol": 1e-3, **self.cases[case]}
        flow = jaxode.cnf(jaxode.nn.field, BASE, **options)

        def loss(m, key):
            batch_key, noise_key = jax.random.split(key)
            return flow.nll(m, jax.random.choice(batch_key, data, (batch,)), key=noise_key)

        train, runs = trainer(loss, steps, optax.cosine_decay_schedule(RATE, steps)), []
        joint, each = judge("joint"), judge("per_sample")
        for seed in seeds:
            bench.announce(f"seed {seed}")
            start, batches = jax.random.split(jax.random.key(seed))
            m = train(squash(2, widths, start), batches)
            (nll, aux), own = joint(m, held_out), each(m, held_out)[1]
            runs.append({
                "seed": seed, "nll": float(nll), "joint": int(aux.stats.num_evals),
                "per_sample": float(own.stats.num_evals.mean()),
            })  # fmt: skip
        return {"failed": {}, "runs": runs}

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            each = ", ".join(f"{run['per_sample']:.1f}" for run in result["runs"])
            batch = ", ".join(f"{run['joint']}" for run in result["runs"])
            means = f"{mean(result, 'per_sample'):.1f}", f"{mean(result, 'nll'):.3f}"
            yield case, means[0], each, batch, means[1]

    def draw(self, results: Results) -> Figure:
        groups = {
            "evaluations a sample": {c: mean(r, "per_sample") for c, r in results.items()},
            "held-out negative log-likelihood, nats": {
                c: mean(r, "nll") for c, r in results.items()
            },
        }
        return show.bars(groups, "mean of three trainings")


BENCHMARK = Regularizers()
