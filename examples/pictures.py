"""What several examples draw."""

import math
from typing import Any

import numpy as np


def draw_scores(history: list[Any], axis, lines: dict[str, float] | None = None) -> None:
    """The history of `jaxode.fit` over its seconds, one color per phase, with `lines` beside it."""
    end = None
    for name in dict.fromkeys(point.phase for point in history):
        points = [(p.seconds, p.nats) for p in history if p.phase == name]
        if end is not None:
            axis.axvspan(end, points[0][0], color="0.93", lw=0, label="compilation, first steps")
        axis.plot(*zip(*points, strict=True), ".-", ms=3, lw=1, label=name)
        end = points[-1][0]
    lines = lines or {}
    for (label, value), color in zip(lines.items(), ("tab:green", "tab:red"), strict=False):
        axis.axhline(value, color=color, lw=1, ls="--", label=f"{label}: {value:.3f}")
    scores = [p for p in history if math.isfinite(p.nats)]
    # The first scores, of an untrained network, are far above the rest.
    late = [p.nats for p in scores if 10 * p.step >= history[-1].step]
    shown = [min(p.nats for p in scores), *late, *lines.values()]
    margin = 0.05 * (max(shown) - min(shown)) + 1e-3
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set(xlabel="seconds of training", ylabel="negative log-density, nats")


def tile(axis, digits, rows: int, title: str) -> None:
    """Images of 8x8 pixels and 17 grey levels, in so many rows."""
    grid = np.clip(np.floor(np.asarray(digits)), 0, 16).reshape(-1, 8, 8)
    grid = np.pad(grid, ((0, 0), (0, 1), (0, 1))).reshape(rows, -1, 9, 9)
    grid = grid.swapaxes(1, 2).reshape(rows * 9, -1)
    axis.imshow(grid[:-1, :-1], cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
