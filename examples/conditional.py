"""A flow that knows the class: handwritten digits drawn by label, and classified by Bayes' rule.

    python examples/conditional.py

The label enters the vector field as a context. The picture shows real digits, and samples in which
each column has the same noise. One flow then has ten densities, so it is a classifier, too: prints
its accuracy on held-out digits beside their bits per dimension. About a minute on two cores.
"""

import argparse
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from arguments import picture, seed
from digits import HELD_OUT, PIXELS, fit_whitening, to_images, whiten
from rich.progress import Progress
from sklearn.datasets import load_digits

import jaxode
from jaxode import images, plot

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10


def train(flow, params, whitening, data, labels, options, key):
    """Maximum likelihood of the images given their labels. Returns parameters and losses."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 4e-3, min(50, options.steps // 2), options.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adamw(schedule, weight_decay=0.1)
    )

    @jax.jit
    def step(params, state, key):
        index_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(index_key, len(data), (options.batch,))
        z, log_det = whiten(whitening, noise_key, data[rows])
        context = jax.nn.one_hot(labels[rows], CLASSES)
        (_, aux), gradient = jax.value_and_grad(flow.nll_and_stats, has_aux=True)(
            params, z, context=context
        )
        updates, state = optimizer.update(gradient, state, params)
        bits = images.bits_per_dimension(aux.log_prob + log_det, PIXELS).mean()
        return optax.apply_updates(params, updates), state, bits, aux

    state, losses, evals = optimizer.init(params), [], []
    with Progress() as progress:
        task = progress.add_task("compiling", total=options.steps)
        for step_key in jax.random.split(key, options.steps):
            params, state, bits, aux = step(params, state, step_key)
            losses.append(float(bits))
            evals.append(int(aux.stats.num_evals))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is not finite in step {len(losses)}")
            text = f"{np.mean(losses[-50:]):.3f} bits/dim, {evals[-1]} evaluations"
            progress.update(task, advance=1, description=text)
    return params, losses, evals


def scores(flow, params, whitening, x, key):
    """Log-density of each image under each label, in nats: `[batch, classes]`."""
    tight = jaxode.cnf(flow.f, flow.base, rtol=1e-4, atol=1e-4)
    log_prob = jax.jit(tight.log_prob)
    z, log_det = whiten(whitening, key, x)
    of_label = lambda label: log_prob(params, z, context=jnp.tile(label, (len(z), 1)))
    return jnp.stack([of_label(label) for label in jnp.eye(CLASSES)], axis=1) + log_det[:, None]


def draw(flow, params, whitening, data, labels, losses, evals, path, key):
    """Real digits, samples by class with the same noise in each column, training and work."""
    per_class = 9
    real = jnp.concatenate([data[labels == label][:per_class] for label in range(CLASSES)])
    z = jnp.tile(flow.base.sample(key, (per_class,)), (CLASSES, 1))
    context = jnp.repeat(jnp.eye(CLASSES), per_class, axis=0)
    samples = to_images(whitening, flow.from_base(params, z, context=context))

    figure = plt.figure(figsize=(15, 5.6), constrained_layout=True)
    axes = figure.subplot_mosaic([["real", "samples", "loss"], ["real", "samples", "work"]])
    for name, title, digits in (
        ("real", "real digits", real),
        ("samples", "samples: a class for each row, the same noise in a column", samples),
    ):
        grid = np.pad(np.asarray(digits).reshape(-1, 8, 8), ((0, 0), (0, 1), (0, 1)))
        grid = grid.reshape(CLASSES, per_class, 9, 9).swapaxes(1, 2).reshape(CLASSES * 9, -1)
        axes[name].imshow(grid[:-1, :-1], cmap="gray", interpolation="nearest")
        axes[name].set(xticks=[], title=title)
        axes[name].set_yticks(np.arange(CLASSES) * 9 + 3.5, list("0123456789"))
    plot.history(losses, ax=axes["loss"])
    axes["loss"].set(ylabel="bits per dimension", title="training")
    axes["loss"].set_ylim(min(losses) - 0.05, np.quantile(losses, 0.99) + 0.1)
    plot.evaluations(evals, ax=axes["work"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=256, help="images in a training step")
    parser.add_argument("--width", type=int, default=128, help="size of the two hidden layers")
    parser.add_argument("--out", type=picture, default="out/conditional.png")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.steps, options.batch, options.width) < 1:
        parser.error("--steps, --batch and --width must be at least 1")

    begin = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(options.seed), 6))
    pixels, labels = map(jnp.asarray, load_digits(return_X_y=True))
    order = jax.random.permutation(next(keys), len(pixels))
    held_out, data = jnp.split(pixels[order].astype(jnp.float32), [HELD_OUT])
    held_out_labels, labels = jnp.split(labels[order], [HELD_OUT])
    whitening = fit_whitening(next(keys), data)
    flow = jaxode.cnf(
        jaxode.nn.field,
        jaxode.standard_normal(PIXELS),
        solver=diffrax.Bosh3(),
        rtol=1e-2,
        atol=1e-2,
    )
    params = jaxode.nn.ConcatSquash(
        PIXELS, (options.width,) * 2, key=next(keys), context_size=CLASSES
    )
    try:
        params, losses, evals = train(flow, params, whitening, data, labels, options, next(keys))
    except FloatingPointError as error:
        print(f"conditional: {error}", file=sys.stderr)
        return 1
    print(f"{len(losses)} steps, {time.perf_counter() - begin:.0f} s so far; evaluating")
    log_probs = scores(flow, params, whitening, held_out, next(keys))
    own = jnp.take_along_axis(log_probs, held_out_labels[:, None], axis=1)[:, 0]
    any_label = jax.nn.logsumexp(log_probs, axis=1) - jnp.log(CLASSES)
    for text, log_prob in (("the label is known", own), ("any label may be", any_label)):
        bits = float(images.bits_per_dimension(log_prob, PIXELS).mean())
        print(f"held-out bits per dimension, {text:20} {bits:.3f}")
    right = float(jnp.mean(jnp.argmax(log_probs, axis=1) == held_out_labels))
    print(f"held-out accuracy by Bayes' rule              {right:.1%}")
    draw(flow, params, whitening, data, labels, losses, evals, options.out, next(keys))
    print(f"picture: {options.out}   total: {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped.")
        sys.exit(130)
