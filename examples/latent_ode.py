"""Forecast irregular, partly observed series with a latent ODE, compared with a GRU.

    python examples/latent_ode.py

Predators and prey (Lotka-Volterra) from random starting points. Each reading is noisy, comes at a
random time, and counts only one of the two species. An encoder reads the first half of a series, 8
to 24 readings, backwards in time, and returns the starting point of a latent ODE, which forecasts
the second half. For comparison, a GRU with the same encoder steps from one time to the next. Prints
the errors of both halves on held-out series. About a minute on two cores.

References: Chen et al. (2018), arXiv:1806.07366; Rubanova et al. (2019), arXiv:1907.03907.
"""

import argparse
import sys
import time
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import announce, picture, run, seed
from jaxtyping import Array, Bool, Float
from rich.progress import Progress

import jaxode
from jaxode import plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def train(model, data: Series, steps: int, batch: int, key, name: str):
    """Least squares on all readings of a series, of which the encoder sees the first half."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    )

    def loss(model, series: Series):
        squares = (model(series, series.times) - series.values) ** 2
        return jnp.sum(jnp.where(series.read, squares, 0.0)) / jnp.sum(series.read)

    @eqx.filter_jit
    def block(model, state, keys):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        def step(carry, key):
            arrays, state = carry
            rows = jax.random.choice(key, TRAIN, (batch,), replace=False)
            series = jax.tree.map(lambda x: x[rows], data)
            of_arrays = lambda arrays: loss(eqx.combine(arrays, static), series)
            value, gradient = jax.value_and_grad(of_arrays)(arrays)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(arrays, updates), state), value

        (arrays, state), values = jax.lax.scan(step, (arrays, state), keys)
        return eqx.combine(arrays, static), state, values

    state, losses = optimizer.init(eqx.filter(model, eqx.is_inexact_array)), []
    with Progress() as progress:
        task = progress.add_task(f"{name}: compiling", total=steps)
        for done in range(0, steps, 20):
            key, block_key = jax.random.split(key)
            keys = jax.random.split(block_key, min(20, steps - done))
            model, state, values = block(model, state, keys)
            losses.extend(np.sqrt(values))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"{name}: the solve failed")
            text = f"{name}: error {losses[-1]:.3f}"
            progress.update(task, advance=len(keys), description=text)
    return model, losses


@eqx.filter_jit
def errors(model, data: Series):
    """Root mean square error over both species, in the half that was read and in the forecast."""
    squares = (model(data, data.times) - data.exact) ** 2
    halves = squares.reshape(len(squares), 2, -1).mean((0, 2))
    return jnp.sqrt(halves)


def draw(models, data: Series, losses, path):
    """Three series with readings and forecasts, and the training curves."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), constrained_layout=True)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    for name, curve in losses.items():
        plot.history(curve, ax=axes[3], window=20, label=name)
    axes[3].axhline(NOISE, color="gray", ls="--", lw=1, label="noise")
    axes[3].set(yscale="log", ylabel="root mean square error", title="training, mean of 20 steps")
    axes[3].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2500, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=64, help="series in a training step")
    parser.add_argument("--out", type=picture, default="out/latent_ode.png", help="the picture")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if options.steps < 1 or not 1 <= options.batch <= TRAIN:
        parser.error(f"--steps must be at least 1, and --batch from 1 to {TRAIN}")

    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    data, held_out = simulate(next(keys), TRAIN), simulate(next(keys), TEST)
    models = {"latent ODE": LatentODE(next(keys)), "GRU": Recurrent(next(keys))}
    losses = {}
    for name, model in models.items():
        begin = time.perf_counter()
        fit = partial(train, steps=options.steps, batch=options.batch, name=name)
        try:
            models[name], losses[name] = fit(model, data, key=next(keys))
        except FloatingPointError as error:
            print(f"latent_ode: {error}", file=sys.stderr)
            return 1
        print(f"{name}: {options.steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
    size = float(jnp.sqrt(jnp.mean(held_out.exact**2)))
    print(f"root mean square error on {TEST} series held out (size of the data {size:.2f})")
    print("              half that was read   forecast")
    for name, model in models.items():
        seen, forecast = errors(model, held_out)
        print(f"{name:12s} {seen:18.3f}   {forecast:8.3f}")
    draw(models, held_out, losses, options.out)
    print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    run(main)
