"""Learn a dynamical system from a few noisy observations at irregular times.

    python examples/spiral.py

The system is a cubic spiral, dy/dt = A y^3. Each of 32 series is observed with noise at its own 16
random times. The starting points are unknown and learned together with the network. Prints the
errors on these series and from new starting points, up to three times the observed span. Half a
minute on two cores.

Reference: Chen et al. (2018), arXiv:1806.07366.
"""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from common.arguments import announce, parser, run
from common.descent import minimize
from common.pictures import save
from matplotlib.ticker import NullFormatter

import jaxode
from jaxode import plot

SERIES, OBSERVED, SPAN, NOISE = 32, 16, 2.0, 0.05


def truth(t, y, args):
    del t, args
    x, y = y**3
    return jnp.stack([-0.1 * x + 2.0 * y, -2.0 * x - 0.1 * y])


def learned(t, y, network):
    return network(jnp.zeros_like(t), y)  # the system is autonomous: the network ignores t


def paths(f, args, y0, ts):
    """All series at the same times, `[times, series, 2]`."""
    return jaxode.solve(f, y0, 0.0, ts[-1], args, batch="joint", ts=ts).ys


def observe(f, args, y0, times, **options):
    """Each series at its own times `[series, observed]`, in one solve: `[series, observed, 2]`."""
    ends = times[:, -1]
    return jaxode.solve(f, y0, 0.0, ends, args, batch="per_sample", ts=times, **options).ys


def train(params, times, observed, steps, rate, key):
    """Least squares with Adam. The horizon grows: early far predictions only mislead training."""

    def loss(params, step, key):
        network, y0 = params
        horizon = SPAN * jnp.minimum(1.0, 0.1 + 1.5 * step / steps)
        # Times beyond the horizon become padding, and the solve ends there.
        within = jnp.minimum(times, horizon)
        error = observe(learned, network, y0, within, throw=False) - observed
        seen = times <= horizon
        return jnp.sum(jnp.where(seen[..., None], error**2, 0.0)) / (2 * jnp.sum(seen))

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    params, losses = minimize(loss, params, optimizer, steps, key, "training")
    return params, losses**0.5


def draw(network, y0, new, times, observed, losses, path):
    """Observations, the fit, a continuation from a new starting point, and the training curve."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 10), constrained_layout=True)
    axes = grid.ravel()
    plot.samples(observed.reshape(-1, 2), ax=axes[0], s=10)
    plot.trajectories(paths(learned, network, y0, jnp.linspace(0, SPAN, 400)), ax=axes[1])
    plot.samples(observed.reshape(-1, 2), ax=axes[1], color="black", s=8, label="observation")
    for axis in axes[:2]:
        axis.set(xlabel="$y_1$", ylabel="$y_2$", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    ts = jnp.linspace(0, 3 * SPAN, 1200)
    exact, fit = paths(truth, None, new[:1], ts), paths(learned, network, new[:1], ts)
    for i, color in enumerate(("tab:blue", "tab:orange")):
        axes[2].plot(ts, exact[:, 0, i], color=color, lw=4, alpha=0.3, label=f"$y_{i + 1}$, truth")
        axes[2].plot(ts, fit[:, 0, i], color=color, lw=1, label=f"$y_{i + 1}$, learned")
        axes[2].plot(0, new[0, i], "o", color=color, ms=5)
    axes[2].axvspan(0, SPAN, color="0.93", lw=0, label="span of the observations")
    axes[2].set(xlabel="time", ylabel="$y$")
    plot.history(losses, ax=axes[3], window=1)
    axes[3].axhline(NOISE, color="gray", ls="--", lw=1, label="noise")
    axes[3].axvspan(0, 0.6 * len(losses), color="0.93", lw=0, label="the horizon still grows")
    axes[3].set(yscale="log", ylabel="root mean square error up to the horizon")
    axes[3].yaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in (0.03, 0.05, 0.1, 0.2, 0.5, 1.0) if tick < 1.2 * max(losses)]
    axes[3].set_yticks(ticks, map(str, ticks))
    titles = ("noisy observations", "the fit", "from a new starting point (dots)", "training")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    for axis in axes[1:]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = parser(__file__, __doc__, steps=1200, rate=5e-3, width=64).parse_args(arguments)
    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 5))
    start, new = jax.random.uniform(next(keys), (2, SERIES, 2), minval=-1.6, maxval=1.6)
    times = jnp.sort(jax.random.uniform(next(keys), (SERIES, OBSERVED), maxval=SPAN), axis=1)
    exact = observe(truth, None, start, times)
    observed = exact + NOISE * jax.random.normal(next(keys), exact.shape)

    network: Any = jaxode.nn.MLP(2, (options.width,) * 2, key=next(keys))
    (network, y0), losses = train(
        (network, observed[:, 0]), times, observed, options.steps, options.rate, next(keys)
    )

    ts = jnp.linspace(0, 3 * SPAN, 300)
    errors = paths(learned, network, new, ts) - paths(truth, None, new, ts)
    rms = lambda error: float(jnp.sqrt(jnp.mean(error**2)))
    seen = rms(observe(learned, network, y0, times) - exact)
    print(f"root mean square error (noise {NOISE}, size of the data {rms(exact):.2f})")
    print(f"  at the observations, without their noise   {seen:.3f}")
    print(f"  from new starting points, same span        {rms(errors[ts <= SPAN]):.3f}")
    print(f"  from new starting points, three times it   {rms(errors):.3f}")
    draw(network, y0, new, times, observed, losses, options.out)
    return 0


if __name__ == "__main__":
    run(main)
