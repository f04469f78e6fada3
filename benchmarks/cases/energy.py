"""Training on an energy: path gradients against the plain gradient of the same loss.

The target has three double wells among unit normals, as the example `CNF_vs_OTFlow` of jflows. The
same network, Adam, rate, steps and seed for both; then the effective sample size of 20,000 samples,
and times of a step of the trained flow, in turn.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench, alternate, ratio, summary, timed
from benchmarks.harness.problems import trainer

RATE = 2e-3
WELLS, BARRIER, PLACE = 3, 1.5, 1.5


def log_density(x):
    wells = BARRIER * ((x[:WELLS] / PLACE) ** 2 - 1) ** 2
    return -jnp.sum(wells) - 0.5 * jnp.sum(x[WELLS:] ** 2)


class Size(NamedTuple):
    dim: int
    steps: int = 1000
    batch: int = 512
    width: int = 64
    samples: int = 20_000


class Energy(Benchmark):
    title = "Training on an energy"
    cases = {f"{dim} dimensions": Size(dim) for dim in (4, 16, 64, 128)}
    header = (
        "", "gradient", "effective sample size", "log Z, error", "Pareto k", "ms a step",
        "over the plain step",
    )  # fmt: skip

    def run(self, case: str, bench: Bench) -> Result:
        size = self.cases[case]
        flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(size.dim))
        widths = (size.width, size.width)
        start = jaxode.nn.ConcatSquash(size.dim, widths, key=jax.random.key(0))
        draw = jax.jit(lambda m: flow.sample_and_log_prob(m, jax.random.key(2), size.samples))
        found: dict[str, Any] = {}
        trained, steps = {}, {}
        for name, path in (("path", True), ("plain", False)):
            bench.announce(name)

            def loss(m, key, path=path):
                return flow.reverse_kl_loss(m, log_density, size.batch, key=key, path=path)

            train = trainer(loss, size.steps, optax.constant_schedule(RATE))
            trained[name] = train(start, jax.random.key(1))
            x, log_q = draw(trained[name])
            report = jaxode.importance(jax.vmap(log_density)(x) - log_q)
            names = ("ess", "log_z", "log_z_error", "pareto_k")
            found[name] = {key: float(getattr(report, key)) for key in names}
            steps[name] = jax.jit(jax.value_and_grad(loss))
        m, key = trained["path"], jax.random.key(3)
        calls = {name: partial(step, m, key) for name, step in steps.items()}
        for call in calls.values():
            timed(call)
        times = alternate(calls, bench.seconds)
        return {
            "failed": {}, "found": found, "times": {n: summary(t) for n, t in times.items()},
            "over_plain": ratio(times["path"], times["plain"]),
        }  # fmt: skip

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for case, result in results.items():
            over = {"path": f"{result['over_plain']:.2f}", "plain": "1"}
            for name, found in result["found"].items():
                log_z = f"{found['log_z']:.3f} +- {found['log_z_error']:.3f}"
                told = f"{found['ess']:.3f}", log_z, f"{found['pareto_k']:.2f}"
                yield case, name, *told, show.spread(result["times"][name]), over[name]

    def draw(self, results: Results) -> Figure:
        groups = {
            case: {name: found["ess"] for name, found in result["found"].items()}
            for case, result in results.items()
        }
        return show.bars(groups, "effective sample size")

    def told(self, results: Results) -> Iterator[str]:
        for case, result in results.items():
            path, plain = (result["found"][name]["ess"] for name in ("path", "plain"))
            yield (
                f"{case}: an effective sample size of {path:.2f} by path gradients and {plain:.2f} "
                f"by the plain one, in {result['over_plain']:.2f}x the time of a step"
            )


BENCHMARK = Energy()
