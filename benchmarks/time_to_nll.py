"""Wall-clock of a training until the held-out negative log-likelihood first reaches a level.

    make time-to-nll      hours; interrupt and continue as you like

Same network and initial weights, Adam at the same rate, batches and held-out data for all. Some
maximize the likelihood: jaxode with its defaults; FFJORD with torchdiffeq's adjoint
at 1e-5; zuko with its own tolerances and checkpointed adjoint; diffrax with the 20 equal steps of
Tsit5 of its example, or error control at 1e-5. In two dimensions peers take the exact trace, as
diffrax's example, zuko and FFJORD's toy data do; beyond, one probe, as FFJORD's tables do: an exact
trace would cost them as many products as there are dimensions. Some match: jaxode and torchcfm,
with independent pairs or optimal transport. zuko has no loss for matching; the loop of its tutorial
is torchcfm's with independent pairs. Some do one and then the other, by one rule for all data: see
`MATCHING_STEPS`. Those that match evaluate the moving average of their parameters.

The clock stands still during the evaluations, which have the exact trace at a tolerance of 1e-6;
the last one of each run is repeated with diffrax. Compilation counts, imports do not. Evaluations
are 5% apart in time. With seed 0 all train for at least a minute, for the table of what a minute
brings.

The levels are nats that jaxode reaches by likelihood alone within a minute on two cores. They were
chosen from its trainings, before any peer had run. The seeds come one after the other: an
interrupted run has the first of them, for all.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks import flows, report, table_data
from benchmarks.fairness import Bench

TITLE = "Time to a held-out likelihood"
SECONDS = 600.0  # of training, after which a contender has not reached the level
BUDGET = 60.0  # seconds of training that all have with seed 0, whenever they reach it
APART = 1.05  # ratio of the times of two evaluations
RATE, RATE_AFTER = 2e-3, 1e-3  # of Adam; of the likelihood phase after matching, falling to zero
MATCHING_STEPS, LIKELIHOOD_STEPS = 8000, 400  # of those that do both
AVERAGE = 0.005  # weight of a step in the moving average of the parameters


class Data(NamedTuple):
    train: np.ndarray
    held_out: np.ndarray


def eight_gaussians() -> Data:
    rng = np.random.default_rng(10)
    return Data(flows.eight_gaussians(rng, 100_000), flows.eight_gaussians(rng, 2000))


def magic_telescope() -> Data:
    """MAGIC gamma telescope, 10 features of gamma rays and hadrons, standardized (KEEL)."""
    return split(table_data.keel("magic"), np.random.default_rng(11))


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


TASKS = {
    "8 Gaussians": Task(eight_gaussians, (64, 64, 64), 512, 2.57),
    "MAGIC telescope": Task(magic_telescope, (128, 128), 512, 5.6),
    "digits": Task(digits, (256, 256), 256, 60.0),
}


class Phase(NamedTuple):
    """`start(params, dim, rate)` gives `train(xs, seeds)`, which takes a step of Adam for each
    batch, and `current()`, the parameters to evaluate and to go on with."""

    start: Callable[..., Any]
    steps: int | None = None
    block: int = 5  # steps between two looks at the clock


def jax_trainer(loss, params, dim, rate, average=1.0):
    optimizer = optax.adam(rate)
    carry = params, params, optimizer.init(params)

    def step(carry, inputs):
        params, averaged, state = carry
        x, seed = inputs
        gradient = jax.grad(loss)(params, x, jax.random.key(seed))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, averaged, average), state), None

    steps = jax.jit(lambda carry, inputs: jax.lax.scan(step, carry, inputs)[0])

    def train(xs, seeds):
        nonlocal carry
        carry = jax.block_until_ready(steps(carry, (xs, seeds)))

    return train, lambda: carry[1]


def jaxode_likelihood(params, dim, rate, **options):
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim), **options)
    return jax_trainer(lambda params, x, key: flow.nll(params, x, key=key), params, dim, rate)


def jaxode_matching(params, dim, rate, average=AVERAGE, **options):
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    loss = lambda params, x, key: flow.matching_loss(params, x, key=key, **options)
    return jax_trainer(loss, params, dim, rate, average)


def diffrax_likelihood(params, dim, rate, **options):
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

    return jax_trainer(loss, params, dim, rate)


def torch_trainer(loss, params, rate, average=1.0):
    """`loss(field, x, generator)`; a rate that is a function is one of the step, as in Optax."""
    import torch

    from benchmarks import torch_flows

    field = torch_flows.TorchField(params)
    optimizer = torch.optim.Adam(field.leaves, lr=1.0)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: float(rate(n)) if callable(rate) else rate
    )
    averaged = [leaf.detach().clone() for leaf in field.leaves]

    def train(xs, seeds):
        for x, seed in zip(torch.tensor(xs), seeds, strict=True):
            optimizer.zero_grad()
            loss(field, x, torch.Generator().manual_seed(int(seed))).backward()
            optimizer.step()
            rates.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, field.leaves, average)

    structure = jax.tree.structure(params)
    return train, lambda: jax.tree.unflatten(structure, [jnp.asarray(a.numpy()) for a in averaged])


def torch_likelihood(params, dim, rate, end, rtol, atol):
    from benchmarks import torch_flows

    def loss(field, x, generator):
        import torch

        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
        probe = None if dim == 2 else signs
        solved = getattr(torch_flows, end)(field, x, probe, rtol=rtol, atol=atol)
        return torch_flows.negative_log_likelihood(*solved)

    return torch_trainer(loss, params, rate)


def torchcfm_matching(params, dim, rate, matcher="ConditionalFlowMatcher"):
    from torchcfm import conditional_flow_matching

    draw = getattr(conditional_flow_matching, matcher)(sigma=0.0)

    def loss(field, x, generator):
        import torch

        # torchcfm draws times with PyTorch's generator, and pairs with NumPy's.
        torch.manual_seed(generator.initial_seed())
        np.random.seed(generator.initial_seed())  # noqa: NPY002
        t, z, target = draw.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (field(t[:, None], z) - target).square().mean()

    return torch_trainer(loss, params, rate, AVERAGE)


def then(matching, likelihood) -> list[Phase]:
    """Matching, and then likelihood from its average, with a new optimizer and a falling rate."""
    return [Phase(matching, MATCHING_STEPS, 100), Phase(likelihood, LIKELIHOOD_STEPS)]


TRANSPORT = {"coupling": jaxode.coupling.optimal_transport(16)}
CONTROLLED = {"dt0": None, "stepsize_controller": diffrax.PIDController(rtol=1e-5, atol=1e-5)}
FFJORD = partial(torch_likelihood, end="torchdiffeq_end", rtol=1e-5, atol=1e-5)
EXACT_TRANSPORT = "ExactOptimalTransportConditionalFlowMatcher"
RECIPE = "jaxode, matching, then likelihood"
PHASES: dict[str, list[Phase]] = {
    RECIPE: then(jaxode_matching, jaxode_likelihood),
    "jaxode, transport, then likelihood": then(
        partial(jaxode_matching, **TRANSPORT), jaxode_likelihood
    ),
    "jaxode, matching": [Phase(jaxode_matching, block=100)],
    "jaxode": [Phase(jaxode_likelihood)],
    "torchcfm, matching": [Phase(torchcfm_matching, block=100)],
    "torchcfm, optimal transport": [Phase(partial(torchcfm_matching, matcher=EXACT_TRANSPORT))],
    "torchcfm, matching, then FFJORD's recipe": then(torchcfm_matching, FFJORD),
    "torchdiffeq, FFJORD's recipe": [Phase(FFJORD)],
    "zuko": [Phase(partial(torch_likelihood, end="zuko_end", rtol=1e-5, atol=1e-6))],
    "diffrax, recipe of its example": [Phase(partial(diffrax_likelihood, dt0=-0.05))],
    "diffrax, error control": [Phase(partial(diffrax_likelihood, **CONTROLLED))],
}
SIMULATE = (
    "torchdiffeq, FFJORD's recipe", "zuko", "diffrax, recipe of its example",
    "diffrax, error control",
)  # fmt: skip
MATCH = tuple(name for name in PHASES if name.startswith("torchcfm"))
SEEDS = (0, 1, 2)
LIMIT = 3600.0  # seconds of a process beyond those of training, for the evaluations
CASES: dict[str, tuple[str, str, int]] = {
    f"{task}: {name}, seed {seed}": (task, name, seed)
    for seed in SEEDS
    for task in TASKS
    for name in PHASES
}


@jax.jit
def exact_nll(params, x):
    """Nats a sample, with exact trace at a tolerance of 1e-6."""
    tight = {"divergence": jaxode.divergence.exact(), "rtol": 1e-6, "atol": 1e-6}
    return jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(x.shape[1]), **tight).nll(params, x)


@jax.jit
def diffrax_nll(params, x):
    """The same, by diffrax."""
    p = flows.Problem(params, x, x, None)
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    loss = flows.diffrax_loss(p, diffrax.Dopri8(), adjoint, field=flows.augmented_exact)
    return loss(params, x, x, 1e-6)


def run(case: str, bench: Bench) -> dict[str, Any]:
    name, contender, seed = CASES[case]
    if contender in bench.skip:
        return {"crashed": f"{contender}: {bench.skip[contender]}"}
    bench.announce(contender)
    task, data = TASKS[name], TASKS[name].load()
    dim = data.train.shape[1]
    key = jax.random.key(seed)
    params: Any = jaxode.nn.ConcatSquash(dim, task.widths, key=key, activation=jaxode.nn.softplus)
    rng = np.random.default_rng(seed)
    least = BUDGET if seed == 0 else 0.0
    clock, last, steps, curve, reached = 0.0, 0.0, 0, [], None
    for i, phase in enumerate(PHASES[contender]):
        falling = optax.cosine_decay_schedule(RATE_AFTER, LIKELIHOOD_STEPS)
        done = 0
        train, current = phase.start(params, dim, falling if i else RATE)  # imports PyTorch
        while done != phase.steps and clock < (least if reached else bench.seconds):
            rows = rng.integers(0, len(data.train), (phase.block, task.batch))
            xs, seeds = data.train[rows], rng.integers(2**31, size=phase.block)
            start = time.perf_counter()
            train(xs, seeds)
            clock += time.perf_counter() - start
            done += phase.block
            if clock > APART * last or done == phase.steps:
                last, nll = clock, float(exact_nll(current(), data.held_out))
                curve.append([clock, nll])
                if nll <= task.level and reached is None:
                    reached = clock
                if not math.isfinite(nll):
                    return {"crashed": f"{contender}: {nll} after {clock:.1f} s"}
        params, steps = current(), steps + done
    check = {
        "exact": exact_nll(params, data.held_out),
        "diffrax": diffrax_nll(params, data.held_out),
    }
    if abs(check["exact"] - check["diffrax"]) > 1e-3:
        return {"crashed": f"{contender}: evaluations differ, {check}"}
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


def within_budget(name: str, result: dict[str, Any]) -> tuple[str, str]:
    """Least and last nats of a run within the budget, if it was not stopped before, at the level.

    They differ where it overfits.
    """
    if stopped(name, result) and result["curve"][-1][0] < BUDGET / APART**2:
        return "stopped at the level", ""
    within = [nll for t, nll in result["curve"] if t <= BUDGET]
    return (f"{min(within):.3f}", f"{within[-1]:.3f}") if within else ("no evaluation yet", "")


def stopped(name: str, result: dict[str, Any]) -> bool:
    """Whether a run ended before its last step."""
    return result["steps"] < sum(phase.steps or math.inf for phase in PHASES[name])


def table(cases: dict[str, Any]) -> str:
    rows = []
    for task, contenders in by_task(cases).items():
        for name, results in contenders.items():
            times = [r["reached"] for r in results]
            shown = ", ".join("not reached" if t is None else f"{t:.1f}" for t in times)
            level, nats = f"{TASKS[task].level}", within_budget(name, results[0])
            rows.append([task, level, name, shown, *nats])
    header = ["", "level, nats", "", "s to the level, by seed"]
    header += [f"best nats within {BUDGET:.0f} s", "last nats there"]
    return report.markdown(header, rows)


def draw(cases: dict[str, Any], path: str) -> None:
    """Held-out nats over seconds of training, seed 0."""
    panels = {
        f"seconds of training, {task}": {
            name: [(t, nll) for t, nll in results[0]["curve"] if nll < TASKS[task].level * 1.25]
            for name, results in contenders.items()
        }
        for task, contenders in by_task(cases).items()
    }
    report.draw_curves(panels, path, TITLE, "held-out nats", log_y=False, marker=None)


def sentence(cases: dict[str, Any]) -> str:
    parts = []
    for task, contenders in by_task(cases).items():
        times = {name: median_time(results) for name, results in contenders.items()}
        mine = times.get(RECIPE, math.inf)
        if not math.isfinite(mine):
            parts.append(f"{task}: it does not reach the level")
            continue
        told = [f"{mine:.1f} s{_seeds(contenders[RECIPE])}{_while_matching(contenders[RECIPE])}"]
        here = _machines(contenders, RECIPE)
        for rivals, called in (
            (MATCH, "the best peer that matches"),
            (SIMULATE, "the best that simulates"),
            (SIMULATE[:1], "FFJORD's recipe"),
        ):
            # Seconds of two machines are not compared.
            rivals = [name for name in rivals if _machines(contenders, name) == here]
            best = min(rivals, key=lambda name: times.get(name, math.inf), default="")
            if math.isfinite(times.get(best, math.inf)):
                ratio, seeds = mine / times[best], _seeds(contenders[best])
                told.append(f"{ratio:.2f}x as long as {called}{seeds}")
        if len(told) == 1:
            told.append("no peer on the same machine reaches it")
        parts.append(f"{task}: {', '.join(told)}")
    return f"Matching and then likelihood reaches the level of {'; '.join(parts)}."


def _machines(contenders: dict[str, list[dict[str, Any]]], name: str) -> set[str | None]:
    return {result.get("device") for result in contenders.get(name, ())}


def _seeds(results: list[dict[str, Any]]) -> str:
    return f" (median of {len(results)} seeds)" if len(results) > 1 else " (seed 0)"


def _while_matching(results: list[dict[str, Any]]) -> str:
    """Said where the runs that end at the level have not come to the likelihood."""
    ended = [result["steps"] for result in results if stopped(RECIPE, result)]
    return ", while matching" if ended and max(ended) <= MATCHING_STEPS else ""
