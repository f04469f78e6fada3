"""Train a continuous normalizing flow on scikit-learn's handwritten digits.

    python examples/digits.py

1797 real images of 8x8 pixels with 17 grey levels. Prints train and held-out bits per dimension
beside a Gaussian with full covariance, and writes one picture. About a minute on two cores; Ctrl-C
ends it early with what it has.
"""

import argparse
import math
import sys
import time
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import picture, seed
from jaxtyping import Array, Float, PRNGKeyArray
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

import jaxode
from jaxode import images, plot
from jaxode.divergence import exact, hutchinson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS, PIXELS, HELD_OUT = 17, 64, 297
MARGIN = 0.05  # keeps the logit finite at black and white


class Whitening(NamedTuple):
    """`y = L z + mean`, with `L` the Cholesky factor of the covariance of the training split."""

    mean: Float[Array, " pixels"]
    factor: Float[Array, "pixels pixels"]


def to_logit(key: PRNGKeyArray, x: Float[Array, "batch pixels"]):
    """Dequantized images on the real line, and the log-determinant `[batch]` of the map."""
    u, levels_log_det = images.dequantize(key, x, LEVELS)
    y, log_det = images.logit(u, MARGIN)
    return y, levels_log_det + log_det


def whiten(whitening: Whitening, key: PRNGKeyArray, x: Float[Array, "batch pixels"]):
    """Images as the flow sees them, and the log-determinant `[batch]` of the whole map."""
    y, log_det = to_logit(key, x)
    z = jax.scipy.linalg.solve_triangular(whitening.factor, (y - whitening.mean).T, lower=True).T
    return z, log_det - jnp.sum(jnp.log(jnp.diag(whitening.factor)))


def to_images(whitening: Whitening, z: Float[Array, "... pixels"]) -> Float[Array, "... pixels"]:
    """Back to grey levels from 0 to 16."""
    u = images.inverse_logit(z @ whitening.factor.T + whitening.mean, MARGIN)
    return images.quantize(u, LEVELS)


def fit_whitening(key: PRNGKeyArray, x: Float[Array, "batch pixels"]) -> Whitening:
    """Mean and covariance of the logits, over several dequantizations of the training split."""
    y = jax.vmap(lambda key: to_logit(key, x)[0])(jax.random.split(key, 16)).reshape(-1, PIXELS)
    # Pixels that are always black would make the covariance nearly singular.
    covariance = jnp.cov(y.T) + 1e-4 * jnp.eye(PIXELS)
    return Whitening(y.mean(0), jnp.linalg.cholesky(covariance))


def evaluate(flow, params, whitening, x, key) -> tuple[float, float]:
    """Bits per dimension of the flow, and of the Gaussian with the training split's covariance.

    With the exact trace and a tight tolerance, whatever the training used.
    """
    tight = jaxode.cnf(flow.f, flow.base, divergence=exact(), rtol=1e-6, atol=1e-6)
    log_prob = jax.jit(tight.log_prob)
    z, log_det = whiten(whitening, key, x)
    parts = [log_prob(params, part) for part in jnp.array_split(z, -(-len(z) // 300))]
    # On whitened images the base density is that Gaussian.
    scores = (jnp.concatenate(parts), flow.base.log_prob(z))
    learned, gaussian = (images.bits_per_dimension(s + log_det, PIXELS).mean() for s in scores)
    return float(learned), float(gaussian)


def train(flow, params, whitening, data, options, key):
    """Maximum likelihood with Adam; Ctrl-C ends it early. Returns parameters and losses."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 4e-3, min(50, options.steps // 2), options.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adamw(schedule, weight_decay=0.01)
    )

    @jax.jit
    def step(params, state, key):
        index_key, noise_key, probe_key = jax.random.split(key, 3)
        x = jax.random.choice(index_key, data, (options.batch,))
        z, log_det = whiten(whitening, noise_key, x)
        loss = lambda params: flow.nll_and_stats(params, z, key=probe_key)
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        bits = images.bits_per_dimension(aux.log_prob + log_det, PIXELS).mean()
        return optax.apply_updates(params, updates), state, bits, aux

    state, losses, start = optimizer.init(params), [], time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=options.steps)
        try:
            for step_key in jax.random.split(key, options.steps):
                new_params, state, bits, aux = step(params, state, step_key)
                if not math.isfinite(bits):
                    print(
                        f"Stopped: the loss is {bits}; solve: {jaxode.Result(int(aux.result)).name}"
                    )
                    break
                params = new_params
                losses.append(float(bits))
                if len(losses) == 1:
                    first = time.perf_counter() - start
                    print(f"first step, compilation included: {first:.1f} s", flush=True)
                evals = int(aux.stats.num_evals)
                text = f"{np.mean(losses[-50:]):.3f} bits/dim, {evals} evaluations"
                progress.update(task, advance=1, description=text)
        except KeyboardInterrupt:
            if not losses:
                raise
            print(f"Stopped after {len(losses)} steps; going on with what there is.")
    return params, losses


def draw(flow, params, whitening, data, losses, scores, path, key):
    """Real digits, samples, the way from noise to a digit, and the training curve."""
    samples = to_images(whitening, flow.sample(params, key, 40))
    z = flow.base.sample(jax.random.fold_in(key, 1), (4,))
    times = jnp.linspace(flow.t0, flow.t1, 12)
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
    tile(axes[1, 0], frames, 4, "from noise (left) to a digit (right)")
    curve = axes[1, 1]
    plot.history(losses, ax=curve, label="training (mean of 50 batches, one probe)")
    for (label, value), color in zip(scores.items(), ("tab:red", "tab:green"), strict=True):
        curve.axhline(value, color=color, lw=1, ls="--", label=f"{label}: {value:.3f}")
    curve.set(ylabel="bits per dimension", title="training")
    curve.set_ylim(min(losses) - 0.05, np.quantile(losses, 0.99) + 0.1)
    curve.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a flow on handwritten digits.")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=256, help="images in a training step")
    parser.add_argument("--width", type=int, default=128, help="size of the two hidden layers")
    parser.add_argument("--out", type=picture, default="out/digits.png", help="the picture")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.steps, options.batch, options.width) < 1:
        parser.error("--steps, --batch and --width must be at least 1")

    start = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    pixels, _ = load_digits(return_X_y=True)
    pixels = jax.random.permutation(next(keys), jnp.asarray(pixels, jnp.float32))
    held_out, data = jnp.split(pixels, [HELD_OUT])
    whitening = fit_whitening(next(keys), data)
    # A loose tolerance trains as well as a tight one here, in a fraction of the time.
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
    params, losses = train(flow, params, whitening, data, options, next(keys))
    if not losses:
        return 1
    print(f"{len(losses)} steps, {time.perf_counter() - start:.0f} s so far; evaluating")

    train_key, test_key = next(keys), next(keys)
    trained, trained_gaussian = evaluate(flow, params, whitening, data, train_key)
    tested, tested_gaussian = evaluate(flow, params, whitening, held_out, test_key)
    print("bits per dimension            train   held out")
    print(f"full-covariance Gaussian   {trained_gaussian:8.3f}   {tested_gaussian:8.3f}")
    print(f"flow                       {trained:8.3f}   {tested:8.3f}")
    scores = {"Gaussian, held out": tested_gaussian, "flow, held out": tested}
    draw(flow, params, whitening, data, losses, scores, options.out, next(keys))
    print(f"picture: {options.out}   total: {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped.")
        sys.exit(130)
