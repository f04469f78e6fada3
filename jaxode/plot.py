"""Pictures of flows, solves and training.

Every function draws on `ax`, by default matplotlib's current axes, and returns it. Axes in the
plane get a name if they have none yet. Titles, limits and colors are yours: set them on the axes,
or pass matplotlib's own keywords. matplotlib is not a dependency of jaxode: without it, every
function raises `ModuleNotFoundError`.

```python
figure, axes = plt.subplots(1, 2)
jaxode.plot.density(partial(flow.log_prob, params), (-4, 4, -4, 4), ax=axes[0])
jaxode.plot.history(losses, ax=axes[1])
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxode._checks.arguments import check_bool, integer
from jaxode._checks.caller import arg, public
from jaxode.training.validations import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALIASES = {"linewidth": ("lw", "linewidths"), "color": ("c",)}  # of styles with a default here


@public("plot.density")
def density(
    log_prob: Callable[[Float[Array, "points 2"]], Float[Array, " points"]],
    extent: tuple[float, float, float, float],
    *,
    ax: Axes | None = None,
    points: int = 160,
    colorbar: bool = True,
    **style: Any,
) -> Axes:
    """Draw the density of two-dimensional events, `exp(log_prob)`, on a grid.

    Colors follow the square root of the density: a linear scale would hide regions of low density
    that hold much of the mass. Pass `norm="linear"` or `norm="log"` for another scale.

    Args:
        log_prob: log-density in nats, `[points, 2] -> [points]`.
        extent: `(left, right, bottom, top)`.
        ax: axes to draw on.
        points: grid points along each axis, at the centers of the cells.
        colorbar: draw a color bar beside the axes.
        **style: passed to `Axes.imshow`.

    Raises:
        TypeError: unless `colorbar` is True or False.
    """
    check_bool("colorbar", colorbar)
    left, right, bottom, top = extent
    centers = (np.arange(points) + 0.5) / points
    x, y = np.meshgrid(left + (right - left) * centers, bottom + (top - bottom) * centers)
    grid = jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=1))
    values = np.exp(np.asarray(log_prob(grid))).reshape(points, points)
    ax = _axes(ax)
    label = "density"
    if "norm" not in style:
        from matplotlib.colors import PowerNorm

        limits = {"vmin": style.pop("vmin", 0.0), "vmax": style.pop("vmax", None)}
        style["norm"], label = PowerNorm(0.5, **limits), "density (square-root scale)"
    image = ax.imshow(
        values, **{"origin": "lower", "extent": extent, "aspect": "auto", "cmap": "magma", **style}
    )
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label=label)
    return _named(ax)


@public("samples")
def samples(x: Float[Array | np.ndarray, "n 2"], *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw points in the plane, small and translucent.

    Args:
        x: points, `[n, 2]`.
        ax: axes to draw on.
        **style: passed to `Axes.scatter`.

    Raises:
        ValueError: if the points are not two-dimensional.
    """
    points = _plane("x", x, 2)
    ax = _axes(ax)
    ax.scatter(*points.T, **_styled({"s": 4, "alpha": 0.5, "linewidth": 0}, style))
    return _named(ax)


@public("trajectories")
def trajectories(
    ys: Float[Array | np.ndarray, "times n 2"],
    *,
    ax: Axes | None = None,
    start: str = "start",
    end: str = "end",
    **style: Any,
) -> Axes:
    """Draw the paths of states through the plane, and mark where they start and end.

    Args:
        ys: states, `[times, n, 2]`: `Solution.ys` of `jaxode.solve(..., batch="joint", ts=...)`.
        ax: axes to draw on.
        start: legend label of the first points.
        end: legend label of the last points.
        **style: passed to `Axes.plot` for the lines.

    Raises:
        ValueError: if the states are not two-dimensional.
    """
    paths = _plane("ys", ys, 3)
    ax = _axes(ax)
    style = _styled({"color": "gray", "linewidth": 0.6}, style)
    ax.plot(paths[:, :, 0], paths[:, :, 1], **style)
    for points, label in ((paths[0], start), (paths[-1], end)):
        ax.scatter(*points.T, s=10, label=label, zorder=3)
    return _named(ax)


