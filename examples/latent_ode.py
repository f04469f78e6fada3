"""Forecast irregular, partly observed series with a latent ODE, compared with a GRU.

    python examples/latent_ode.py

Predators and prey (Lotka-Volterra) from random starting points. Each reading is noisy, comes at a
random time, and counts only one of the two species. An encoder reads the first half of a series, 8
to 24 readings, backwards in time, and returns the starting point of a latent ODE, which forecasts
the second half. For comparison, a GRU with the same encoder steps from one time to the next. Prints
the errors of both halves on held-out series. About a minute on two cores.

References: Chen et al. (2018), arXiv:1806.07366; Rubanova et al. (2019), arXiv:1907.03907.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from common.arguments import announce, parser, run
from common.descent import minimize
from common.pictures import save
from jaxtyping import Array, Bool, Float

import jaxode
from jaxode import plot

TRAIN, TEST, MOST, HALF, NOISE = 384, 64, 24, 8.0, 0.05
LATENT, HIDDEN = 6, 48


class Series(NamedTuple):
    """Readings in order of time. Each half is padded by repeating its last time."""

    times: Float[Array, "series 2*most"]
    values: Float[Array, "series 2*most 2"]
    """Log populations of both species."""
    read: Bool[Array, "series 2*most 2"]
    """Which species was counted."""
    exact: Float[Array, "series 2*most 2"]


def truth(t, y, args):
    """Lotka-Volterra dynamics of log prey and log predators."""
    del t, args
    prey, predators = jnp.exp(y)
    return jnp.stack([1.0 - predators, prey - 1.0])


def simulate(key, count: int) -> Series:
    keys = jax.random.split(key, 5)
    y0 = jax.random.uniform(keys[0], (count, 2), minval=-1.2, maxval=1.2)
    lengths = jax.random.randint(keys[1], (count, 2, 1), 8, MOST + 1)
    real = jnp.arange(MOST) < lengths
    drawn = jnp.where(real, jax.random.uniform(keys[2], (count, 2, MOST), maxval=HALF), jnp.inf)
    drawn = jnp.sort(drawn, axis=2)
    last = jnp.take_along_axis(drawn, lengths - 1, axis=2)
    times = jnp.where(real, drawn, last) + HALF * jnp.arange(2)[:, None]
    times, real = times.reshape(count, -1), real.reshape(count, -1)
    exact = jaxode.solve(truth, y0, 0.0, times[:, -1], batch="per_sample", ts=times).ys
    species = jax.random.bernoulli(keys[3], shape=times.shape).astype(int)
    read = real[..., None] & (species[..., None] == jnp.arange(2))
    values = exact + NOISE * jax.random.normal(keys[4], exact.shape)
    return Series(times, jnp.where(read, values, 0.0), read, exact)


class Encoder(eqx.Module):
    """A GRU that reads the first half backwards, from its last reading to its first."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, size: int, key):
        keys = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(5, HIDDEN, key=keys[0])
        self.head = eqx.nn.Linear(HIDDEN, size, key=keys[1])

    def __call__(self, times, values, read):
        gaps = jnp.diff(times[:MOST], prepend=0.0)[:, None]
        inputs = jnp.concatenate([values[:MOST], read[:MOST], gaps], axis=1)

        def step(state, each):
            x, counted = each
            return jnp.where(counted, self.cell(x, state), state), None

        counted = read[:MOST].any(1)
        state, _ = jax.lax.scan(step, jnp.zeros(HIDDEN), (inputs, counted), reverse=True)
        return self.head(state)


class LatentODE(eqx.Module):
    encoder: Encoder
    field: jaxode.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.encoder = Encoder(LATENT, keys[0])
        self.field = jaxode.nn.MLP(LATENT, (64, 64), key=keys[1])
        self.decoder = eqx.nn.MLP(LATENT, 2, 32, 1, jnp.tanh, key=keys[2])

    def __call__(self, series: Series, times):
        z0 = jax.vmap(self.encoder)(series.times, series.values, series.read)
        # The system is autonomous, so the network ignores the time.
        field = lambda t, z, network: network(jnp.zeros_like(t), z)
        ends = times[:, -1]
        z = jaxode.solve(
            field, z0, 0.0, ends, self.field, batch="per_sample", ts=times,
            rtol=1e-3, atol=1e-3, throw=False,
        ).ys  # fmt: skip
        return jax.vmap(jax.vmap(self.decoder))(z)


