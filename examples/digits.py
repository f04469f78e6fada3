"""Train a continuous normalizing flow on scikit-learn's handwritten digits.

    python examples/digits.py

1797 real images of 8x8 pixels with 17 grey levels. `jaxode.fit` dequantizes and matches, and stops
when images set aside improve no more. Prints train and held-out bits per dimension, also for a
Gaussian with full covariance, and writes one picture. Under a minute on two cores; on slower ones
the same picture comes later. Ctrl-C ends training early and goes on.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, parser, run
from common.pictures import draw_scores, save, tile
from sklearn.datasets import load_digits

import jaxode
from jaxode import images

LEVELS, PIXELS = 17, 64
HELD_OUT, VALIDATION = 300, 100  # images; the second set chooses the parameters
MARGIN = 1.0  # grey levels beyond black and white, which keep the logit finite


def bits(log_prob) -> float:
    return float(np.mean(images.bits_per_dimension(log_prob, PIXELS)))


def draw(density, data, history, lines, path, key):
    """Real digits, samples, paths from noise to digits, and the scores during training."""
    samples = density.sample(key, (40,))
    z = density.flow.base.sample(jax.random.fold_in(key, 1), (4,))
    times = jnp.linspace(density.flow.t0, density.flow.t1, 11)
    path_of = jaxode.solve(density.flow.f, z, 0.0, 1.0, density.params, batch="joint", ts=times)
    frames = density.from_flow(path_of.ys).swapaxes(0, 1)

    figure, axes = plt.subplots(2, 2, figsize=(13, 7), constrained_layout=True)
    tile(axes[0, 0], data[:40], 4, "real digits")
    tile(axes[0, 1], samples, 4, "samples")
    tile(axes[1, 0], frames, 4, "from independent pixels to digits")
    axes[1, 0].set_xticks(9 * np.arange(len(times)) + 3.5, [f"{t:.1f}" for t in times])
    axes[1, 0].set(xlabel="time $t$ of the flow")
    draw_scores(axes[1, 1], [(p.step, bits(-p.nats)) for p in history], lines)
    axes[1, 1].set(ylabel="bits per dimension")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = parser(__file__, __doc__, steps=1200, batch=256, width=256)
    options = options.parse_args(arguments)
    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    pixels, _ = load_digits(return_X_y=True)
    pixels = jax.random.permutation(next(keys), jnp.asarray(pixels, float))
    held_out, validation, data = jnp.split(pixels, [HELD_OUT, HELD_OUT + VALIDATION])
    print(f"{len(data)} digits to train on, {len(held_out)} held out", flush=True)
    noisy = lambda x: x + jax.random.uniform(next(keys), x.shape)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(PIXELS), rtol=1e-4, atol=1e-4)
    network = jaxode.nn.Residual(PIXELS, options.width, key=next(keys))
    bound = lambda standardize: jaxode.bind(
        flow, network, support=(-MARGIN, LEVELS + MARGIN), standardize=standardize(noisy(data))
    )
    density, history = jaxode.fit(
        bound(jaxode.standardize.affine), data, key=next(keys),
        steps=options.steps, batch_size=options.batch, validation=validation, dequantize=True,
        optimizer=optax.adamw(8e-3, weight_decay=1.0), time_power=1.0,
    )  # fmt: skip
    print(f"trained in {history[-1].seconds:.0f} s; evaluating")

    print("bits per dimension            train   held out")
    rows, white = (noisy(data[:HELD_OUT]), noisy(held_out)), bound(jaxode.standardize.whiten)
    gaussian = [bits(flow.base.log_prob(white.to_flow(x)) + white.log_det(x)) for x in rows]
    learned = [bits(density.log_prob(x)) for x in rows]
    print(f"full-covariance Gaussian   {gaussian[0]:8.3f}   {gaussian[1]:8.3f}")
    print(f"flow                       {learned[0]:8.3f}   {learned[1]:8.3f}")
    lines = {"flow, held out": learned[1], "Gaussian, held out": gaussian[1]}
    draw(density, data, history, lines, options.out, next(keys))
    return 0


if __name__ == "__main__":
    run(main)
