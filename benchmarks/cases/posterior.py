"""Posteriors from simulations, against reference posteriors: C2ST on the ten tasks of sbibm.

    make posterior      a night; interrupt and continue as you like

Each task has 10,000 simulations from its prior, and five of them 30,000, too. A conditional flow
q(theta | x) is a `jaxode.nn.Residual` of its default size, trained by 20,000 steps of `jaxode.fit`,
which sets up to 1000 simulations aside; more gain nothing (NOTES.md). "Five networks" is the mean
of five, each as narrow and with batches as small as those of `tabular.fit`, with a fifth of the
steps. The prior's bounds are the `support` of `jaxode.bind`, and parameters and simulations are
standardized. The settings are the same for all tasks. "DeepSet" knows that SLCP has four points in
any order. "Three rounds" are for one observation, each with a third of the simulations: the first,
by five networks, serves all observations, and seconds of training are of that one alone; the others
take minutes for each observation. Then 10,000 samples of each of the ten posteriors
stand against 10,000 of the reference: C2ST is the accuracy, over five folds, of a classifier that
tells them apart, 0.5 at best. The classifier is the one of sbibm. `--seconds` ends the comparison
early, after fewer observations. On one task sbi's NPE stands beside it, with its defaults, on the
same simulations. Published scores are those of sbibm, and of GenSBI for conditional matching.
Seconds are given where nothing else ran on the machine; those of the CPU always.

All ten likelihoods are known, so the density can weigh its own samples: where it has 30,000
simulations, it keeps 10,000 of 50,000 by their weights p(x | theta) p(theta) / q(theta | x), and is
compared again.

References: Lueckmann et al. (2021), arXiv:2101.04653.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness import show
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.harness.posterior_tasks import TASKS, Task, reference
from jaxode.tabular.fit_table import MEMBER_BATCH, MEMBER_WIDTH

HELD_OUT, OBSERVATIONS = 1000, 10
PROPOSALS = 5  # for each weighted sample
MEMBERS = 5
ROUNDS, INSIDE = 3, 0.999  # of the posterior
MARGIN = 0.2  # added to each side of the box of a region, in parts of its width
AT_ONCE = 500  # densities
WITH_WEIGHTS = 30_000  # simulations

NPE, BEST, MATCHING = "sbi 2021, NPE", "sbi 2021, best of all", "GenSBI, matching"
PUBLISHED = {
    "two moons": {NPE: 0.606, BEST: 0.554, MATCHING: 0.53},
    "gaussian linear": {NPE: 0.552, BEST: 0.536, MATCHING: 0.51},
    "gaussian linear uniform": {NPE: 0.553, BEST: 0.527},
    "gaussian mixture": {NPE: 0.615, BEST: 0.551, MATCHING: 0.52},
    "bernoulli glm": {NPE: 0.678, BEST: 0.553, MATCHING: 0.70},
    "bernoulli glm raw": {NPE: 0.765, BEST: 0.658},
    "slcp": {NPE: 0.901, BEST: 0.713, MATCHING: 0.72},
    "slcp distractors": {NPE: 0.970, BEST: 0.931},
    "sir": {NPE: 0.680, BEST: 0.561},
    "lotka volterra": {NPE: 0.997, BEST: 0.738},
}
"""C2ST, means of ten observations: sbi at 10,000 simulations, GenSBI at 30,000."""


class Size(NamedTuple):
    samples: int = 10_000
    """Of each posterior."""
    network: dict[str, Any] = {}
    """Sizes of the network, if not its defaults."""
    fit: dict[str, Any] = {"steps": 20_000}


def trained(task: Task, theta, x, size: Size, key, network, fit: dict[str, Any], embed=None):
    """The posterior of a network."""
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(theta.shape[1]))
    density = jaxode.bind(
        flow, network, standardize=theta, standardize_context=x, support=task.bounds, embed=embed
    )
    options: dict[str, Any] = {"progress": False, **size.fit, **fit}
    return jaxode.fit(density, theta, context=x, key=key, **options)[0]


def by_network(task: Task, theta, x, size: Size, key):
    key, fit_key = jax.random.split(key)
    return trained(task, theta, x, size, fit_key, residual(theta, x.shape[1], size, key), {})


def residual(theta, numbers: int, size: Size, key):
    return jaxode.nn.Residual(theta.shape[1], key=key, context_size=numbers, **size.network)


def by_five(task: Task, theta, x, size: Size, key):
    key, fit_key = jax.random.split(key)
    narrow = size._replace(network={"width": MEMBER_WIDTH} | size.network)
    make = lambda key: residual(theta, x.shape[1], narrow, key)
    network, steps = jaxode.nn.Ensemble(make, MEMBERS, key=key), -(-size.fit["steps"] // MEMBERS)
    fit = {"steps": steps, "batch_size": MEMBER_BATCH}
    return trained(task, theta, x, size, fit_key, network, fit)


class Points(eqx.Module):
    """A vector for points in a plane, whose coordinates are a row of numbers."""

    of_set: jaxode.nn.DeepSet

    def __call__(self, x):
        return self.of_set(x.reshape(-1, 2))


def by_set(task: Task, theta, x, size: Size, key):
    key, set_key, fit_key = jax.random.split(key, 3)
    embed = Points(jaxode.nn.DeepSet(2, 16, key=set_key))
    return trained(task, theta, x, size, fit_key, residual(theta, 16, size, key), {}, embed)


class ByRounds:
    """Three rounds for one observation, as in docs/posterior.md: the first third of the simulations
    serves all observations, and each of the others is inside of the region so far."""

    def __init__(self, task: Task, theta, x, size: Size, key):
        self.task, self.size = task, size
        self.each = len(theta) // ROUNDS
        self.theta, self.x = theta[: self.each], x[: self.each]
        self.posterior = by_five(task, self.theta, self.x, size, key)

    def sample(self, key, shape, context):
        posterior, theta, x, varies = self.posterior, self.theta, self.x, slice(None)
        for number in range(1, ROUNDS):
            region_key, new_key, fit_key = jax.random.split(jax.random.fold_in(key, number), 3)
            inside = Region(posterior, context[varies], region_key)
            kept = inside(theta)
            theta, x = theta[kept], x[kept]
            count = len(theta) + self.each
            while len(theta) < count:
                new_key, draw_key = jax.random.split(new_key)
                new, new_x = self.task.simulate(draw_key, self.each)
                kept = inside(new)
                theta = np.concatenate([theta, new[kept]])[:count]
                x = np.concatenate([x, new_x[kept]])[:count]
            varies = np.flatnonzero(np.ptp(x, axis=0) > 0)  # near the observation
            posterior = by_five(self.task, theta, x[:, varies], self.size, fit_key)
        return posterior.sample(key, shape, context=context[varies])


class Region:
    """That of the highest density, which holds `INSIDE` of the posterior of an observation."""

    def __init__(self, posterior, context, key):
        self.posterior, self.context = posterior, context
        drawn, log_q = posterior.sample_and_log_prob(key, (2000,), context=context)
        self.edge = np.quantile(log_q, 1 - INSIDE)
        within = np.asarray(drawn)[np.asarray(log_q) > self.edge]
        low, high = within.min(axis=0), within.max(axis=0)
        self.low, self.high = low - MARGIN * (high - low), high + MARGIN * (high - low)

    def __call__(self, theta):
        """Densities are for those that are in a box about the region, by one program."""
        inside = ((theta >= self.low) & (theta <= self.high)).all(axis=1)
        inside, rows = np.array(inside), np.flatnonzero(inside)
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            padded = jnp.asarray(theta)[np.resize(part, AT_ONCE)]
            log_q = self.posterior.log_prob(padded, context=self.context)
            inside[part] = np.asarray(log_q)[: len(part)] > self.edge
        return inside


class BySbi:
    """NPE, which is asked as a density of jaxode."""

    def __init__(self, task: Task, theta, x, size: Size, key):
        import torch
        from sbi.inference import NPE
        from sbi.utils import BoxUniform

        torch.manual_seed(int(jax.random.bits(key, dtype=jnp.uint16)))
        assert task.bounds is not None  # of the tasks that it is run on
        prior = BoxUniform(*(torch.full((theta.shape[1],), bound) for bound in task.bounds))
        npe = NPE(prior)
        npe.append_simulations(torch.tensor(np.asarray(theta)), torch.tensor(np.asarray(x)))
        npe.train()
        self.posterior = npe.build_posterior()

    def sample(self, key, shape, context):
        import torch

        return self.posterior.sample(shape, x=torch.tensor(np.asarray(context))).numpy()


CONTENDERS = {
    "jaxode.fit": by_network,
    "jaxode.fit, five networks": by_five,
    "jaxode.fit, DeepSet": by_set,
    "jaxode.fit, three rounds": ByRounds,
    "sbi, NPE": BySbi,
}


class Case(NamedTuple):
    task: str
    contender: str
    simulations: int = 30_000


def weighted(task: Task, density, seen, samples: int, key):
    """Samples kept by their weights, and the effective part of the proposals."""
    draw_key, choice_key = jax.random.split(key)
    drawn, log_q = density.sample_and_log_prob(draw_key, (PROPOSALS * samples,), context=seen)
    log_weights = task.log_joint(drawn, seen) - log_q
    p = jax.nn.softmax(log_weights)
    kept = jax.random.choice(choice_key, drawn, (samples,), replace=False, p=p)
    return kept, float(jaxode.importance(log_weights).ess)


AT_THIRTY = ("two moons", "gaussian linear", "gaussian mixture", "slcp", "bernoulli glm")
CASES = {
    f"{task}: {name}": Case(task, name)
    for name in ("jaxode.fit", "jaxode.fit, five networks")
    for task in AT_THIRTY
}
CASES |= {
    f"{task}: {name}, 10,000": Case(task, name, 10_000)
    for name in ("jaxode.fit", "jaxode.fit, five networks")
    for task in TASKS
}
CASES |= {
    f"{task}: jaxode.fit, three rounds, 10,000": Case(task, "jaxode.fit, three rounds", 10_000)
    for task in TASKS
}
CASES |= {
    "slcp: jaxode.fit, DeepSet, 10,000": Case("slcp", "jaxode.fit, DeepSet", 10_000),
    "slcp: jaxode.fit, DeepSet": Case("slcp", "jaxode.fit, DeepSet"),
    "two moons: sbi, NPE": Case("two moons", "sbi, NPE"),
}


class Posterior(Benchmark):
    title = "Posteriors from simulations"
    cases = CASES
    seconds = 7200.0  # of comparing
    limit = 3600.0
    header = (
        "", "simulations", "", "C2ST, mean", "range", "observations", "weighted",
        "effective sample size", "nats of new simulations", "s of training", "CPU s",
    )  # fmt: skip
    size = Size()

    def run(self, case: str, bench: Bench) -> Result:
        name, contender, simulations = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        bench.announce(contender)
        task, size = TASKS[name], self.size
        simulation_key, train_key, new_key, key = jax.random.split(jax.random.key(0), 4)
        theta, x = task.simulate(simulation_key, simulations)
        start, cpu = time.perf_counter(), time.process_time()
        posterior = CONTENDERS[contender](task, theta, x, size, train_key)
        result: Result = {
            "seconds of training": time.perf_counter() - start,
            "CPU seconds of training": time.process_time() - cpu,
            "c2st": [],
        }
        of_jaxode = isinstance(posterior, jaxode.Density)
        if of_jaxode:
            new, new_x = task.simulate(new_key, HELD_OUT)
            result["nats"] = float(-posterior.log_prob(new, context=new_x).mean())
        start = time.perf_counter()
        for number in range(1, 1 + OBSERVATIONS):
            seen, expected = reference(name, number)
            draw_key, weigh_key = jax.random.split(jax.random.fold_in(key, number))
            drawn = posterior.sample(draw_key, (size.samples,), context=jnp.asarray(seen))
            compared = {"c2st": drawn}
            if of_jaxode and simulations >= WITH_WEIGHTS:
                found = weighted(task, posterior, jnp.asarray(seen), size.samples, weigh_key)
                compared["c2st, weighted"], effective = found
                result.setdefault("effective sample size", []).append(effective)
            for part, samples in compared.items():
                score = jaxode.calibration.c2st(expected, samples, jobs=2)
                result.setdefault(part, []).append(score)
            if time.perf_counter() - start > bench.seconds:
                break
        return result

    def complete(self, result: Result, seconds: float) -> bool:
        return "crashed" in result or len(result["c2st"]) == OBSERVATIONS or seconds < self.seconds

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        order = lambda case: ([*TASKS].index(self.cases[case].task), -self.cases[case].simulations)
        shown = lambda value, digits: "" if value is None else f"{value:{digits}}"
        for case in sorted(results, key=order):
            result, (task, contender, simulations) = results[case], self.cases[case]
            scores = np.array(result["c2st"])
            means = [
                shown(np.mean(result[part]) if part in result else None, ".3f")
                for part in ("c2st, weighted", "effective sample size")
            ]
            yield (
                task, f"{simulations:,}", contender, f"{scores.mean():.3f}",
                f"{scores.min():.3f} to {scores.max():.3f}", str(len(scores)), *means,
                shown(result.get("nats"), ".3f"), shown(result["seconds of training"], ".0f"),
                shown(result.get("CPU seconds of training"), ".0f"),
            )  # fmt: skip

    def brief(self, results: Results) -> str:
        """Means by task, beside those that were published."""
        found: dict[str, dict[tuple[int, str], str]] = {}
        for task, told in PUBLISHED.items():
            for name, score in told.items():
                simulations, digits = (30_000, 2) if name == MATCHING else (10_000, 3)
                found.setdefault(task, {})[simulations, name] = f"{score:.{digits}f}"
        for case, result in results.items():
            task, contender, simulations = self.cases[case]
            scores = result["c2st"]
            few = f" (of {len(scores)})" if len(scores) < OBSERVATIONS else ""
            found[task][simulations, contender] = f"{np.mean(scores):.3f}{few}"
        columns = sorted({column for cells in found.values() for column in cells})
        header = [f"{name}, {simulations:,}" for simulations, name in columns]
        rows = [
            [task, *(cells.get(column, "") for column in columns)] for task, cells in found.items()
        ]
        table = show.markdown(["C2ST, mean of ten observations", *header], rows)
        return f"{table}\n\nOf sbi 2021 and GenSBI: published scores."


BENCHMARK = Posterior()
