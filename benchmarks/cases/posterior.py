"""Posteriors from simulations, against reference posteriors: C2ST on five tasks of sbibm.

    make posterior      about half an hour; interrupt and continue as you like

Each task has 30,000 simulations from its prior. A conditional flow q(theta | x) is a
`jaxode.nn.Residual` of its default size, trained by 20,000 steps of `jaxode.fit`, which sets 1000
simulations aside; more gain nothing (NOTES.md). The prior's bounds are the `support` of
`jaxode.bind`, and parameters and simulations are standardized. The settings are the same for all
tasks. Then 10,000 samples of each of the ten posteriors stand against 10,000 of the reference: C2ST
is the accuracy, over five folds, of a classifier that tells them apart, 0.5 at best. The classifier
is the one of sbibm. On one task sbi's NPE stands beside it, with its defaults, on the same
simulations. Seconds are given where nothing else ran on the machine.

All five likelihoods are known, so the density can weigh its own samples: of 50,000, it keeps 10,000
by their weights p(x | theta) p(theta) / q(theta | x), and is compared again.

References: Lueckmann et al. (2021), arXiv:2101.04653.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxode
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench

HELD_OUT, OBSERVATIONS = 1000, 10
PROPOSALS = 5  # for each weighted sample


def log_normal(x, mean, variance):
    """Of independent normal numbers, without the constant."""
    return -0.5 * jnp.sum((x - mean) ** 2 / variance + jnp.log(variance), axis=-1)


def two_moons(key, n):
    prior, angle, radius = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-1.0, maxval=1.0)
    a = jax.random.uniform(angle, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    r = 0.1 + 0.01 * jax.random.normal(radius, (n,))
    crescent = jnp.stack([r * jnp.cos(a) + 0.25, r * jnp.sin(a)], 1)
    return theta, crescent + moved_by(theta)


def moved_by(theta):
    moved = [-jnp.abs(theta[..., 0] + theta[..., 1]), theta[..., 1] - theta[..., 0]]
    return jnp.stack(moved, -1) / jnp.sqrt(2)


def log_two_moons(theta, x):
    u, v = jnp.moveaxis(x - moved_by(theta), -1, 0)
    r = jnp.hypot(u - 0.25, v)
    return jnp.where(u > 0.25, -0.5 * ((r - 0.1) / 0.01) ** 2 - jnp.log(r), -jnp.inf)


def gaussian_linear(key, n):
    prior, noise = jax.random.split(key)
    theta = jnp.sqrt(0.1) * jax.random.normal(prior, (n, 10))
    return theta, theta + jnp.sqrt(0.1) * jax.random.normal(noise, (n, 10))


def log_gaussian_linear(theta, x):
    tenth = jnp.full_like(x, 0.1)
    return log_normal(x, theta, tenth) + log_normal(theta, 0.0, tenth)


def gaussian_mixture(key, n):
    prior, component, noise = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-10.0, maxval=10.0)
    scale = jnp.where(jax.random.bernoulli(component, 0.5, (n, 1)), 1.0, 0.1)
    return theta, theta + scale * jax.random.normal(noise, (n, 2))


def log_gaussian_mixture(theta, x):
    components = [log_normal(x, theta, jnp.full_like(x, scale**2)) for scale in (1.0, 0.1)]
    return jnp.logaddexp(*components)


def slcp(key, n):
    """Four points of a Gaussian, whose mean and covariance the five parameters are."""
    prior, noise = jax.random.split(key)
    theta = jax.random.uniform(prior, (n, 5), minval=-3.0, maxval=3.0)
    first, second, rho = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, jnp.tanh(theta[:, 4:])
    a, b = jax.random.normal(noise, (2, n, 4))
    x = theta[:, :1] + first * a
    y = theta[:, 1:2] + second * (rho * a + jnp.sqrt(1 - rho**2) * b)
    return theta, jnp.stack([x, y], -1).reshape(n, 8)


def log_slcp(theta, x):
    first, second, rho = theta[..., 2] ** 2, theta[..., 3] ** 2, jnp.tanh(theta[..., 4])
    points = x.reshape(4, 2)
    a = (points[:, 0] - theta[..., :1]) / first[..., None]
    b = (points[:, 1] - theta[..., 1:2]) / second[..., None]
    rest = 1 - rho**2
    squares = a**2 - 2 * rho[..., None] * a * b + b**2
    return -0.5 * squares.sum(-1) / rest - 4 * jnp.log(first * second * jnp.sqrt(rest))


def bernoulli_glm(key, n):
    """Spikes of a neuron for a noise that it hears; their count and sums of the noise before."""
    prior, spikes = jax.random.split(key)
    design, precision = of_glm()
    root = jnp.asarray(np.linalg.cholesky(np.linalg.inv(precision)), jnp.float32)
    design = jnp.asarray(design, jnp.float32)
    theta = jax.random.normal(prior, (n, 10)) @ root.T
    fired = jax.random.bernoulli(spikes, jax.nn.sigmoid(theta @ design.T))
    return theta, fired.astype(jnp.float32) @ design


def log_bernoulli_glm(theta, x):
    design, precision = (jnp.asarray(each, jnp.float32) for each in of_glm())
    prior = -0.5 * jnp.sum(theta @ precision * theta, axis=-1)
    return prior + theta @ x - jax.nn.softplus(theta @ design.T).sum(-1)


def of_glm():
    """What the neuron hears, with a constant, and the precision of the prior."""
    noise = np.random.RandomState(42).randn(100)  # as sbibm drew it
    design = np.ones((100, 10))
    for lag in range(9):
        design[:, 1 + lag] = np.concatenate([np.zeros(lag), noise[: 100 - lag]])
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    return design, precision


class Task(NamedTuple):
    simulate: Callable[..., Any]
    log_joint: Callable[..., Any]
    """`log p(x | theta) + log p(theta)` inside of the bounds, up to a constant, of many `theta`."""
    bounds: tuple[float, float] | None = None
    """Of a uniform prior; None if it is all real numbers."""


TASKS = {
    "two moons": Task(two_moons, log_two_moons, (-1.0, 1.0)),
    "gaussian linear": Task(gaussian_linear, log_gaussian_linear),
    "gaussian mixture": Task(gaussian_mixture, log_gaussian_mixture, (-10.0, 10.0)),
    "slcp": Task(slcp, log_slcp, (-3.0, 3.0)),
    "bernoulli glm": Task(bernoulli_glm, log_bernoulli_glm),
}


def reference(task: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """An observation `[data]`, and samples of its posterior, as sbibm ships them."""
    spec = importlib.util.find_spec("sbibm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("sbibm is not installed: make posterior")
    folder = Path(spec.origin).parent / "tasks" / task.replace(" ", "_")
    folder = folder / f"files/num_observation_{number}"
    read = partial(np.loadtxt, delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)
    return read(folder / "observation.csv")[0], read(folder / "reference_posterior_samples.csv.bz2")


def by_jaxode(task: Task, theta, x, observations, size: "Size", key):
    """Seconds of training, samples of each posterior, nats of new simulations, weighted samples."""
    start = time.perf_counter()
    network_key, fit_key, new_key, key = jax.random.split(key, 4)
    dim = theta.shape[1]
    params = jaxode.nn.Residual(dim, key=network_key, context_size=x.shape[1], **size.network)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    density = jaxode.bind(
        flow, params, standardize=theta, standardize_context=x, support=task.bounds
    )
    options: dict[str, Any] = {"progress": False, **size.fit}
    density, _ = jaxode.fit(density, theta, context=x, key=fit_key, **options)
    seconds = time.perf_counter() - start
    new, new_x = task.simulate(new_key, HELD_OUT)
    nats = -density.log_prob(new, context=new_x).mean()
    proposals = PROPOSALS * size.samples
    samples, weighted = [], []
    for number, seen in enumerate(map(jnp.asarray, observations)):
        draw_key, choice_key = jax.random.split(jax.random.fold_in(key, number))
        drawn, log_q = density.sample_and_log_prob(draw_key, (proposals,), context=seen)
        samples.append(drawn[: size.samples])
        log_weights = task.log_joint(drawn, seen) - log_q
        p = jax.nn.softmax(log_weights)
        kept = jax.random.choice(choice_key, drawn, (size.samples,), replace=False, p=p)
        weighted.append((kept, float(jaxode.importance(log_weights).ess)))
    return seconds, samples, float(nats), weighted


def by_sbi(task: Task, theta, x, observations, size: "Size", key):
    import torch
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(int(jax.random.bits(key, dtype=jnp.uint16)))
    start = time.perf_counter()
    assert task.bounds is not None  # of the tasks that it is run on
    prior = BoxUniform(*(torch.full((theta.shape[1],), bound) for bound in task.bounds))
    npe = NPE(prior)
    npe.append_simulations(torch.tensor(np.asarray(theta)), torch.tensor(np.asarray(x)))
    npe.train()
    seconds, posterior = time.perf_counter() - start, npe.build_posterior()
    samples = [
        posterior.sample((size.samples,), x=torch.tensor(seen)).numpy() for seen in observations
    ]
    return seconds, samples, None, None


CONTENDERS = {"jaxode.fit": by_jaxode, "sbi, NPE": by_sbi}


class Size(NamedTuple):
    simulations: int = 30_000
    samples: int = 10_000
    """Of each posterior."""
    network: dict[str, Any] = {}
    """Sizes of the network, if not its defaults."""
    fit: dict[str, Any] = {"steps": 20_000}


class Posterior(Benchmark):
    title = "Posteriors from simulations"
    cases = {f"{task}: jaxode.fit": (task, "jaxode.fit") for task in TASKS} | {
        "two moons: sbi, NPE": ("two moons", "sbi, NPE")
    }
    limit = 3600.0
    header = (
        "", "", "C2ST, mean of ten", "range", "weighted", "effective sample size",
        "nats of new simulations", "s of training",
    )  # fmt: skip
    size = Size()

    def run(self, case: str, bench: Bench) -> Result:
        name, contender = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        bench.announce(contender)
        task = TASKS[name]
        simulation_key, key = jax.random.split(jax.random.key(0))
        theta, x = task.simulate(simulation_key, self.size.simulations)
        observations, references = zip(
            *(reference(name, 1 + n) for n in range(OBSERVATIONS)), strict=True
        )
        train = CONTENDERS[contender]
        seconds, samples, nats, weighted = train(task, theta, x, observations, self.size, key)

        def scores(samples):
            pairs = zip(references, samples, strict=True)
            return [jaxode.calibration.c2st(expected, got, jobs=2) for expected, got in pairs]

        result: Result = {"seconds of training": seconds, "nats": nats, "c2st": scores(samples)}
        if weighted is not None:
            kept, sizes = zip(*weighted, strict=True)
            result |= {"c2st, weighted": scores(kept), "effective sample size": list(sizes)}
        return result

    def by_task(self, results: Results) -> dict[str, Results]:
        grouped: dict[str, Results] = {}
        for case, result in results.items():
            task, contender = self.cases[case]
            grouped.setdefault(task, {})[contender] = result
        return grouped

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for task, contenders in self.by_task(results).items():
            for name, result in contenders.items():
                scores = np.array(result["c2st"])
                told = f"{scores.mean():.3f}", f"{scores.min():.3f} to {scores.max():.3f}"
                told += tuple(
                    f"{np.mean(result[part]):.3f}" if part in result else ""
                    for part in ("c2st, weighted", "effective sample size")
                )
                told += tuple(
                    "" if result[part] is None else f"{result[part]:{digits}}"
                    for part, digits in (("nats", ".3f"), ("seconds of training", ".0f"))
                )
                yield task, name, *told

    def brief(self, results: Results) -> str:
        return self.table(results)


BENCHMARK = Posterior()
