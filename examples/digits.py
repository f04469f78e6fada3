"""Train a continuous normalizing flow on scikit-learn's handwritten digits.

    python examples/digits.py

1797 real images of 8x8 pixels with 17 grey levels. Flow matching comes first, then maximum
likelihood. Prints train and held-out bits per dimension, also for a Gaussian with full covariance,
and writes one picture. About a minute on two cores; Ctrl-C ends training early and goes on.
"""

import argparse
import time
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from arguments import announce, picture, run, seed
from jaxtyping import Array, Float, PRNGKeyArray
from recipe import Phase, draw_scores, train
from sklearn.datasets import load_digits

import jaxode
from jaxode import images
from jaxode.divergence import exact, hutchinson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS, PIXELS = 17, 64
HELD_OUT, VALIDATION = 300, 100  # images; the second set chooses the parameters
COUPLING = jaxode.coupling.optimal_transport(16)
MARGIN = 0.05  # keeps the logit finite at black and white


class Whitening(NamedTuple):
    """`y = L z + mean`, with `L` the Cholesky factor of the covariance of the training split."""

    mean: Float[Array, " pixels"]
    factor: Float[Array, "pixels pixels"]
    inverse: Float[Array, "pixels pixels"]  # a product is faster than a triangular solve per batch


def to_logit(key: PRNGKeyArray, x: Float[Array, "batch pixels"]):
    """Dequantized images on the real line, and the log-determinant `[batch]` of the map."""
    u, levels_log_det = images.dequantize(key, x, LEVELS)
    y, log_det = images.logit(u, MARGIN)
    return y, levels_log_det + log_det


def whiten(whitening: Whitening, key: PRNGKeyArray, x: Float[Array, "batch pixels"]):
    """Images as the flow sees them, and the log-determinant `[batch]` of the full map."""
    y, log_det = to_logit(key, x)
    z = (y - whitening.mean) @ whitening.inverse.T
    return z, log_det - jnp.sum(jnp.log(jnp.diag(whitening.factor)))


def to_images(whitening: Whitening, z: Float[Array, "... pixels"]) -> Float[Array, "... pixels"]:
    """Back to grey levels from 0 to 16."""
    u = images.inverse_logit(z @ whitening.factor.T + whitening.mean, MARGIN)
    return images.quantize(u, LEVELS)


def fit_whitening(key: PRNGKeyArray, x: Float[Array, "batch pixels"]) -> Whitening:
    """Mean and covariance of the logits, over several dequantizations of the training split."""
    y = jax.vmap(lambda key: to_logit(key, x)[0])(jax.random.split(key, 16)).reshape(-1, PIXELS)
    # Pixels that are always black make the covariance nearly singular.
    covariance = jnp.cov(y.T) + 1e-4 * jnp.eye(PIXELS)
    factor = jnp.linalg.cholesky(covariance)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(PIXELS), lower=True)
    return Whitening(y.mean(0), factor, inverse)


def bits_per_dimension(flow, whitening):
    """`bits(params, x, key)`: the mean over images, with the exact trace and a tight tolerance.

    It works in batches of 100 images, so that one program serves all.
    """
    tight = jaxode.cnf(flow.f, flow.base, divergence=exact(), rtol=1e-4, atol=1e-4)

    @jax.jit
    def batch(params, x, key):
        z, log_det = whiten(whitening, key, x)
        return images.bits_per_dimension(tight.log_prob(params, z) + log_det, PIXELS).mean()

    def bits(params, x, key) -> float:
        batches = x.reshape(-1, 100, PIXELS)
        keys = jax.random.split(key, len(batches))
        return float(
            np.mean([float(batch(params, *each)) for each in zip(batches, keys, strict=True)])
        )

    return bits


def gaussian_bits(whitening, x, key) -> float:
    """Bits of a Gaussian with the training covariance: standard normal on whitened images."""
    z, log_det = whiten(whitening, key, x)
    log_prob = jaxode.standard_normal(PIXELS).log_prob(z)
    return float(images.bits_per_dimension(log_prob + log_det, PIXELS).mean())


def phases(flow, whitening, data, options) -> tuple[Phase, Phase]:
    def batch(key):
        index_key, noise_key = jax.random.split(key)
        x = jax.random.choice(index_key, data, (options.batch,))
        return whiten(whitening, noise_key, x)[0]

    def matching(params, key):
        batch_key, key = jax.random.split(key)
        return flow.matching_loss(params, batch(batch_key), key=key, coupling=COUPLING)

    def likelihood(params, key):
        batch_key, key = jax.random.split(key)
        return flow.nll(params, batch(batch_key), key=key)

    return (
        Phase("matching", matching, options.matching, 4e-3, every=500),
        Phase("likelihood", likelihood, options.steps, 4e-3, every=20),
    )