@public("history")
def history(
    losses: Float[Array | np.ndarray, " steps"] | Sequence[float] | Sequence[Point],
    *,
    ax: Axes | None = None,
    window: int = 50,
    **style: Any,
) -> Axes:
    """Draw a training history: each loss faintly, and the mean of the last `window` losses.

    Args:
        losses: one per training step, `[steps]`; or the looks of `jaxode.fit`, drawn over seconds
            and without a mean.
        ax: axes to draw on.
        window: steps in the mean, capped at half of all steps; 1 draws only the losses.
        **style: passed to `Axes.plot` for the mean, or for the looks.

    Raises:
        ValueError: if there is not one number per step.
    """
    looks = [p for p in losses if isinstance(p, Point)] if isinstance(losses, Sequence) else []
    if looks:
        ax = _axes(ax)
        ax.plot([p.seconds for p in looks], [p.nats for p in looks], **{"marker": ".", **style})
        ax.set(xlabel="seconds of training", ylabel="validation loss in nats")
        return ax
    return _curve("losses", losses, window, "loss", ax, style)


@public("evaluations")
def evaluations(
    num_evals: Int[Array | np.ndarray, " steps"] | Sequence[int],
    *,
    ax: Axes | None = None,
    window: int = 50,
    **style: Any,
) -> Axes:
    """Draw the vector field evaluations of each training step: how hard the field is to solve.

    Args:
        num_evals: `Stats.num_evals` of each training step, `[steps]`.
        ax: axes to draw on.
        window: steps in the mean, capped at half of all steps; 1 draws only the counts.
        **style: passed to `Axes.plot` for the mean.

    Raises:
        ValueError: if there is not one number per step.
    """
    return _curve("num_evals", num_evals, window, "vector field evaluations", ax, style)


@public("ranks")
def ranks(
    ranks: Int[Array | np.ndarray, "simulations parameters"],
    draws: int,
    *,
    ax: Axes | None = None,
    bins: int = 20,
    **style: Any,
) -> Axes:
    """Draw histograms of the ranks of `jaxode.calibration.sbc`, which are flat if it is right.

    A band shows where 99% of the bars lie if the posterior is right.

    Args:
        ranks: `SBC.ranks`.
        draws: `SBC.draws`.
        ax: axes to draw on.
        bins: bars, at most one for each rank.
        **style: passed to `Axes.stairs`.

    Raises:
        ValueError: unless there is a row for each simulation, or for `bins` that are no number.
    """
    from scipy.stats import binom

    ranks = np.asarray(ranks)
    if ranks.ndim != 2:
        raise ValueError(
            f"plot.{arg('ranks')} must have shape (simulations, parameters); got {ranks.shape}."
        )
    edges = np.linspace(0, draws + 1, min(integer("bins", bins), draws + 1) + 1).round()
    ax, count, widths = _axes(ax), len(ranks), np.diff(edges)
    band = binom(count, widths / (draws + 1)).ppf([[0.005], [0.995]])
    low, high = (np.append(end, end[-1]) for end in band)
    ax.fill_between(edges, low, high, step="post", color="0.9", label="99% if calibrated")
    for number, column in enumerate(ranks.T):
        counts = np.histogram(column, edges)[0]
        label = f"$\\theta_{{{number + 1}}}$"
        ax.stairs(counts, edges, **{"baseline": None, "label": label, **style})
    ax.set(xlabel=f"rank among {draws} draws", ylabel="simulations", ylim=(0, None))
    return ax


