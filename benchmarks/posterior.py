"""Posteriors from simulations, against reference posteriors: C2ST on five tasks of sbibm.

    make posterior      about an hour; interrupt and continue as you like

Each task has 30,000 simulations from its prior. A conditional flow q(theta | x) is trained by flow
matching and then likelihood on 28,000 of them, and the best on 1,000 others is kept; its prior's
bounds and the units of the simulator are `jaxode.bind`'s. The network, its width and the training
are the same for all tasks. Then 10,000 samples of each of the ten posteriors stand against 10,000
of the reference: C2ST is the accuracy, over five folds, of a classifier that tells them apart, 0.5
at best. The classifier is the one of sbibm. On one task sbi's NPE stands beside it, with its
defaults, on the same simulations. Seconds are given where nothing else ran on the machine.

The likelihood is trained at a tolerance of 1e-4. At 1e-3, longer training made the posteriors of
the Gaussian mixture worse (1.13 nats, C2ST 0.58): it optimized the error of the solver.

References: Lueckmann et al. (2021), arXiv:2101.04653.
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxode
from benchmarks import report
from benchmarks.fairness import Bench

TITLE = "Posteriors from simulations"
LIMIT = 3600.0  # seconds of a process
SIMULATIONS, HELD_OUT, SAMPLES, OBSERVATIONS = 30_000, 2000, 10_000, 10
WIDTH, DEPTH, BATCH, DECAY = 128, 4, 256, 0.1
SCALES = (1.0, 4.0, 16.0, 64.0)
MATCHING, LIKELIHOOD = (40_000, 1e-3, 0.002), (1200, 3e-4, 0.02)
"""Steps, rate, and the weight of a step in the moving average of the parameters."""


def two_moons(key, n):
    prior, angle, radius = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-1.0, maxval=1.0)
    a = jax.random.uniform(angle, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    r = 0.1 + 0.01 * jax.random.normal(radius, (n,))
    crescent = jnp.stack([r * jnp.cos(a) + 0.25, r * jnp.sin(a)], 1)
    moved = jnp.stack([-jnp.abs(theta[:, 0] + theta[:, 1]), theta[:, 1] - theta[:, 0]], 1)
    return theta, crescent + moved / jnp.sqrt(2)


def gaussian_linear(key, n):
    prior, noise = jax.random.split(key)
    theta = jnp.sqrt(0.1) * jax.random.normal(prior, (n, 10))
    return theta, theta + jnp.sqrt(0.1) * jax.random.normal(noise, (n, 10))


def gaussian_mixture(key, n):
    prior, component, noise = jax.random.split(key, 3)
    theta = jax.random.uniform(prior, (n, 2), minval=-10.0, maxval=10.0)
    scale = jnp.where(jax.random.bernoulli(component, 0.5, (n, 1)), 1.0, 0.1)
    return theta, theta + scale * jax.random.normal(noise, (n, 2))


def slcp(key, n):
    """Four points of a Gaussian, whose mean and covariance the five parameters are."""
    prior, noise = jax.random.split(key)
    theta = jax.random.uniform(prior, (n, 5), minval=-3.0, maxval=3.0)
    first, second, rho = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, jnp.tanh(theta[:, 4:])
    a, b = jax.random.normal(noise, (2, n, 4))
    x = theta[:, :1] + first * a
    y = theta[:, 1:2] + second * (rho * a + jnp.sqrt(1 - rho**2) * b)
    return theta, jnp.stack([x, y], -1).reshape(n, 8)


def bernoulli_glm(key, n):
    """Spikes of a neuron for a noise that it hears; their count and sums of the noise before."""
    prior, spikes = jax.random.split(key)
    noise = np.random.RandomState(42).randn(100)  # as sbibm drew it
    design = np.ones((100, 10))
    for lag in range(9):
        design[:, 1 + lag] = np.concatenate([np.zeros(lag), noise[: 100 - lag]])
    differences = np.eye(9) - np.eye(9, k=-1)
    smooth = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    root = jnp.asarray(np.linalg.cholesky(np.linalg.inv(precision)), jnp.float32)
    design = jnp.asarray(design, jnp.float32)
    theta = jax.random.normal(prior, (n, 10)) @ root.T
    fired = jax.random.bernoulli(spikes, jax.nn.sigmoid(theta @ design.T))
    return theta, fired.astype(jnp.float32) @ design


class Task(NamedTuple):
    simulate: Callable[..., Any]
    bounds: tuple[float, float] | None
    """Of the prior; None if it is all real numbers."""


TASKS = {
    "two moons": Task(two_moons, (-1.0, 1.0)),
    "gaussian linear": Task(gaussian_linear, None),
    "gaussian mixture": Task(gaussian_mixture, (-10.0, 10.0)),
    "slcp": Task(slcp, (-3.0, 3.0)),
    "bernoulli glm": Task(bernoulli_glm, None),
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


def c2st(samples: np.ndarray, other: np.ndarray) -> float:
    """Accuracy of a classifier that tells the samples apart, with the settings of sbibm."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, scale, dim = samples.mean(0), samples.std(0, ddof=1), samples.shape[1]
    x = (np.concatenate([samples, other]) - mean) / scale
    label = np.repeat([0, 1], [len(samples), len(other)])
    classifier = MLPClassifier((10 * dim, 10 * dim), max_iter=10_000, random_state=1)
    folds = KFold(5, shuffle=True, random_state=1)
    return float(cross_val_score(classifier, x, label, cv=folds, n_jobs=2).mean())


