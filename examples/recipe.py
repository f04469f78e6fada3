"""The training loop of the examples: flow matching first, maximum likelihood after, with Adam.

docs/training.md says why. The loop keeps a moving average of the parameters, scores it on
validation rows, and returns the best one. So neither phase overfits, and Ctrl-C ends training early
with the best so far.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

AVERAGE = 0.01  # weight of a step in the moving average, about the mean of the last 100


class Phase(NamedTuple):
    name: str
    loss: Callable[[Any, PRNGKeyArray], Float[Array, ""]]
    steps: int
    rate: float
    every: int
    """Steps in one compiled loop, between two scores."""


class Point(NamedTuple):
    phase: str
    seconds: float
    score: float


def falling(phase: Phase) -> optax.Schedule:
    return optax.cosine_decay_schedule(phase.rate, phase.steps)


def train(
    matching: Phase,
    likelihood: Phase,
    params: PyTree,
    score: Callable[[PyTree], float],
    key: PRNGKeyArray,
    weight_decay: float = 0.0,
) -> tuple[PyTree, list[Point]]:
    """The parameters with the lowest `score`, and all scores.

    The learning rate of matching is constant; the rate of the likelihood phase falls to zero. Each
    phase starts from the best average so far with a new optimizer, because the two losses have
    gradients of different scales.
    """
    best, history, start = params, [], time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        try:
            for phase, rate in ((matching, matching.rate), (likelihood, falling(likelihood))):
                task = progress.add_task(f"{phase.name}: compiling", total=phase.steps)
                optimizer = optax.chain(
                    optax.clip_by_global_norm(10.0), optax.adamw(rate, weight_decay=weight_decay)
                )
                run, carry = compiled(phase.loss, optimizer), (best, best, optimizer.init(best))
                for done in range(0, phase.steps, phase.every):
                    key, block_key = jax.random.split(key)
                    steps = min(phase.every, phase.steps - done)
                    carry = run(carry, jax.random.split(block_key, steps))
                    value = score(carry[1])
                    seconds = time.perf_counter() - start
                    if not math.isfinite(value):
                        print(f"Stopped {phase.name}: the score is {value}.", flush=True)
                        break
                    if value < min((point.score for point in history), default=math.inf):
                        best = carry[1]
                    history.append(Point(phase.name, seconds, value))
                    if len(history) == 1:
                        print(f"first score after {seconds:.1f} s, with compilation", flush=True)
                    text = f"{phase.name}: {value:.3f}"
                    progress.update(task, advance=steps, description=text)
        except KeyboardInterrupt:
            if not history:
                raise
            print(f"Stopped after {history[-1].seconds:.0f} s; going on with the best so far.")
    return best, history


def compiled(loss, optimizer):
    """One program that takes a step of `optimizer` on `(params, average, state)` for each key."""

    def step(carry, key):
        params, average, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, average, AVERAGE), state), None

    return jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])


def draw_scores(history: list[Point], axis, lines: dict[str, float] | None = None) -> None:
    """Scores over seconds of training, one color per phase, with `lines` at other scores."""
    end = None
    for name in dict.fromkeys(point.phase for point in history):
        points = [(p.seconds, p.score) for p in history if p.phase == name]
        if end is not None:
            axis.axvspan(end, points[0][0], color="0.93", lw=0, label="compilation, first steps")
        axis.plot(*zip(*points, strict=True), ".-", ms=3, lw=1, label=name)
        end = points[-1][0]
    lines = lines or {}
    for (label, value), color in zip(lines.items(), ("tab:green", "tab:red"), strict=False):
        axis.axhline(value, color=color, lw=1, ls="--", label=f"{label}: {value:.3f}")
    # The first scores, of an untrained network, are far above the rest.
    shown = [p.score for p in history[len(history) // 20 :]] + list(lines.values())
    low, high = min(shown), max(shown)
    axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.set(xlabel="seconds of training")
