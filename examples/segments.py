"""Learn from a long oscillation by multiple shooting, where a single solve does not.

    python examples/segments.py

A damped oscillation, y'' = -y - 0.02 y', is observed with noise over 20 periods. A single solve
over the whole series learns to predict the mean: once phases differ, a smaller amplitude means a
smaller error. So the series is cut into segments. Each has its own starting point, learned together
with the network, and the loss includes the gaps between the end of one segment and the start of the
next. One solve covers all segments, with per-sample start and end times. Prints the error of a
single solve over all 20 periods for both networks. Half a minute on two cores.

Reference: Bock and Plitt (1984), doi:10.1016/S1474-6670(17)61205-9, multiple shooting.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import announce, picture, run, seed
from rich.progress import Progress

import jaxode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PERIODS, PER_PERIOD, NOISE = 20, 20, 0.05
TIMES = jnp.linspace(0.0, 2 * np.pi * PERIODS, PERIODS * PER_PERIOD + 1)


def truth(t, y, args):
    del t, args
    return jnp.stack([y[1], -y[0] - 0.02 * y[1]])


def learned(t, y, network):
    return network(jnp.zeros_like(t), y)  # the system is autonomous: the network ignores t


def whole(f, args, y0, **options):
    """The series from one starting point, `[times, 2]`."""
    return jaxode.solve(f, y0, 0.0, TIMES[-1], args, ts=TIMES, **options).ys


def cut(observed, segments: int):
    """Times `[segments, times]` and readings. A segment ends where the next one starts."""
    length = (len(TIMES) - 1) // segments
    index = length * np.arange(segments)[:, None] + np.arange(length + 1)
    return TIMES[index], observed[index]


def loss_of(params, times, observed, weight):
    """Least squares within segments, plus the gaps between them."""
    network, starts = params
    ys = jaxode.solve(
        learned, starts, times[:, 0], times[:, -1], network, batch="per_sample", ts=times,
        rtol=1e-4, atol=1e-4, throw=False,
    ).ys  # fmt: skip
    gaps = ys[:-1, -1] - starts[1:]
    return jnp.mean((ys - observed) ** 2) + weight * jnp.sum(gaps**2) / len(starts)


def train(network, observed, segments: int, steps: int, rate: float, weight: float = 1.0):
    """Train with Adam. Readings are the initial starting points."""
    times, observed = cut(observed, segments)
    params = network, observed[:, 0]
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def block(carry, count):
        def step(_, carry):
            params, state = carry
            gradient = jax.grad(loss_of)(params, times, observed, weight)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, count, step, carry)

    carry: Any = params, optimizer.init(params)
    name = "one solve" if segments == 1 else f"{segments} segments"
    with Progress() as progress:
        task = progress.add_task(f"{name}: compiling", total=steps)
        for done in range(0, steps, 50):
            carry = jax.block_until_ready(block(carry, min(50, steps - done)))
            progress.update(task, advance=50, description=name)
    network, starts = carry[0]
    return network, starts[0]


def draw(exact, observed, fits, path):
    figure, axes = plt.subplots(len(fits), 1, figsize=(13, 5), sharex=True, constrained_layout=True)
    for axis, (name, ys) in zip(axes, fits.items(), strict=True):
        axis.plot(TIMES, exact[:, 0], color="black", lw=2.5, alpha=0.3, label="truth")
        axis.plot(TIMES, observed[:, 0], ".", color="gray", ms=3, label="readings")
        axis.plot(TIMES, ys[:, 0], color="tab:red", lw=1, label="learned, one solve")
        axis.plot(TIMES[0], ys[0, 0], "o", color="tab:red", ms=6, label="starting point")
        axis.set(ylabel="$y$", title=f"trained by {name}", ylim=(-1.7, 1.7))
    axes[-1].set(xlabel="time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=40, help="must divide the 400 intervals")
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--out", type=picture, default="out/segments.png", help="the picture")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if options.steps < 1 or options.segments < 2 or (len(TIMES) - 1) % options.segments:
        parser.error("--steps must be at least 1, and --segments divide 400, and be 2 or more")

    announce(__doc__)
    noise_key, key = jax.random.split(jax.random.key(options.seed))
    exact = whole(truth, None, jnp.array([1.5, 0.0]))
    observed = exact + NOISE * jax.random.normal(noise_key, exact.shape)
    network: Any = jaxode.nn.MLP(2, (32, 32), key=key)
    fits = {}
    size = float(jnp.sqrt(jnp.mean(exact**2)))
    print(f"root mean square error over {PERIODS} periods (size of the data {size:.2f})")
    for segments in (1, options.segments):
        begin = time.perf_counter()
        trained, start = train(network, observed, segments, options.steps, options.rate)
        name = "one solve" if segments == 1 else f"{segments} segments"
        fits[name] = whole(learned, trained, start, throw=False)
        error = float(jnp.sqrt(jnp.mean((fits[name] - exact) ** 2)))
        seconds = time.perf_counter() - begin
        print(f"  trained by {name:12s} {error:.3f}   in {seconds:.0f} s", flush=True)
    draw(exact, observed, fits, options.out)
    print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    run(main)