class Recurrent(eqx.Module):
    """Steps from one time to the next with another GRU, which gets the time difference."""

    encoder: Encoder
    cell: eqx.nn.GRUCell
    decoder: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.encoder = Encoder(64, keys[0])
        self.cell = eqx.nn.GRUCell(1, 64, key=keys[1])
        self.decoder = eqx.nn.MLP(64, 2, 32, 1, jnp.tanh, key=keys[2])

    def __call__(self, series: Series, times):
        def one(state, times):
            gaps = jnp.diff(times, prepend=0.0)[:, None]

            def step(state, gap):
                state = self.cell(gap, state)
                return state, state

            return jax.vmap(self.decoder)(jax.lax.scan(step, state, gaps)[1])

        states = jax.vmap(self.encoder)(series.times, series.values, series.read)
        return jax.vmap(one)(states, times)


def train(model, data: Series, options, key, name: str):
    """Least squares on all readings of a series, of which the encoder sees the first half."""
    schedule = optax.cosine_decay_schedule(3e-3, options.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(model, step, key):
        rows = jax.random.choice(key, TRAIN, (options.batch,), replace=False)
        series = jax.tree.map(lambda x: x[rows], data)
        squares = (model(series, series.times) - series.values) ** 2
        return jnp.sum(jnp.where(series.read, squares, 0.0)) / jnp.sum(series.read)

    model, losses = minimize(loss, model, optimizer, options.steps, key, name)
    return model, losses**0.5


@eqx.filter_jit
def errors(model, data: Series):
    """Root mean square error over both species, in the half that was read and in the forecast."""
    squares = ((model(data, data.times) - data.exact) ** 2).mean(2)
    real = data.read.any(2)  # the rest is padding, at which a GRU is not trained
    of_half = lambda x: x.reshape(len(x), 2, -1).sum((0, 2))
    return jnp.sqrt(of_half(jnp.where(real, squares, 0.0)) / of_half(real))


def draw(models, data: Series, losses, path):
    """Three series with readings and forecasts, and the training curves."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    axes = grid.ravel()
    times = jnp.broadcast_to(jnp.linspace(0.0, 2 * HALF, 200), (TEST, 200))
    curve = models["latent ODE"](data, times)
    # A GRU has no values between its times, and knows only gaps like those in training.
    steps = models["GRU"](data, data.times)
    for i, axis in enumerate(axes[:3]):
        axis.axvspan(0, HALF, color="gray", alpha=0.12, lw=0, label="read by the encoder")
        real = data.read[i].any(1)  # the rest is padding
        for species, color, marker in ((0, "tab:green", "o"), (1, "tab:purple", "s")):
            label = ("prey", "predators")[species]
            seen = data.read[i, :, species]
            axis.plot(
                data.times[i][seen], data.values[i, :, species][seen], marker, color=color, ms=4,
                label=f"{label}, readings",
            )  # fmt: skip
            axis.plot(times[i], curve[i, :, species], color=color, label=f"{label}, latent ODE")
            axis.plot(
                data.times[i][real], steps[i, :, species][real], ":", color=color,
                label=f"{label}, GRU",
            )  # fmt: skip
            axis.plot(0.0, curve[i, 0, species], "x", color=color, mew=2, label=f"{label}, start")
        axis.set(xlabel="time", ylabel="log population", title=f"held-out series {i + 1}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    for name, curve in losses.items():
        plot.history(curve, ax=axes[3], window=20, label=name)
    axes[3].axhline(NOISE, color="gray", ls="--", lw=1, label="noise")
    axes[3].set(yscale="log", ylabel="root mean square error", title="training, mean of 20 steps")
    axes[3].legend()
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=2500, batch=64)
    options = known.parse_args(arguments)
    if options.batch > TRAIN:
        known.error(f"--batch must be at most {TRAIN}, the number of series")

    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    data, held_out = simulate(next(keys), TRAIN), simulate(next(keys), TEST)
    models = {"latent ODE": LatentODE(next(keys)), "GRU": Recurrent(next(keys))}
    losses = {}
    for name, model in models.items():
        models[name], losses[name] = train(model, data, options, next(keys), name)
    size = float(jnp.sqrt(jnp.mean(held_out.exact**2)))
    print(f"root mean square error on {TEST} series held out (size of the data {size:.2f})")
    print("              half that was read   forecast")
    for name, model in models.items():
        seen, forecast = errors(model, held_out)
        print(f"{name:12s} {seen:18.3f}   {forecast:8.3f}")
    draw(models, held_out, losses, options.out)
    return 0


if __name__ == "__main__":
    run(main)
