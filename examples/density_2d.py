"""Learn a two-dimensional density: a classic toy data set, or your own two-column CSV file.

    python examples/density_2d.py --data pinwheel
    python examples/density_2d.py --data path/to/points.csv

Writes a picture of the data, the learned density, samples and trajectories, and an animation of the
flow from noise to data. About a minute on two cores.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from arguments import announce, picture, run, seed
from recipe import Phase, draw_scores, train
from rich.progress import Progress
from sklearn import datasets
from tables import as_numbers, is_number, read_rows

import jaxode
from jaxode import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import Circle


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


COUPLING = jaxode.coupling.optimal_transport(16)
TOYS = {
    "8gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "rings": rings,
}


def read_csv(path: Path) -> np.ndarray:
    """Two numeric columns, `[points, 2]`. A first line without numbers is a header."""
    rows = read_rows(path)
    if rows and not any(map(is_number, rows[0][1])):
        rows = rows[1:]
    if len(rows) < 10:
        raise ValueError(f"{path}: at least 10 points are needed; got {len(rows)}")
    for line, row in rows:
        if len(row) != 2:
            raise ValueError(
                f"{path}, line {line}: two columns separated by a comma are needed; got {len(row)}"
            )
        for cell in row:
            if not is_number(cell):
                raise ValueError(f"{path}, line {line}: {cell!r} is not a finite number")
    return as_numbers(path, [row for _, row in rows])


def check_density(name: str, points: np.ndarray) -> None:
    """Raise `ValueError` if the training points lie on a line, where they have no density."""
    if np.any(np.ptp(points, axis=0) <= 1e-12 * np.abs(points).max(0)):
        raise ValueError(
            f"{name}: a column is constant in the points to train on, so they have no density"
        )
    # A correlation this close to one differs from it only by rounding.
    if abs(np.corrcoef(points.T)[0, 1]) > 1 - 1e-9:
        raise ValueError(f"{name}: the points to train on lie on a line, so they have no density")


def load(name: str, rng: np.random.Generator) -> np.ndarray:
    if name in TOYS:
        return TOYS[name](rng, 20_000)
    if not Path(name).is_file():
        raise ValueError(f"{name} is neither one of {', '.join(TOYS)} nor a file")
    return read_csv(Path(name))


def phases(flow, data, options) -> tuple[Phase, Phase]:
    def batch(key):
        return jax.random.choice(key, data, (options.batch,))

    def matching(params, key):
        batch_key, key = jax.random.split(key)
        return flow.matching_loss(params, batch(batch_key), key=key, coupling=COUPLING)

    return (
        Phase("matching", matching, options.matching, 5e-3, every=250),
        Phase("likelihood", lambda m, key: flow.nll(m, batch(key)), options.steps, 3e-3, every=20),
    )


def draw(flow, params, data, history, mean, scale, path, key):
    """Data, learned density and samples; the flow in both directions; scores during training."""
    path_key, sample_key = jax.random.split(key)
    samples = flow.sample(params, sample_key, 3000) * scale + mean
    z, times = flow.base.sample(path_key, (60,)), jnp.linspace(flow.t0, flow.t1, 50)
    paths = jaxode.solve(flow.f, z, flow.t0, flow.t1, params, batch="joint", ts=times).ys

    def log_prob(x):  # in the units of the data
        return jax.jit(flow.log_prob)(params, (x - mean) / scale) - np.log(scale).sum()

    low, high = picture_limits(data)
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.5), constrained_layout=True)
    plot.samples(data[:3000], ax=axes[0, 0])
    plot.density(log_prob, (low[0], high[0], low[1], high[1]), ax=axes[0, 1])
    plot.samples(samples, ax=axes[0, 2], color="tab:orange")
    plot.trajectories(
        paths * scale + mean, ax=axes[1, 0], start="noise (t = 0)", end="sample (t = 1)"
    )
    standardized = jnp.asarray((data[:3000] - mean) / scale, jnp.float32)
    axes[1, 1].set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    plot.samples(flow.to_base(params, standardized), ax=axes[1, 1])
    for radius in (1, 2, 3):
        axes[1, 1].add_patch(Circle((0, 0), radius, fill=False, color="black", lw=0.8))
    axes[1, 1].set(xlim=(-4, 4), ylim=(-4, 4))
    draw_scores(history, axes[1, 2])
    axes[1, 2].set(ylabel="negative log-density, nats")
    last = ("from noise to samples", "data carried to noise", "validation points during training")
    titles = ("data", "learned density", "samples", *last)
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
    for axis in axes[0]:
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes[1, 0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    circles = "circles: 1, 2 and 3 standard deviations of the base density"
    axes[1, 1].text(0.5, -0.21, circles, ha="center", transform=axes[1, 1].transAxes)
    axes[1, 2].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def picture_limits(data):
    low, high = np.quantile(data, 0.002, axis=0), np.quantile(data, 0.998, axis=0)
    return low - 0.15 * (high - low), high + 0.15 * (high - low)


def animate(flow, params, limits, frames, path, key):
    """The flow at work: density and samples at each time, from noise to the data.

    The density at time `t` is the density of a flow that ends there.
    """
    (left, bottom), (right, top) = limits
    times = np.linspace(flow.t0, flow.t1, frames)
    z = flow.base.sample(key, (1500,))
    options = {"batch": "joint", "ts": jnp.asarray(times)}
    samples = jaxode.solve(flow.f, z, flow.t0, flow.t1, params, **options).ys

    @jax.jit
    def log_prob_at(t, x):
        return dataclasses.replace(flow, t1=t).log_prob(params, x)

    figure, axes = plt.subplots(1, 2, figsize=(8, 4), constrained_layout=True)

    def frame(i):
        for axis in axes:
            axis.clear()
        extent = (left, right, bottom, top)
        density = partial(log_prob_at, times[i])
        plot.density(density, extent, ax=axes[0], points=100, colorbar=False)
        plot.samples(samples[i], ax=axes[1], color="tab:orange")
        axes[0].set_title(f"density (square-root scale), t = {times[i]:.2f}")
        axes[1].set(xlim=(left, right), ylim=(bottom, top), title="samples")
        for axis in axes:
            axis.set(xlabel="$z_1$", ylabel="$z_2$")

    order = [*range(frames), *[frames - 1] * (frames // 3)]  # rest at the end
    with Progress() as progress:
        task = progress.add_task("animation", total=len(order))
        movie = FuncAnimation(figure, frame, frames=order, init_func=lambda: None)
        movie.save(
            path,
            PillowWriter(fps=12),
            dpi=70,
            progress_callback=lambda *_: progress.advance(task),
        )
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="8gaussians", help=f"{', '.join(TOYS)} or a CSV file")
    parser.add_argument("--matching", type=int, default=10_000, help="steps of matching")
    parser.add_argument("--steps", type=int, default=300, help="steps of likelihood after it")
    parser.add_argument("--batch", type=int, default=256, help="points in a training step")
    parser.add_argument("--out", type=picture, default="out/density_2d.png", help="the picture")
    parser.add_argument("--frames", type=int, default=36, help="of the animation")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.matching, options.steps, options.batch, options.frames) < 1:
        parser.error("--matching, --steps, --batch and --frames must be at least 1")
    rng = np.random.default_rng(options.seed)
    try:
        data = rng.permutation(load(options.data, rng))
        split = min(len(data) // 10, 2000)
        check_density(options.data, data[split:])
    except ValueError as error:
        print(f"density_2d: {error}", file=sys.stderr)
        return 2

    announce(__doc__)
    mean, scale = data[split:].mean(0), data[split:].std(0)
    standardized = jnp.asarray((data - mean) / scale, jnp.float32)
    # Half of the held-out points choose the parameters, half score the result.
    validation, held_out, training = jnp.split(standardized, [split // 2, split])
    network_key, train_key, draw_key = jax.random.split(jax.random.key(options.seed), 3)
    params = jaxode.nn.ConcatSquash(2, (64, 64), key=network_key)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-4, atol=1e-4)
    nats = np.log(scale).sum()  # standardizing stretched the points
    score = jax.jit(lambda params: flow.nll(params, validation) + nats)
    params, history = train(
        *phases(flow, training, options), params, lambda params: float(score(params)), train_key
    )
    if not history:
        return 1
    print(f"trained in {history[-1].seconds:.0f} s")
    tight = jaxode.cnf(jaxode.nn.field, flow.base, rtol=1e-6, atol=1e-6)
    log_prob = tight.log_prob(params, held_out) - nats
    print(f"held-out log-density: {log_prob.mean():.3f} nats ({len(held_out)} points)")
    draw(flow, params, data, history, mean, scale, options.out, draw_key)
    movie = options.out.with_suffix(".gif")
    animate(flow, params, picture_limits(standardized), options.frames, movie, draw_key)
    print(f"picture: {options.out}   animation: {movie}")
    return 0


if __name__ == "__main__":
    run(main)
