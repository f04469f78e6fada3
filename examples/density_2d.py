"""Learn a two-dimensional density: a classic toy data set, or your own two-column CSV file.

    python examples/density_2d.py --data pinwheel
    python examples/density_2d.py --data path/to/points.csv

Writes a picture of the data, the learned density, samples and trajectories, and an animation of the
flow from noise to data. About a minute on two cores.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import tables
from common.arguments import InputError, announce, beside, count, parser, run
from common.pictures import draw_scores, save
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import Circle
from rich.progress import Progress
from sklearn import datasets

import jaxode
from jaxode import plot


def eight_gaussians(rng, n):
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    centers = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centers + 0.3 * rng.standard_normal((n, 2))


def moons(rng, n):
    points, _ = datasets.make_moons(n, noise=0.08, random_state=int(rng.integers(2**31)))
    return 2 * (points - np.array([0.5, 0.25]))


def checkerboard(rng, n):
    x = rng.uniform(-2, 2, n)
    y = rng.uniform(0, 1, n) + 2 * rng.integers(-1, 1, n) + np.floor(x) % 2
    return 1.5 * np.stack([x, y], 1)


def pinwheel(rng, n):
    arm = rng.integers(0, 5, n)
    radius, tangent = 1 + 0.3 * rng.standard_normal(n), 0.05 * rng.standard_normal(n)
    angle = 2 * np.pi * arm / 5 + 0.25 * np.exp(radius)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1)
    points = np.stack([radius, tangent], 1)
    return 2 * np.einsum("ni,nij->nj", points, turn.reshape(n, 2, 2))


def rings(rng, n):
    radius = np.array([0.75, 1.5, 2.25, 3.0])[rng.integers(0, 4, n)]
    angle = rng.uniform(0, 2 * np.pi, n)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return points + 0.08 * rng.standard_normal((n, 2))


TOYS = {
    "8gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "rings": rings,
}


def load(name: str, rng: np.random.Generator) -> np.ndarray:
    """The points, `[points, 2]`."""
    if name in TOYS:
        return TOYS[name](rng, 20_000)
    if not Path(name).is_file():
        raise InputError(f"{name} is neither one of {', '.join(TOYS)} nor a file")
    points = tables.read(Path(name)).select_dtypes("number")
    if points.shape[1] != 2:
        raise InputError(
            f"{name}: two numeric columns are needed; got {points.shape[1]}. For other tables use "
            "tabular.py"
        )
    if points.isna().any(axis=None):
        raise InputError(f"{name}: a number is missing. Leave such rows out, or use tabular.py")
    return points.to_numpy(float)


def draw(density, data, history, path, key):
    """Data, learned density and samples; the flow in both directions; scores during training."""
    path_key, sample_key = jax.random.split(key)
    flow, params = density.flow, density.params
    z, times = flow.base.sample(path_key, (60,)), jnp.linspace(flow.t0, flow.t1, 50)
    paths = jaxode.solve(flow.f, z, flow.t0, flow.t1, params, batch="joint", ts=times).ys

    low, high = picture_limits(data)
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.5), constrained_layout=True)
    plot.samples(data[:3000], ax=axes[0, 0])
    extent = (low[0], high[0], low[1], high[1])
    plot.density(jax.jit(density.log_prob), extent, ax=axes[0, 1])
    plot.samples(density.sample(sample_key, (3000,)), ax=axes[0, 2], color="tab:orange")
    plot.trajectories(
        density.from_flow(paths), ax=axes[1, 0], start="noise (t = 0)", end="sample (t = 1)"
    )
    axes[1, 1].set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    plot.samples(flow.to_base(params, density.to_flow(data[:3000])), ax=axes[1, 1])
    for radius in (1, 2, 3):
        axes[1, 1].add_patch(Circle((0, 0), radius, fill=False, color="black", lw=0.8))
    axes[1, 1].set(xlim=(-4, 4), ylim=(-4, 4))
    draw_scores(axes[1, 2], [(p.step, p.nats) for p in history])
    titles = ("data", "learned density", "samples")
    titles += ("from noise to samples", "data carried to noise")
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title)
    for axis in axes[0]:
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes[1, 0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    circles = "circles: 1, 2 and 3 standard deviations of the base density"
    axes[1, 1].text(0.5, -0.21, circles, ha="center", transform=axes[1, 1].transAxes)
    save(figure, path)


def picture_limits(data):
    low, high = np.quantile(data, 0.002, axis=0), np.quantile(data, 0.998, axis=0)
    return low - 0.15 * (high - low), high + 0.15 * (high - low)


def animate(density, limits, frames, path, key):
    """The flow at work: density and samples at each time, from noise to the data.

    The density at time `t` is the density of a flow that ends there.
    """
    (left, bottom), (right, top) = limits
    flow, params = density.flow, density.params
    times = np.linspace(flow.t0, flow.t1, frames)
    z = flow.base.sample(key, (1500,))
    options = {"batch": "joint", "ts": jnp.asarray(times)}
    paths = jaxode.solve(flow.f, z, flow.t0, flow.t1, params, **options).ys
    samples = density.from_flow(paths)

    @jax.jit
    def log_prob_at(t, x):
        z, log_det = density.to_flow(x), density.log_det(x)
        return dataclasses.replace(flow, t1=t).log_prob(params, z) + log_det

    figure, axes = plt.subplots(1, 2, figsize=(8, 4), constrained_layout=True)

    def frame(i):
        for axis in axes:
            axis.clear()
        extent = (left, right, bottom, top)
        at_time = partial(log_prob_at, times[i])
        plot.density(at_time, extent, ax=axes[0], points=80, colorbar=False)
        plot.samples(samples[i], ax=axes[1], color="tab:orange")
        axes[0].set_title(f"density (square-root scale), t = {times[i]:.2f}")
        axes[1].set(xlim=(left, right), ylim=(bottom, top), title="samples")

    order = [*range(frames), *[frames - 1] * (frames // 3)]  # rest at the end
    with Progress() as progress:
        task = progress.add_task("animation", total=len(order))
        movie = FuncAnimation(figure, frame, frames=order, init_func=lambda: None)
        advance = lambda *_: progress.advance(task)
        movie.save(path, PillowWriter(fps=12), dpi=70, progress_callback=advance)
    plt.close(figure)
    print(f"animation: {path}")


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=5000, batch=512, width=64)
    known.add_argument("--data", default="8gaussians", help=f"{', '.join(TOYS)} or a CSV file")
    known.add_argument("--frames", type=count, default=36, help="of the animation (default 36)")
    options = known.parse_args(arguments)
    movie = beside(options.out, ".gif")
    rng = np.random.default_rng(options.seed)
    points = rng.permutation(load(options.data, rng))
    split = min(len(points) // 10, 2000)
    announce(__doc__)
    network_key, fit_key, draw_key = jax.random.split(jax.random.key(options.seed), 3)
    held_out, data = jnp.split(jnp.asarray(points, float), [split])
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-4, atol=1e-4)
    network = jaxode.nn.Residual(2, options.width, key=network_key)
    try:
        density = jaxode.bind(flow, network, standardize=data)  # in units of the data
    except ValueError as error:  # such as a constant column
        raise InputError(str(error)) from None
    density, history = jaxode.fit(
        density, data, key=fit_key, steps=options.steps, batch_size=options.batch
    )
    print(f"trained in {history[-1].seconds:.0f} s")
    log_prob = density.log_prob(held_out)
    print(f"held-out log-density: {log_prob.mean():.3f} nats ({len(held_out)} points)")
    animate(density, picture_limits(data), options.frames, movie, draw_key)
    draw(density, data, history, options.out, draw_key)
    return 0


if __name__ == "__main__":
    run(main)