@public("coverage")
def coverage(
    levels: Float[Array | np.ndarray, " levels"],
    coverage: Float[Array | np.ndarray, " levels"],
    error: Float[Array | np.ndarray, " levels"] | None = None,
    *,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Draw the coverage of regions over their levels, which is the diagonal if it is right.

    Args:
        levels: as of `jaxode.calibration.coverage`.
        coverage: the part that each covers.
        error: standard errors, twice which are drawn as a band around the diagonal.
        ax: axes to draw on.
        **style: passed to `Axes.plot`.
    """
    levels = np.asarray(levels)
    ax = _axes(ax)
    if error is not None:
        low, high = levels - 2 * np.asarray(error), levels + 2 * np.asarray(error)
        ax.fill_between(levels, low, high, color="0.9", label="95% if calibrated")
    ax.plot([0, 1], [0, 1], color="0.6", lw=1)
    ax.plot(levels, np.asarray(coverage), **{"marker": ".", **style})
    ax.set(xlabel="level", ylabel="coverage")
    return ax


@public("waterfall")
def waterfall(
    costs: Float[Array | np.ndarray, " starts"], *, ax: Axes | None = None, **style: Any
) -> Axes:
    """Draw the cost at the end of each start, in order: `Estimate.costs` above the least.

    A plateau at one is the best cost, found from many starts. Further plateaus are local optima.

    Args:
        costs: `Estimate.costs`, `[starts]`. Starts that could not be solved are left out.
        ax: axes to draw on.
        **style: passed to `Axes.plot`.

    Raises:
        ValueError: if there is not one number per start.
    """
    values = np.asarray(costs, float)
    if values.ndim != 1:
        raise ValueError(f"plot.{arg('costs')} must have shape (starts,); got {values.shape}.")
    values, ax = np.sort(values[np.isfinite(values)]), _axes(ax)
    above = 1 + values - values[:1]
    ax.plot(np.arange(1, values.size + 1), above, **{"marker": ".", **style})
    ax.set(xlabel="starts, best first", ylabel="cost above the least, plus one", yscale="log")
    return ax


def _curve(name: str, values, window: int, ylabel: str, ax, style) -> Axes:
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"plot.{arg(name)} must have shape (steps,); got {values.shape}.")
    ax = _axes(ax)
    # With a window as long as the curve, the mean would be a single, invisible point.
    window = max(min(window, values.size // 2), 1)
    if window > 1:
        mean = np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=-1)
        (line,) = ax.plot(np.arange(window, values.size + 1), mean, **style)
        ax.plot(np.arange(1, values.size + 1), values, color=line.get_color(), lw=0.5, alpha=0.35)
    else:
        ax.plot(np.arange(1, values.size + 1), values, **_styled({"linewidth": 0.8}, style))
    ax.set(xlabel="training step", ylabel=ylabel)
    return ax


def _plane(name: str, x: Any, ndim: int) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != ndim or x.shape[-1] != 2:
        axes = ("times, n, 2", "n, 2")[ndim == 2]
        raise ValueError(
            f"plot.{arg(name)} must have shape ({axes}); got {x.shape}. "
            "For larger events, choose two coordinates."
        )
    return x


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "jaxode.plot needs matplotlib, which is not installed. Run: pip install matplotlib",
            name="matplotlib",
        ) from None
    return pyplot.gca() if ax is None else ax


def _styled(defaults: dict[str, Any], style: dict[str, Any]) -> dict[str, Any]:
    """The user's style, and the defaults that it does not replace, also as `lw` for `linewidth`."""

    def is_styled(name):
        return not style.keys().isdisjoint((name, *ALIASES.get(name, ())))

    return {name: value for name, value in defaults.items() if not is_styled(name)} | style


def _named(ax: Axes) -> Axes:
    """Name the axes of the plane that have no name."""
    ax.set(xlabel=ax.get_xlabel() or "$x_1$", ylabel=ax.get_ylabel() or "$x_2$")
    return ax
