"""Simulation-based inference: the posterior of a simulator's parameters from simulations alone.

    python examples/posterior.py

The simulator is "two moons": two parameters, two observed numbers, and a posterior of two thin
crescents. A conditional flow q(theta | x) is bound to the box of the prior and the units of the
simulator, and `jaxode.fit` trains it. Two checks follow. `jaxode.calibration.sbc` ranks the
parameters of new simulations among draws. For one observation the exact posterior is known, and
the total variation distance to it is printed. A minute and a half on two cores.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common.arguments import announce, count, parser, run
from common.pictures import draw_scores, save
from matplotlib.colors import PowerNorm

import jaxode

OBSERVATION = np.zeros(2, np.float32)


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


def draw(panels, found, history, path) -> None:
    """The exact and the learned posterior, rank histograms, and scores during training."""
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplot_mosaic([["exact", "learned"], ["ranks", "scores"]])
    # A square-root scale, and the same for both: it shows what is between the crescents.
    norm = PowerNorm(0.5, 0.0, max(values.max() for values in panels.values()))
    for name, values in panels.items():
        image = axes[name].imshow(
            values, origin="lower", extent=(-0.4, 0.4, -0.4, 0.4), norm=norm, cmap="magma"
        )
        axes[name].set(title=f"{name} posterior", xlabel="$\\theta_1$", ylabel="$\\theta_2$")
    bar = figure.colorbar(image, ax=[axes["exact"], axes["learned"]], shrink=0.8)
    bar.set_label("density (square-root scale)")
    jaxode.plot.ranks(found.ranks, found.draws, ax=axes["ranks"])
    axes["ranks"].set_title("calibration")
    axes["ranks"].legend(loc="lower center")
    draw_scores(axes["scores"], [(p.step, p.nats) for p in history])
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=7000, batch=512, width=128)
    known.add_argument("--simulations", type=count, default=30_000, help="(default 30000)")
    options = known.parse_args(arguments)
    if options.simulations < 100:
        known.error("--simulations must be at least 100")

    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 6))
    theta, x = simulate(next(keys), options.simulations)
    # The density of parameters, in their units and within the prior's box.
    density = jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3),
        jaxode.nn.Residual(2, options.width, key=next(keys), context_size=2),
        support=(-1.0, 1.0), standardize=theta, standardize_context=x,
    )  # fmt: skip
    density, history = jaxode.fit(
        density, theta, context=x, key=next(keys), steps=options.steps, batch_size=options.batch
    )
    new_theta, new_x = simulate(next(keys), min(2000, options.simulations))
    nats = -float(density.log_prob(new_theta, context=new_x).mean())
    print(
        f"trained in {history[-1].seconds:.0f} s; {nats:.3f} nats of {len(new_x)} new simulations"
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

    found = jaxode.calibration.sbc(density, new_theta, new_x, key=next(keys))
    values = ", ".join(f"{p:.2f}" for p in found.p_values)
    print(f"calibration over {len(new_x)} new simulations: p = {values} (uniform ranks)")
    draw(panels, found, history, options.out)
    return 0


if __name__ == "__main__":
    run(main)
