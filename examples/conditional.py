"""A flow that knows the class: handwritten digits drawn by label, and classified by Bayes' rule.

    python examples/conditional.py

The label enters the vector field as a context. The picture shows real digits, and samples in which
each column starts from the same noise. One flow has ten densities, so it is also a classifier: this
prints its accuracy on held-out digits and their bits per dimension. Half a minute on two cores.
"""

import argparse
import time

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from arguments import announce, picture, run, seed
from digits import HELD_OUT, PIXELS, VALIDATION, fit_whitening, to_images, whiten
from recipe import Phase, draw_scores, train
from sklearn.datasets import load_digits

import jaxode
from jaxode import images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10


def phases(flow, whitening, data, labels, options) -> tuple[Phase, Phase]:
    def batch(key):
        index_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(index_key, len(data), (options.batch,))
        z, _ = whiten(whitening, noise_key, data[rows])
        return z, jax.nn.one_hot(labels[rows], CLASSES)

    def matching(params, key):
        batch_key, key = jax.random.split(key)
        z, context = batch(batch_key)
        return flow.matching_loss(params, z, key=key, context=context)

    def likelihood(params, key):
        z, context = batch(key)
        return flow.nll(params, z, context=context)

    return (
        Phase("matching", matching, options.matching, 2e-3, every=250),
        Phase("likelihood", likelihood, options.steps, 1e-3, every=25),
    )


def scores(flow, params, whitening, x, key):
    """Log-density of each image under each label in nats, `[batch, classes]`."""
    z, log_det = whiten(whitening, key, x)
    of_label = lambda label: flow.log_prob(params, z, context=jnp.tile(label, (len(z), 1)))
    log_probs = jax.lax.map(of_label, jnp.eye(CLASSES))
    return log_probs.T + log_det[:, None]


def draw(flow, params, whitening, data, labels, history, path, key):
    """Real digits, samples by class with the same noise in each column, scores during training."""
    per_class = 9
    real = jnp.concatenate([data[labels == label][:per_class] for label in range(CLASSES)])
    z = jnp.tile(flow.base.sample(key, (per_class,)), (CLASSES, 1))
    context = jnp.repeat(jnp.eye(CLASSES), per_class, axis=0)
    samples = to_images(whitening, flow.from_base(params, z, context=context))

    figure = plt.figure(figsize=(15, 5.6), constrained_layout=True)
    axes = figure.subplot_mosaic([["real", "samples", "scores"]])
    for name, title, digits in (
        ("real", "real digits", real),
        ("samples", "samples, each column from the same noise", samples),
    ):
        grid = np.pad(np.asarray(digits).reshape(-1, 8, 8), ((0, 0), (0, 1), (0, 1)))
        grid = grid.reshape(CLASSES, per_class, 9, 9).swapaxes(1, 2).reshape(CLASSES * 9, -1)
        axes[name].imshow(grid[:-1, :-1], cmap="gray", interpolation="nearest")
        axes[name].set(xticks=[], title=title, ylabel="class")
        axes[name].set_yticks(np.arange(CLASSES) * 9 + 3.5, list("0123456789"))
    draw_scores(history, axes["scores"])
    axes["scores"].set(ylabel="bits per dimension", title="validation images during training")
    axes["scores"].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--matching", type=int, default=4000, help="steps of matching")
    parser.add_argument("--steps", type=int, default=200, help="steps of likelihood after it")
    parser.add_argument("--batch", type=int, default=256, help="images in a training step")
    parser.add_argument("--width", type=int, default=128, help="size of the two hidden layers")
    parser.add_argument("--out", type=picture, default="out/conditional.png")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    if min(options.matching, options.steps, options.batch, options.width) < 1:
        parser.error("--matching, --steps, --batch and --width must be at least 1")

    announce(__doc__)
    begin = time.perf_counter()
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    pixels, labels = map(jnp.asarray, load_digits(return_X_y=True))
    order = jax.random.permutation(next(keys), len(pixels))
    cuts = [HELD_OUT, HELD_OUT + VALIDATION]
    held_out, validation, data = jnp.split(pixels[order].astype(jnp.float32), cuts)
    held_out_labels, validation_labels, labels = jnp.split(labels[order], cuts)
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
    tight = jaxode.cnf(flow.f, flow.base, rtol=1e-4, atol=1e-4)
    z, log_det = whiten(whitening, next(keys), validation)
    context = jax.nn.one_hot(validation_labels, CLASSES)

    @jax.jit
    def score(params):
        log_prob = tight.log_prob(params, z, context=context) + log_det
        return images.bits_per_dimension(log_prob, PIXELS).mean()

    params, history = train(
        *phases(flow, whitening, data, labels, options), params,
        lambda params: float(score(params)), next(keys), weight_decay=0.1,
    )  # fmt: skip
    if not history:
        return 1
    print(f"trained in {history[-1].seconds:.0f} s; evaluating")
    log_probs = scores(tight, params, whitening, held_out, next(keys))
    own = jnp.take_along_axis(log_probs, held_out_labels[:, None], axis=1)[:, 0]
    any_label = jax.nn.logsumexp(log_probs, axis=1) - jnp.log(CLASSES)
    for text, log_prob in (("the label is known", own), ("any label may be", any_label)):
        bits = float(images.bits_per_dimension(log_prob, PIXELS).mean())
        print(f"held-out bits per dimension, {text:20} {bits:.3f}")
    right = float(jnp.mean(jnp.argmax(log_probs, axis=1) == held_out_labels))
    print(f"held-out accuracy by Bayes' rule              {right:.1%}")
    draw(flow, params, whitening, data, labels, history, options.out, next(keys))
    print(f"picture: {options.out}   total: {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    run(main)
