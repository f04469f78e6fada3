"""Wall-clock of a training until the held-out negative log-likelihood first reaches a level.

    make time-to-nll      hours; interrupt and continue as you like

Adam at the same rate, initial weights, batches and held-out data are the same for all. There are
two ways to train, and a network for each, the same in all libraries:

- Those that match train a `jaxode.nn.Residual`, with independent pairs or optimal transport: jaxode
  and torchcfm. zuko has no loss for matching; the loop of its tutorial is torchcfm's with
  independent pairs. They evaluate the moving average of their parameters. Some go on with
  likelihood, by one rule for all data: see `MATCHING_STEPS`.
- Those that maximize the likelihood alone train a `jaxode.nn.ConcatSquash` as wide, FFJORD's
  network: every evaluation of a residual network, of which a solve has many, costs more. jaxode has
  its defaults; FFJORD torchdiffeq's adjoint at 1e-5; zuko its own tolerances and checkpointed
  adjoint; diffrax the 20 equal steps of Tsit5 of its example, or error control at 1e-5.

Where peers simulate, they take the exact trace in two dimensions, as diffrax's example, zuko and
FFJORD's toy data do; beyond, one probe, as FFJORD's tables do: an exact trace would cost them as
many products as there are dimensions.

The clock stands still during the evaluations, which have the exact trace at a tolerance of 1e-6;
the last one of each run is repeated with diffrax. Compilation counts, imports do not. Evaluations
are 5% apart in time. With seed 0 all train for at least a minute, for the table of what a minute
brings.

The levels are nats that jaxode reaches by likelihood alone within a minute on two cores. They were
chosen from its trainings, before any peer had run. Those that match reach them in two seconds, of
which one compiles. So there is also the time to the best that torchcfm has within the minute, with
the same network and independent pairs. The seeds come one after the other: an interrupted run has
the first of them, for all.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import numpy as np
import optax

import jaxode
from benchmarks.harness import problems, show, table_data
from benchmarks.harness.benchmark import Benchmark, Result, Results
from benchmarks.harness.fairness import Bench
from benchmarks.peers import flows, trainers

BUDGET = 60.0  # seconds of training that all have with seed 0, whenever they reach it
APART = 1.05  # ratio of the times of two evaluations
RATE, RATE_AFTER = 2e-3, 1e-3  # of Adam; of the likelihood phase after matching, falling to zero
MATCHING_STEPS, LIKELIHOOD_STEPS = 8000, 400  # of those that do both
SEEDS = (0, 1, 2)


class Data(NamedTuple):
    train: np.ndarray
    held_out: np.ndarray


def ring() -> Data:
    rng = np.random.default_rng(10)
    return Data(problems.eight_gaussians(rng, 100_000), problems.eight_gaussians(rng, 2000))


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
    """Of the hidden layers; the first, of the residual blocks."""
    batch: int
    level: float
    """Nats a sample."""


TASKS = {
    "8 Gaussians": Task(ring, (64, 64, 64), 512, 2.57),
    "MAGIC telescope": Task(magic_telescope, (128, 128), 512, 5.6),
    "digits": Task(digits, (256, 256), 256, 60.0),
}


class Phase(NamedTuple):
    start: Callable[..., Any]
    """One of `trainers`."""
    steps: int | None = None
    block: int = 5
    """Steps between two looks at the clock."""


def then(matching, likelihood) -> list[Phase]:
    """Matching, and then likelihood from its average, with a new optimizer and a falling rate."""
    return [Phase(matching, MATCHING_STEPS, 100), Phase(likelihood, LIKELIHOOD_STEPS)]


TRANSPORT = partial(trainers.jaxode_matching, coupling=jaxode.coupling.optimal_transport(16))
SAME_METHOD = "torchcfm, Residual, matching"
EXACT_TRANSPORT = partial(
    trainers.torchcfm_matching, matcher="ExactOptimalTransportConditionalFlowMatcher"
)
PHASES: dict[str, list[Phase]] = {
    "jaxode, Residual, matching, then likelihood": then(
        trainers.jaxode_matching, trainers.jaxode_likelihood
    ),
    "jaxode, Residual, transport, then likelihood": then(TRANSPORT, trainers.jaxode_likelihood),
    "jaxode, Residual, matching": [Phase(trainers.jaxode_matching, block=100)],
    "jaxode": [Phase(trainers.jaxode_likelihood)],
    SAME_METHOD: [Phase(trainers.torchcfm_matching, block=100)],
    "torchcfm, Residual, optimal transport": [Phase(EXACT_TRANSPORT)],
    "torchcfm, Residual, matching, then FFJORD's recipe": then(
        trainers.torchcfm_matching, trainers.ffjord
    ),
    "torchdiffeq, FFJORD's recipe": [Phase(trainers.ffjord)],
    "zuko": [Phase(trainers.zuko)],
    "diffrax, recipe of its example": [Phase(partial(trainers.diffrax_likelihood, dt0=-0.05))],
    "diffrax, error control": [Phase(trainers.diffrax_likelihood)],
}


def network(contender: str, dim: int, widths: tuple[int, ...], key) -> Any:
    if "Residual" in contender:
        return jaxode.nn.Residual(dim, widths[0], key=key)
    return problems.squash(dim, widths, key)


@jax.jit
def diffrax_nll(params, x):
    """`flows.exact_nll` by diffrax."""
    loss = flows.diffrax_loss(diffrax.Dopri8(), field=flows.augmented_exact)
    return loss(params, x, x, 1e-6)


class TimeToNll(Benchmark):
    title = "Time to a held-out likelihood"
    seconds = 600.0  # of training, after which a contender has not reached the level
    limit = 3600.0  # for the evaluations
    header = (
        "", "level, nats", "", "s to the level, by seed", f"best nats within {BUDGET:.0f} s",
        "last nats there", f"s to the best of {SAME_METHOD}",
    )  # fmt: skip
    cases: dict[str, tuple[str, str, int]] = {
        f"{task}: {name}, seed {seed}": (task, name, seed)
        for seed in SEEDS
        for task in TASKS
        for name in PHASES
    }

    def run(self, case: str, bench: Bench) -> Result:
        name, contender, seed = self.cases[case]
        if contender in bench.skip:
            return {"crashed": f"{contender}: {bench.skip[contender]}"}
        bench.announce(contender)
        task, data = TASKS[name], TASKS[name].load()
        dim = data.train.shape[1]
        params = network(contender, dim, task.widths, jax.random.key(seed))
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
                    last, nll = clock, float(flows.exact_nll(current(), data.held_out))
                    curve.append([clock, nll])
                    if nll <= task.level and reached is None:
                        reached = clock
                    if not math.isfinite(nll):
                        return {"crashed": f"{contender}: {nll} after {clock:.1f} s"}
            params, steps = current(), steps + done
        judges = {"exact": flows.exact_nll, "diffrax": diffrax_nll}
        check = {judge: float(nll(params, data.held_out)) for judge, nll in judges.items()}
        if abs(check["exact"] - check["diffrax"]) > 1e-3:
            return {"crashed": f"{contender}: evaluations differ, {check}"}
        return {"level": task.level, "reached": reached, "steps": steps, "curve": curve}

    def by_task(self, results: Results) -> dict[str, dict[str, list[Result]]]:
        """Results by task and contender, over the seeds."""
        grouped: dict[str, dict[str, list[Result]]] = {}
        for case, result in results.items():
            task, contender, _ = self.cases[case]
            grouped.setdefault(task, {}).setdefault(contender, []).append(result)
        return grouped

    def rows(self, results: Results) -> Iterator[Sequence[str]]:
        for task, contenders in self.by_task(results).items():
            for name, found in contenders.items():
                times = [r["reached"] for r in found]
                shown = ", ".join("not reached" if t is None else f"{t:.1f}" for t in times)
                level, nats = f"{TASKS[task].level}", within_budget(name, found[0])
                yield task, level, name, shown, *nats, later_level(name, found[0], contenders)

    def brief(self, results: Results) -> str:
        """Seconds to the level and the best nats within the budget, of the first seed."""
        tasks, columns = self.by_task(results), []
        for contenders in tasks.values():
            first = {name: found[0] for name, found in contenders.items()}
            reached = {
                name: "not reached" if result["reached"] is None else f"{result['reached']:.1f}"
                for name, result in first.items()
            }
            nats = {name: within_budget(name, result)[0] for name, result in first.items()}
            reached, nats = show.least_in_bold(reached), show.least_in_bold(nats)
            columns.append({name: f"{reached[name]}, {nats[name]}" for name in first})
        named = dict.fromkeys(name for contenders in tasks.values() for name in contenders)
        rows = [[name, *(column.get(name, "") for column in columns)] for name in named]
        header = (f"{task}, {TASKS[task].level} nats" for task in tasks)
        told = f"seconds to the level, best nats within {BUDGET:.0f} s"
        return show.markdown([told, *header], rows)


def within_budget(name: str, result: Result) -> tuple[str, str]:
    """Least and last nats of a run within the budget, if it was not stopped before, at the level.

    They differ where it overfits.
    """
    if ended_at_level(name, result):
        return "stopped at the level", ""
    within = [nll for t, nll in result["curve"] if t <= BUDGET]
    return (f"{min(within):.3f}", f"{within[-1]:.3f}") if within else ("no evaluation yet", "")


def later_level(name: str, result: Result, contenders: dict[str, list[Result]]) -> str:
    """Seconds to the best nats that torchcfm's matching has within the budget."""
    if SAME_METHOD not in contenders:
        return ""
    within = lambda result: [point for point in result["curve"] if point[0] <= BUDGET]
    best = min((nll for _, nll in within(contenders[SAME_METHOD][0])), default=-math.inf)
    reached = next((f"{t:.1f}" for t, nll in within(result) if nll <= best), "not reached")
    return "" if reached == "not reached" and ended_at_level(name, result) else reached


def ended_at_level(name: str, result: Result) -> bool:
    """Whether a run was stopped within the budget, since it had reached the level."""
    return stopped(name, result) and result["curve"][-1][0] < BUDGET / APART**2


def stopped(name: str, result: Result) -> bool:
    """Whether a run ended before its last step."""
    return result["steps"] < sum(phase.steps or math.inf for phase in PHASES[name])


BENCHMARK = TimeToNll()
