"""A flow whose vector field is a Flax module: NNX, or Linen.

    python examples/flax_field.py
    python examples/flax_field.py --api linen

jaxode needs a function f(t, y, args) and a pytree of parameters. Both Flax interfaces provide them
in a few lines: see `nnx_field` and `linen_field`. `jaxode.fit` then learns the density of two
moons. Half a minute on two cores.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common.arguments import announce, parser, run
from common.pictures import draw_scores, save
from sklearn.datasets import make_moons

try:
    from flax import linen, nnx
except ModuleNotFoundError:
    sys.exit("flax_field: Flax is not installed. Run: pip install flax")

import jaxode
from jaxode import plot


class NNXNetwork(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, t, y):
        x = jnp.concatenate([y, t[None]])
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


def nnx_field(width: int, seed: int):
    """The field holds the structure of the module. The parameters are the pytree."""
    structure, params = nnx.split(NNXNetwork(width, nnx.Rngs(seed)), nnx.Param)
    return lambda t, y, params: nnx.merge(structure, params)(t, y), params


class LinenNetwork(linen.Module):
    width: int

    @linen.compact
    def __call__(self, t, y):
        x = jnp.concatenate([y, t[None]])
        for _ in range(2):
            x = jnp.tanh(linen.Dense(self.width)(x))
        return linen.Dense(2)(x)


def linen_field(width: int, seed: int):
    module = LinenNetwork(width)
    params = module.init(jax.random.key(seed), jnp.zeros(()), jnp.zeros(2))
    return lambda t, y, params: module.apply(params, t, y), params


FIELDS = {"nnx": nnx_field, "linen": linen_field}


def draw(density, data, history, path):
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), constrained_layout=True)
    plot.samples(data[:3000], ax=axes[0])
    plot.density(jax.jit(density.log_prob), (-3.5, 3.5, -2.5, 2.5), ax=axes[1])
    plot.samples(density.sample(jax.random.key(0), (3000,)), ax=axes[2], color="tab:orange")
    draw_scores(axes[3], [p.seconds for p in history], [p.nats for p in history])
    for axis, title in zip(axes, ("data", "density", "samples"), strict=False):
        axis.set(title=title, xlim=(-3.5, 3.5), ylim=(-2.5, 2.5))
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, seconds=20, steps=None, batch=512, width=64)
    known.add_argument("--api", choices=FIELDS, default="nnx", help="of Flax (default nnx)")
    options = known.parse_args(arguments)

    announce(__doc__)
    points, _ = make_moons(22_000, noise=0.08, random_state=options.seed)
    points = jnp.asarray(2 * (points - np.array([0.5, 0.25])), jnp.float32)
    held_out, data = jnp.split(points, [2000])
    field, params = FIELDS[options.api](options.width, options.seed)
    flow = jaxode.cnf(field, jaxode.standard_normal(2), rtol=1e-4, atol=1e-4)
    print(f"divergence: {flow.divergence.describe(field, data[0], params)}", flush=True)
    density, history = jaxode.fit(
        jaxode.bind(flow, params, standardize=data), data, key=jax.random.key(options.seed),
        seconds=options.seconds, steps=options.steps, batch_size=options.batch,
    )  # fmt: skip
    print(f"trained in {history[-1].seconds:.0f} s")
    log_prob = density.log_prob(held_out)
    print(f"held-out log-density: {log_prob.mean():.3f} nats ({len(held_out)} points)")
    draw(density, data, history, options.out)
    return 0


if __name__ == "__main__":
    run(main)