class Network(eqx.Module):
    """A residual network, its blocks gated by the time and an encoding of the context.

    A posterior may be a hundredth as wide as its prior, so the state also enters as its distance
    to where the context says it is, at several scales.
    """

    encoder: list[eqx.nn.Linear]
    center: list[eqx.nn.Linear]
    distance: eqx.nn.Linear
    first: eqx.nn.Linear
    blocks: list[eqx.nn.Linear]
    gates: list[eqx.nn.Linear]
    last: eqx.nn.Linear

    def __init__(self, dim: int, context: int, key):
        keys = iter(jax.random.split(key, 8 + 2 * DEPTH))
        sizes, known = (context, WIDTH, WIDTH), WIDTH + 6
        linear = lambda size, width, **options: eqx.nn.Linear(
            size, width, key=next(keys), **options
        )
        self.encoder = [linear(size, WIDTH) for size in sizes]
        self.center = [linear(WIDTH, dim), linear(context, dim)]
        self.distance = linear(len(SCALES) * dim, WIDTH, use_bias=False)
        self.first = linear(dim + known, WIDTH)
        self.blocks = [linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        self.gates = [linear(known, WIDTH) for _ in range(DEPTH)]
        self.last = linear(WIDTH, dim)

    def __call__(self, t, y, context):
        waves, code = jnp.pi * t * jnp.arange(1.0, 4.0), context
        for layer in self.encoder[:-1]:
            code = jax.nn.gelu(layer(code))
        center = self.center[0](code) + self.center[1](context)
        distance = jnp.tanh((y - t * center)[:, None] * jnp.array(SCALES)).ravel()
        known = jnp.concatenate([self.encoder[-1](code), jnp.sin(waves), jnp.cos(waves)])
        x = self.first(jnp.concatenate([y, known])) + self.distance(distance)
        for block, gate in zip(self.blocks, self.gates, strict=True):
            x = x + block(jax.nn.gelu(x)) * jax.nn.sigmoid(gate(known))
        return self.last(jax.nn.gelu(x))


def trained(loss, score, params, data, phase, key):
    """The parameters of the least score on the way, by AdamW at a rate that falls to zero."""
    steps, rate, average = phase
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=DECAY),
    )

    def step(carry, key):
        now, averaged, state = carry
        row_key, key = jax.random.split(key)
        rows = jax.random.randint(row_key, (BATCH,), 0, len(data[0]))
        batch = jax.tree.map(lambda leaf: leaf[rows], data)
        gradient = jax.grad(loss)(now, *batch, key)
        updates, state = optimizer.update(gradient, state, now)
        now = optax.apply_updates(now, updates)
        return (now, optax.incremental_update(now, averaged, average), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    score = jax.jit(score)
    carry, best = (params, params, optimizer.init(params)), (float(score(params)), params)
    block = steps // 20
    for keys in jax.random.split(key, (20, block)):
        carry = run(carry, keys)
        best = min(best, (float(score(carry[1])), carry[1]), key=lambda found: found[0])
    return best[1]


def by_jaxode(task: Task, theta, x, observations, key):
    """Seconds of training, samples of each posterior, and nats of new simulations."""
    start = time.perf_counter()
    network_key, matching_key, likelihood_key, new_key, key = jax.random.split(key, 5)
    params = Network(theta.shape[1], x.shape[1], network_key)
    base = jaxode.standard_normal(theta.shape[1])
    flow = jaxode.cnf(jaxode.nn.field, base, rtol=1e-4, atol=1e-4)
    # Posteriors may be a hundredth as wide as their prior: the default tolerance to judge them.
    tight = jaxode.cnf(jaxode.nn.field, base, divergence=jaxode.divergence.exact())
    units = {"standardize": theta, "standardize_context": x, "support": task.bounds}
    density = jaxode.bind(flow, params, **units)
    data = density.to_flow(theta, x)
    held_out = jax.tree.map(lambda leaf: leaf[:HELD_OUT], data)
    data = jax.tree.map(lambda leaf: leaf[HELD_OUT:], data)

    def matching(params, z, context, key):
        return flow.matching_loss(params, z, context=context, key=key)

    def likelihood(params, z, context, key):
        return flow.nll(params, z, context=context, key=key)

    def unlikely(params):
        return tight.nll(params, held_out[0][:1000], context=held_out[1][:1000])

    params = trained(matching, unlikely, params, data, MATCHING, matching_key)
    params = trained(likelihood, unlikely, params, data, LIKELIHOOD, likelihood_key)
    seconds = time.perf_counter() - start
    density = jaxode.bind(tight, params, **units)
    new, new_x = task.simulate(new_key, HELD_OUT)
    nats = -density.log_prob(new, context=new_x).mean()
    draw = lambda key, seen: density.sample(key, (SAMPLES,), context=seen)
    keys = jax.random.split(key, len(observations))
    samples = [draw(key, jnp.asarray(seen)) for key, seen in zip(keys, observations, strict=True)]
    return seconds, samples, float(nats)


def by_sbi(task: Task, theta, x, observations, key):
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
    samples = [posterior.sample((SAMPLES,), x=torch.tensor(seen)).numpy() for seen in observations]
    return seconds, samples, None


CONTENDERS = {"jaxode": by_jaxode, "sbi, NPE": by_sbi}
CASES = {f"{task}: jaxode": (task, "jaxode") for task in TASKS} | {
    f"{task}: sbi, NPE": (task, "sbi, NPE") for task in ("two moons",)
}


def run(case: str, bench: Bench) -> dict[str, Any]:
    name, contender = CASES[case]
    if contender in bench.skip:
        return {"crashed": f"{contender}: {bench.skip[contender]}"}
    bench.announce(contender)
    task = TASKS[name]
    simulation_key, key = jax.random.split(jax.random.key(0))
    theta, x = task.simulate(simulation_key, SIMULATIONS)
    observations, references = zip(
        *(reference(name, 1 + n) for n in range(OBSERVATIONS)), strict=True
    )
    seconds, samples, nats = CONTENDERS[contender](task, theta, x, observations, key)
    pairs = zip(references, samples, strict=True)
    scores = [c2st(expected, np.asarray(got)) for expected, got in pairs]
    return {"seconds of training": seconds, "nats": nats, "c2st": scores}


def by_task(cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, dict[str, Any]] = {}
    for case, result in cases.items():
        task, contender = CASES[case]
        grouped.setdefault(task, {})[contender] = result
    return grouped


def table(cases: dict[str, Any]) -> str:
    rows = []
    for task, contenders in by_task(cases).items():
        for name, result in contenders.items():
            scores, nats, seconds = (
                np.array(result["c2st"]), result["nats"], result["seconds of training"],
            )  # fmt: skip
            rows.append([
                task, name, f"{scores.mean():.3f}", f"{scores.min():.3f} to {scores.max():.3f}",
                "" if nats is None else f"{nats:.3f}", "" if seconds is None else f"{seconds:.0f}",
            ])  # fmt: skip
    header = ["", "", "C2ST, mean of ten", "range", "nats of new simulations", "s of training"]
    return report.markdown(header, rows)


def draw(cases: dict[str, Any], path: str) -> None:
    """A dot for each observation, and a line at their mean."""
    grouped = by_task(cases)
    styles = report.styles(CONTENDERS)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained", squeeze=False)
    (axis,), handles = axes.flat, {}
    for place, contenders in enumerate(grouped.values()):
        for name, result in contenders.items():
            shift = 0.18 * list(CONTENDERS).index(name)
            scores, color = np.array(result["c2st"]), styles[name]["color"]
            at = place + shift + np.linspace(-0.05, 0.05, len(scores))
            (handles[name],) = axis.plot(at, scores, "o", color=color, markersize=4, alpha=0.6)
            axis.hlines(scores.mean(), place + shift - 0.08, place + shift + 0.08, color=color)
    axis.axhline(0.5, color="#888888", linewidth=1, linestyle=":")
    axis.set(ylim=(0.48, 1), ylabel="C2ST of each observation")
    axis.set_xticks(range(len(grouped)), list(grouped))
    report.finish(figure, axes, TITLE, path, handles)


def sentence(cases: dict[str, Any]) -> str:
    parts = []
    for task, contenders in by_task(cases).items():
        means = {name: np.mean(result["c2st"]) for name, result in contenders.items()}
        told = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        parts.append(f"{task}: {told}")
    return f"C2ST to the reference posterior, 0.5 at best; {'; '.join(parts)}."
