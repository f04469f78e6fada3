"""The curves of docs/training.md: when to switch, which rate, what the average brings, overfitting.

    python -m benchmarks.training      about six minutes on two cores

Tasks, networks and evaluations are those of `time_to_nll`; the time is the time of training, with
compilation. Writes docs/images/training.png and prints the table beside it.
"""

import time
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxode
from benchmarks import report
from benchmarks.time_to_nll import (
    RATE,
    RATE_AFTER,
    TASKS,
    exact_nll,
    jaxode_likelihood,
    jaxode_matching,
)

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "training.png"
APART = 1.1  # ratio of the times of two evaluations


def curve(task: str, *phases) -> list[tuple[float, float]]:
    """`(seconds, held-out nats)` of `(start, steps, rate, block)` in turn, seed 0."""
    data, widths = TASKS[task].load(), TASKS[task].widths
    dim, rng, key = data.train.shape[1], np.random.default_rng(0), jax.random.key(0)
    params = jaxode.nn.ConcatSquash(dim, widths, key=key, activation=jaxode.nn.softplus)
    clock, points = 0.0, []
    for start, steps, rate, block in phases:
        begin = time.perf_counter()
        train, current = start(params, dim, rate)
        clock += time.perf_counter() - begin
        for done in range(block, steps + 1, block):
            rows = rng.integers(0, len(data.train), (block, TASKS[task].batch))
            xs, seeds = data.train[rows], rng.integers(2**31, size=block)
            begin = time.perf_counter()
            train(xs, seeds)
            clock += time.perf_counter() - begin
            if not points or clock > APART * points[-1][0] or done == steps:
                points.append((clock, float(exact_nll(current(), data.held_out))))
        params = current()
    return points


def matching(steps: int, rate=RATE, **options):
    return partial(jaxode_matching, **options), steps, rate, 100


def likelihood(steps: int, rate=None):
    falling = optax.cosine_decay_schedule(RATE_AFTER, steps)
    return jaxode_likelihood, steps, falling if rate is None else rate, 10


RAW = {"average": 1.0}
TRANSPORT = {"coupling": jaxode.coupling.optimal_transport(16)}
falls = optax.cosine_decay_schedule(RATE, 8000)
PANELS = {
    "when to switch: MAGIC": (
        "MAGIC telescope",
        {
            "likelihood alone": (likelihood(800, RATE),),
            "matching alone": (matching(20_000),),
            "switch after 2,000 steps": (matching(2000), likelihood(400)),
            "switch after 8,000 steps": (matching(8000), likelihood(400)),
        },
    ),
    "rate and average: MAGIC": (
        "MAGIC telescope",
        {
            "constant rate, average": (matching(8000),),
            "constant rate, no average": (matching(8000, **RAW),),
            "rate falls to zero": (matching(8000, falls, **RAW),),
        },
    ),
    "coupling: MAGIC": (
        "MAGIC telescope",
        {
            "independent": (matching(8000), likelihood(400)),
            "transport in groups of 16": (matching(8000, **TRANSPORT), likelihood(400)),
        },
    ),
    "overfitting: digits": (
        "digits",
        {
            "matching alone": (matching(12_000),),
            "likelihood after the best": (matching(4000), likelihood(200)),
            "likelihood after it, rate not falling": (matching(4000), likelihood(200, RATE)),
        },
    ),
}


def draw(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        last = [points[-1][1] for points in curves.values()]
        low, span = min(last), max(max(last) - min(last), 0.05 * min(last))
        axis.set(title=title, xlabel="seconds of training", ylabel="held-out nats")
        axis.set_ylim(low - 0.3 * span, low + 3 * span)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    panels, rows = {}, []
    for title, (task, runs) in PANELS.items():
        panels[title] = {name: curve(task, *phases) for name, phases in runs.items()}
        for name, points in panels[title].items():
            best, last = min(nll for _, nll in points), points[-1]
            rows.append([title, name, f"{last[0]:.1f}", f"{best:.2f}", f"{last[1]:.2f}"])
    draw(panels)
    print(report.markdown(["", "", "seconds", "best nats", "last nats"], rows))


if __name__ == "__main__":
    main()
