"""Simulation-based inference: the posterior of a simulator's parameters from simulations alone.

    python examples/posterior.py

The simulator is "two moons": two parameters, two observed numbers, and a posterior of two thin
crescents. A conditional flow q(theta | x) is trained by matching, then by likelihood. It is bound
to the box of the prior and the units of the simulator. Two checks follow. Rank histograms over new
simulations are flat if the posteriors are calibrated. For one observation the exact posterior is
known, and the total variation distance to it is printed. A minute and a half on two cores.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from arguments import announce, picture, run, seed
from recipe import Phase, draw_scores, train
from scipy import stats

import jaxode

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

OBSERVATION = np.zeros(2, np.float32)
RANKS = 20  # possible ranks of a parameter among 19 samples of its posterior


def arm(theta):
    """The position to which the parameters move the crescent, `[..., 2]`."""
    a, b = theta[..., 0], theta[..., 1]
    return jnp.stack([-jnp.abs(a + b), b - a], -1) / jnp.sqrt(2) + jnp.array([0.25, 0.0])


def simulate(key, n: int):
    """Parameters from the prior, uniform on the box [-1, 1]^2, and one observation for each."""
    prior_key, angle_key, radius_key = jax.random.split(key, 3)
    theta = jax.random.uniform(prior_key, (n, 2), minval=-1.0, maxval=1.0)
    angle = jax.random.uniform(angle_key, (n,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key, (n,))
    crescent = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return theta, arm(theta) + crescent


def exact_posterior(theta, x):
    """The posterior density up to a constant: the likelihood, because the prior is flat."""
    u, v = jnp.moveaxis(x - arm(theta), -1, 0)
    radius = jnp.hypot(u, v)
    return jnp.where(u > 0, jnp.exp(-0.5 * ((radius - 0.1) / 0.01) ** 2) / radius, 0.0)


class Network(eqx.Module):
    """A residual network whose blocks are gated by the time and an encoding of the observation.

    Thin posteriors need more than the networks in `jaxode.nn`. Any Equinox module works.
    """

    encoder: list[eqx.nn.Linear]
    first: eqx.nn.Linear
    blocks: list[eqx.nn.Linear]
    gates: list[eqx.nn.Linear]
    last: eqx.nn.Linear

    def __init__(self, width: int, key, depth: int = 3):
        keys = iter(jax.random.split(key, 4 + 2 * depth))
        linear = lambda size, out=width: eqx.nn.Linear(size, out, key=next(keys))
        self.encoder = [linear(2), linear(width)]
        self.first, self.last = linear(2 + width + 6), linear(width, 2)
        self.blocks = [linear(width) for _ in range(depth)]
        self.gates = [linear(width + 6) for _ in range(depth)]

    def __call__(self, t, theta, x):
        waves = jnp.pi * t * jnp.arange(1.0, 4.0)
        encoded = self.encoder[1](jax.nn.gelu(self.encoder[0](x)))
        known = jnp.concatenate([encoded, jnp.sin(waves), jnp.cos(waves)])
        state = self.first(jnp.concatenate([theta, known]))
        for block, gate in zip(self.blocks, self.gates, strict=True):
            state = state + block(jax.nn.gelu(state)) * jax.nn.sigmoid(gate(known))
        return self.last(jax.nn.gelu(state))


def phases(density, theta, x, options) -> tuple[Phase, Phase]:
    z, context = density.to_flow(theta, x)

    def matching(params, key):
        row_key, key = jax.random.split(key)
        rows = jax.random.choice(row_key, len(z), (options.batch,))
        return density.flow.matching_loss(params, z[rows], key=key, context=context[rows])

    def likelihood(params, key):
        rows = jax.random.choice(key, len(z), (options.batch,))
        return density.flow.nll(params, z[rows], context=context[rows])

    return (
        Phase("matching", matching, options.matching, 1e-3, every=500),
        Phase("likelihood", likelihood, options.steps, 1e-3, every=25),
    )


def ranks(density, theta, x, key):
    """How many of 19 posterior samples each parameter exceeds, `[simulations, 2]`."""
    shape = (RANKS - 1, len(theta))
    samples = density.sample(key, shape, context=jnp.broadcast_to(x, (*shape, *x.shape[1:])))
    return np.asarray(jnp.sum(samples < theta, axis=0))


def draw(panels, counts, history, path) -> None:
    """The exact and the learned posterior, rank histograms, and scores during training."""
    figure = plt.figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplot_mosaic([["exact", "learned", "ranks", "scores"]])
    # A square-root scale, and the same for both: it shows what is between the crescents.
    norm = PowerNorm(0.5, 0.0, max(values.max() for values in panels.values()))
    for name, values in panels.items():
        image = axes[name].imshow(
            values, origin="lower", extent=(-0.4, 0.4, -0.4, 0.4), norm=norm, cmap="magma"
        )
        axes[name].set(title=f"{name} posterior", xlabel="$\\theta_1$", ylabel="$\\theta_2$")
    bar = figure.colorbar(image, ax=[axes["exact"], axes["learned"]], shrink=0.8)
    bar.set_label("density (square-root scale)")
    expected = counts.sum(0)[0] / len(counts)
    low, high = stats.binom(counts.sum(0)[0], 1 / len(counts)).ppf([0.005, 0.995])
    axes["ranks"].axhspan(low, high, color="0.9", label="99% if calibrated")
    axes["ranks"].axhline(expected, color="0.6", lw=1)
    for index in range(counts.shape[1]):
        axes["ranks"].stairs(counts[:, index], np.linspace(0, RANKS, len(counts) + 1),
                             baseline=None, label=f"$\\theta_{index + 1}$")  # fmt: skip
    axes["ranks"].set(title="calibration", xlabel="rank among 19 samples", ylabel="simulations")
    axes["ranks"].set_ylim(0, 2 * expected)
    axes["ranks"].legend(loc="lower center")
    draw_scores(history, axes["scores"])
    axes["scores"].set(ylabel="negative log-density, nats", title="validation during training")
    axes["scores"].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=30_000, help="a tenth is held out")
    parser.add_argument("--matching", type=int, default=20_000, help="steps of matching")
    parser.add_argument("--steps", type=int, default=400, help="steps of likelihood after it")
    parser.add_argument("--batch", type=int, default=256, help="simulations in a training step")
    parser.add_argument("--width", type=int, default=64, help="of the network")
    parser.add_argument("--out", type=picture, default="out/posterior.png")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.matching, options.steps, options.batch, options.width) < 1:
        parser.error("--matching, --steps, --batch and --width must be at least 1")
    if options.simulations < 100:
        parser.error("--simulations must be at least 100")

    announce(__doc__)
    begin = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(options.seed), 6))
    theta, x = simulate(next(keys), options.simulations)
    cut = len(theta) // 10
    params = Network(options.width, next(keys))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3)
    density = jaxode.bind(
        flow, params, support=(-1.0, 1.0), standardize=(theta[cut:], x[cut:])
    )  # the density of parameters, in their units and within the prior's box

    @jax.jit
    def score(params):
        rows = slice(None, min(cut, 1000))
        return -density.with_params(params).log_prob(theta[rows], context=x[rows]).mean()

    trained, history = train(
        *phases(density, theta[cut:], x[cut:], options), params,
        lambda params: float(score(params)), next(keys),
    )  # fmt: skip
    if not history:
        return 1
    density = density.with_params(trained)
    print(
        f"trained in {history[-1].seconds:.0f} s; held-out nats {min(p.score for p in history):.3f}"
    )

    grid = jnp.linspace(-0.4, 0.4, 121)
    places = jnp.stack(jnp.meshgrid(grid, grid), -1)
    cell = float(grid[1] - grid[0]) ** 2
    exact = exact_posterior(places, OBSERVATION)
    panels = {
        "exact": np.asarray(exact / (exact.sum() * cell)),
        "learned": np.exp(density.log_prob(places, context=OBSERVATION)),
    }
    elsewhere = 1 - panels["learned"].sum() * cell
    variation = 0.5 * (np.abs(panels["exact"] - panels["learned"]).sum() * cell + elsewhere)
    print(f"total variation to the exact posterior: {variation:.3f}")

    new_theta, new_x = simulate(next(keys), min(2000, options.simulations))
    counted = ranks(density, new_theta, new_x, next(keys))
    bins = np.arange(RANKS + 1) - 0.5
    counts = np.stack([np.histogram(counted[:, i], bins)[0] for i in range(2)], 1)
    values = ", ".join(f"{stats.chisquare(column).pvalue:.2f}" for column in counts.T)
    print(f"calibration over {len(counted)} new simulations: p = {values} (uniform ranks)")
    draw(panels, counts, history, options.out)
    print(f"picture: {options.out}   total: {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    run(main)
