"""What several examples draw."""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

BEGIN = time.perf_counter()


def save(figure: Figure, path: Path) -> None:
    """Write the picture, and print where and when."""
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"picture: {path}   total: {time.perf_counter() - BEGIN:.0f} s", flush=True)


def draw_scores(axis, points, lines: dict[str, float] | None = None) -> None:
    """Steps and scores of the validation rows during training, with `lines` beside them."""
    steps, scores = np.array(points).T
    axis.plot(steps, scores, ".-", ms=3, lw=1, label="validation")
    lines = lines or {}
    for (label, value), color in zip(lines.items(), ("tab:green", "tab:red"), strict=False):
        axis.axhline(value, color=color, lw=1, ls="--", label=f"{label}: {value:.3f}")
    finite = np.isfinite(scores)
    # The first scores, of an untrained network, are far above the rest.
    late = scores[finite & (steps >= steps[-1] / 10)]
    shown = [scores[finite].min(), *late, *lines.values()]
    margin = 0.05 * (max(shown) - min(shown)) + 1e-3
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set(xlabel="training step", ylabel="negative log-density, nats")
    axis.set_title("rows set aside, during training")
    axis.legend()


def tile(axis, digits, rows: int, title: str) -> None:
    """Images of 8x8 pixels and 17 grey levels, in so many rows."""
    grid = np.clip(np.floor(np.asarray(digits)), 0, 16).reshape(-1, 8, 8)
    grid = np.pad(grid, ((0, 0), (0, 1), (0, 1))).reshape(rows, -1, 9, 9)
    grid = grid.swapaxes(1, 2).reshape(rows * 9, -1)
    axis.imshow(grid[:-1, :-1], cmap="gray", interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