def draw(flow, params, whitening, data, history, scores, path, key):
    """Real digits, samples, paths from noise to digits, and the scores during training."""
    samples = to_images(whitening, flow.sample(params, key, 40))
    z = flow.base.sample(jax.random.fold_in(key, 1), (4,))
    times = jnp.linspace(flow.t0, flow.t1, 11)
    frames = jaxode.solve(flow.f, z, flow.t0, flow.t1, params, batch="joint", ts=times).ys
    frames = to_images(whitening, frames).swapaxes(0, 1)

    def tile(axis, digits, rows, title):
        grid = np.pad(np.asarray(digits).reshape(-1, 8, 8), ((0, 0), (0, 1), (0, 1)))
        grid = grid.reshape(rows, -1, 9, 9).swapaxes(1, 2).reshape(rows * 9, -1)
        axis.imshow(grid[:-1, :-1], cmap="gray", interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=title)

    figure, axes = plt.subplots(2, 2, figsize=(13, 7), constrained_layout=True)
    tile(axes[0, 0], data[:40], 4, "real digits")
    tile(axes[0, 1], samples, 4, "samples")
    tile(axes[1, 0], frames, 4, "from noise with the covariance of the data to digits")
    axes[1, 0].set_xticks(9 * np.arange(len(times)) + 3.5, [f"{t:.1f}" for t in times])
    axes[1, 0].set(xlabel="time $t$ of the flow")
    curve = axes[1, 1]
    draw_scores(history, curve, scores)
    curve.set(ylabel="bits per dimension", title="validation images during training")
    curve.legend(loc="center right")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a flow on handwritten digits.")
    parser.add_argument("--matching", type=int, default=4500, help="steps of matching")
    parser.add_argument("--steps", type=int, default=120, help="steps of likelihood after it")
    parser.add_argument("--batch", type=int, default=512, help="images in a training step")
    parser.add_argument("--width", type=int, default=256, help="size of the two hidden layers")
    parser.add_argument("--out", type=picture, default="out/digits.png", help="the picture")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.matching, options.steps, options.batch, options.width) < 1:
        parser.error("--matching, --steps, --batch and --width must be at least 1")

    announce(__doc__)
    start = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    pixels, _ = load_digits(return_X_y=True)
    pixels = jax.random.permutation(next(keys), jnp.asarray(pixels, jnp.float32))
    held_out, validation, data = jnp.split(pixels, [HELD_OUT, HELD_OUT + VALIDATION])
    whitening = fit_whitening(next(keys), data)
    # Here a loose tolerance trains as well as a tight one, in a fraction of the time.
    flow = jaxode.cnf(
        jaxode.nn.field,
        jaxode.standard_normal(PIXELS),
        divergence=hutchinson(),
        solver=diffrax.Bosh3(),
        rtol=1e-2,
        atol=1e-2,
    )
    widths = (options.width, options.width)
    params = jaxode.nn.ConcatSquash(PIXELS, widths, key=next(keys))
    print(f"{len(data)} digits to train on, {len(held_out)} held out", flush=True)
    bits, score_key = bits_per_dimension(flow, whitening), next(keys)
    params, history = train(
        *phases(flow, whitening, data, options), params,
        lambda params: bits(params, validation, score_key), next(keys), weight_decay=0.01,
    )  # fmt: skip
    if not history:
        return 1
    print(f"trained in {history[-1].seconds:.0f} s; evaluating")

    test_key, train_key = next(keys), next(keys)
    trained, tested = bits(params, data[:HELD_OUT], train_key), bits(params, held_out, test_key)
    gaussian = [
        gaussian_bits(whitening, x, key) for x, key in ((data, train_key), (held_out, test_key))
    ]
    print("bits per dimension            train   held out")
    print(f"full-covariance Gaussian   {gaussian[0]:8.3f}   {gaussian[1]:8.3f}")
    print(f"flow                       {trained:8.3f}   {tested:8.3f}")
    scores = {"flow, held out": tested, "Gaussian, held out": gaussian[1]}
    draw(flow, params, whitening, data, history, scores, options.out, next(keys))
    print(f"picture: {options.out}   total: {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run(main)
