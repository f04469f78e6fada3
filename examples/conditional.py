"""A flow that knows the class: handwritten digits drawn by label, and classified by Bayes' rule.

    python examples/conditional.py

The label enters the vector field as a context. The picture shows real digits, and samples in which
each column starts from the same noise. One flow has ten densities, so it is also a classifier: this
prints its accuracy on held-out digits and their bits per dimension. A minute on two cores.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common.arguments import announce, parser, run
from common.pictures import draw_scores, save, tile
from digits import HELD_OUT, LEVELS, MARGIN, PIXELS, VALIDATION, bits
from sklearn.datasets import load_digits

import jaxode

CLASSES = 10


def log_probs(density, x):
    """Log-density of each image under each label in nats, `[batch, classes]`."""
    of_label = lambda label: density.log_prob(x, context=label)
    return jax.lax.map(of_label, jnp.eye(CLASSES)).T


def draw(density, data, labels, history, path, key):
    """Real digits, samples by class with the same noise in each column, scores during training."""
    per_class = 9
    real = jnp.concatenate([data[labels == label][:per_class] for label in range(CLASSES)])
    z = jnp.tile(density.flow.base.sample(key, (per_class,)), (CLASSES, 1))
    context = jnp.repeat(jnp.eye(CLASSES), per_class, axis=0)
    samples = density.from_flow(density.flow.from_base(density.params, z, context=context))

    figure = plt.figure(figsize=(15, 5.6), constrained_layout=True)
    axes = figure.subplot_mosaic([["real", "samples", "scores"]])
    tile(axes["real"], real, CLASSES, "real digits")
    tile(axes["samples"], samples, CLASSES, "samples, each column from the same noise")
    for name in ("real", "samples"):
        axes[name].set_yticks(np.arange(CLASSES) * 9 + 3.5, list("0123456789"))
        axes[name].set(ylabel="class")
    draw_scores(axes["scores"], [(p.step, bits(-p.nats)) for p in history])
    axes["scores"].set(ylabel="bits per dimension")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = parser(__file__, __doc__, steps=2500, batch=256, width=128)
    options = options.parse_args(arguments)
    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 8))
    pixels, classes = load_digits(return_X_y=True)
    order = jax.random.permutation(next(keys), len(pixels))
    cuts = [HELD_OUT, HELD_OUT + VALIDATION]
    held_out, validation, data = jnp.split(jnp.asarray(pixels, float)[order], cuts)
    held_out_labels, validation_labels, labels = jnp.split(jnp.asarray(classes)[order], cuts)
    context = lambda labels: jax.nn.one_hot(labels, CLASSES)
    noisy = lambda x: x + jax.random.uniform(next(keys), x.shape)
    density = jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(PIXELS), rtol=1e-4, atol=1e-4),
        jaxode.nn.Residual(PIXELS, options.width, key=next(keys), context_size=CLASSES),
        support=(-MARGIN, LEVELS + MARGIN),
        standardize=jaxode.standardize.affine(noisy(data)),
        context_shape=(CLASSES,),
    )
    density, history = jaxode.fit(
        density, data, context=context(labels), key=next(keys), steps=options.steps,
        batch_size=options.batch, dequantize=True,
        validation=(validation, context(validation_labels)),
    )  # fmt: skip
    print(f"trained in {history[-1].seconds:.0f} s; evaluating")
    scores = jax.jit(log_probs)(density, noisy(held_out))
    own = jnp.take_along_axis(scores, held_out_labels[:, None], axis=1)
    any_label = jax.nn.logsumexp(scores, axis=1) - jnp.log(CLASSES)
    print(f"held-out bits per dimension, the label is known   {bits(own):.3f}")
    print(f"held-out bits per dimension, any label may be     {bits(any_label):.3f}")
    right = float(jnp.mean(jnp.argmax(scores, axis=1) == held_out_labels))
    print(f"held-out accuracy by Bayes' rule                  {right:.1%}")
    draw(density, data, labels, history, options.out, next(keys))
    return 0


if __name__ == "__main__":
    run(main)
