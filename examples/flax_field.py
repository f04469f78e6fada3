"""A flow whose vector field is a Flax module: NNX, or Linen.

    python examples/flax_field.py
    python examples/flax_field.py --api linen

jaxode needs a function f(t, y, args) and a pytree of parameters. Both Flax interfaces provide them
in a few lines: see `nnx_field` and `linen_field`. Learns the density of two moons by maximum
likelihood, in a loop that could be one of Flax. `jaxode.fit` takes such a field, too, but so plain
a network learns less by matching. Half a minute on two cores.
"""

import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, parser, run
from common.pictures import save
from rich.progress import Progress
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


def train(flow, params: Any, data, options, rng):
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, options.steps))

    @jax.jit
    def step(params, state, x):
        (loss, aux), gradient = jax.value_and_grad(flow.nll_and_stats, has_aux=True)(params, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss, aux.stats.num_evals

    state, losses, evals = optimizer.init(params), [], []
    with Progress() as progress:
        task = progress.add_task("compiling", total=options.steps)
        for _ in range(options.steps):
            x = data[rng.integers(0, len(data), options.batch)]
            params, state, loss, num_evals = step(params, state, x)
            losses.append(float(loss))
            evals.append(int(num_evals))
            progress.update(task, advance=1, description=f"loss {np.mean(losses[-50:]):.3f} nats")
    return params, losses, evals


def draw(flow, params, data, losses, evals, path):
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    axes = grid.ravel()
    plot.samples(data[:3000], ax=axes[0])
    plot.density(partial(jax.jit(flow.log_prob), params), (-3.5, 3.5, -2.5, 2.5), ax=axes[1])
    plot.samples(flow.sample(params, jax.random.key(0), 3000), ax=axes[2], color="tab:orange")
    plot.history(losses, ax=axes[3], color="tab:blue")
    for axis, title in zip(axes, ("data", "density", "samples", "training"), strict=True):
        axis.set_title(title)
    for axis in axes[:3]:
        axis.set(xlim=(-3.5, 3.5), ylim=(-2.5, 2.5))
    axes[3].set_ylim(min(losses) - 0.1, np.quantile(losses, 0.97))  # the first losses are high
    axes[3].set_ylabel("negative log-density, nats", color="tab:blue")
    twin = plot.evaluations(evals, ax=axes[3].twinx(), color="tab:green")
    twin.set_ylabel(twin.get_ylabel(), color="tab:green")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=800, batch=256, width=64)
    known.add_argument("--api", choices=FIELDS, default="nnx", help="of Flax (default nnx)")
    options = known.parse_args(arguments)

    announce(__doc__)
    rng, begin = np.random.default_rng(options.seed), time.perf_counter()
    points, _ = make_moons(22_000, noise=0.08, random_state=options.seed)
    points = jnp.asarray(2 * (points - np.array([0.5, 0.25])), jnp.float32)
    held_out, data = jnp.split(points, [2000])
    field, params = FIELDS[options.api](options.width, options.seed)
    flow = jaxode.cnf(field, jaxode.standard_normal(2), rtol=1e-4, atol=1e-4)
    print(f"divergence: {flow.divergence.describe(field, data[0], params)}", flush=True)
    params, losses, evals = train(flow, params, data, options, rng)
    if not np.isfinite(losses[-1]):
        raise FloatingPointError("the loss is not finite")
    print(f"{options.steps} steps in {time.perf_counter() - begin:.0f} s")
    log_prob = float(jnp.mean(jax.jit(flow.log_prob)(params, held_out)))
    print(f"held-out log-density: {log_prob:.3f} nats ({len(held_out)} points)")
    draw(flow, params, data, losses, evals, options.out)
    return 0


if __name__ == "__main__":
    run(main)
