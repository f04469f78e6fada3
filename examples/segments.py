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

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save

import jaxode

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


def train(network, observed, segments: int, options, name: str, weight: float = 1.0):
    """Least squares within segments, plus the gaps between them. Readings are the first starts."""
    times, observed = cut(observed, segments)

    def loss(params, step, key):
        network, starts = params
        ys = jaxode.solve(
            learned, starts, times[:, 0], times[:, -1], network, batch="per_sample", ts=times,
            rtol=1e-4, atol=1e-4, throw=False,
        ).ys  # fmt: skip
        gaps = ys[:-1, -1] - starts[1:]
        return jnp.mean((ys - observed) ** 2) + weight * jnp.sum(gaps**2) / len(starts)

    optimizer = optax.adam(optax.cosine_decay_schedule(options.rate, options.steps))
    params, key = (network, observed[:, 0]), jax.random.key(0)
    (network, starts), _ = minimize(loss, params, optimizer, options.steps, key, name)
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
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=2500, rate=1e-2)
    known.add_argument("--segments", type=count, default=40, help="must divide 400 (default 40)")
    options = known.parse_args(arguments)
    if options.segments < 2 or (len(TIMES) - 1) % options.segments:
        known.error("--segments must divide the 400 intervals, and be 2 or more")

    announce(__doc__)
    noise_key, key = jax.random.split(jax.random.key(options.seed))
    exact = whole(truth, None, jnp.array([1.5, 0.0]))
    observed = exact + NOISE * jax.random.normal(noise_key, exact.shape)
    network: Any = jaxode.nn.MLP(2, (32, 32), key=key)
    fits = {}
    size = float(jnp.sqrt(jnp.mean(exact**2)))
    print(f"root mean square error over {PERIODS} periods (size of the data {size:.2f})")
    for segments in (1, options.segments):
        name = "one solve" if segments == 1 else f"{segments} segments"
        trained, start = train(network, observed, segments, options, name)
        fits[name] = whole(learned, trained, start, throw=False)
        error = float(jnp.sqrt(jnp.mean((fits[name] - exact) ** 2)))
        print(f"  trained by {name:12s} {error:.3f}", flush=True)
    draw(exact, observed, fits, options.out)
    return 0


if __name__ == "__main__":
    run(main)
