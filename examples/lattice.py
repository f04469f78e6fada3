"""Sample a field theory: phi^4 on a periodic square lattice, from its action alone.

    python examples/lattice.py --size 6
    python examples/lattice.py --size 12 --steps 1000

A flow with the symmetries of the lattice is trained by path gradients. Its samples are proposals of
a Metropolis test, which makes them exact; the magnetization stands against a chain of hybrid Monte
Carlo. Writes a picture of configurations, the magnetization, weights and training. About two
minutes on two cores.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save

import jaxode

MASS, COUPLING = -4.0, 6.975  # m^2 and lambda of Albergo et al. (2019), arXiv:1904.12072


def log_density(y):
    """Minus the action: `sum_x y (-laplacian) y + m^2 y^2 + lambda y^4`."""
    neighbors = sum(jnp.roll(y, shift, axis) for axis in (0, 1) for shift in (1, -1))
    return -jnp.sum(y * (4 * y - neighbors) + MASS * y**2 + COUPLING * y**4)


@partial(jax.jit, static_argnums=(1, 2, 3))
def hybrid_monte_carlo(key, size: int, walkers: int, sweeps: int):
    """The last configurations of independent walkers, `[walkers, size, size]`."""
    step, inside = 0.1, 10
    force = jax.vmap(jax.grad(log_density))
    energy = lambda y, p: 0.5 * jnp.sum(p**2, axis=(1, 2)) - jax.vmap(log_density)(y)

    def sweep(y, key):
        momentum_key, accept_key = jax.random.split(key)
        p = jax.random.normal(momentum_key, y.shape)

        def leap(i, state):
            y, p = state
            y = y + step * p
            return y, p + step * force(y)

        begin = y, p + 0.5 * step * force(y)
        end, q = jax.lax.fori_loop(0, inside, leap, begin)
        change = energy(y, p) - energy(end, q - 0.5 * step * force(end))
        accept = jnp.log(jax.random.uniform(accept_key, change.shape)) < change
        return jnp.where(accept[:, None, None], end, y), None

    first_key, key = jax.random.split(key)
    start = 0.3 * jax.random.normal(first_key, (walkers, size, size))
    return jax.lax.scan(sweep, start, jax.random.split(key, sweeps))[0]


@jax.jit
def metropolis(key, log_w):
    """Whether each of independent proposals, after the first, is accepted."""

    def test(current, proposal):
        log_w, u = proposal
        accept = jnp.log(u) < log_w - current
        return jnp.where(accept, log_w, current), accept

    u = jax.random.uniform(key, log_w.shape)
    return jax.lax.scan(test, log_w[0], (log_w[1:], u[1:]))[1]


class Mean(NamedTuple):
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f}"


def mean(x, log_w=None) -> Mean:
    """The mean with its standard error, with weights if there are any."""
    w = jnp.full(len(x), 1 / len(x)) if log_w is None else jax.nn.softmax(log_w)
    value = jnp.sum(w * x)
    return Mean(float(value), float(jnp.sqrt(jnp.sum((w * (x - value)) ** 2))))


def draw(y, log_w, chain, losses, path):
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), constrained_layout=True)
    tiles = np.pad(np.asarray(y[:16]), ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    size = tiles.shape[1]
    grid = tiles.reshape(4, 4, size, size).swapaxes(1, 2).reshape(4 * size, -1)
    limit = float(np.abs(np.asarray(y)).max())
    axes[0, 0].imshow(grid[:-1, :-1], cmap="RdBu", vmin=-limit, vmax=limit)
    axes[0, 0].set(title="16 configurations of the flow", xticks=[], yticks=[])
    bins, style = np.linspace(-1, 1, 41), {"density": True, "histtype": "step", "lw": 1.5}
    axes[0, 1].hist(chain.mean((1, 2)), bins, label="chain", color="black", **style)
    magnetization = np.asarray(y.mean((1, 2)))
    axes[0, 1].hist(magnetization, bins, label="flow", color="tab:orange", **style)
    weights = np.asarray(jax.nn.softmax(log_w))
    axes[0, 1].hist(
        magnetization, bins, weights=weights, label="flow, weighted", color="tab:blue", **style
    )
    axes[0, 1].set(title="magnetization", xlabel="mean of the field")
    axes[0, 1].legend()
    log_w = np.asarray(log_w - jax.nn.logsumexp(log_w) + np.log(len(log_w)))
    axes[1, 0].hist(log_w, 60, color="tab:blue")
    axes[1, 0].set(title="weights", xlabel="log of the weight", yscale="log")
    axes[1, 1].plot(losses, lw=0.8)
    low = np.min(losses)
    axes[1, 1].set(ylim=(low - 0.5, low + 8), xlabel="step", title="loss: divergence - log Z")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=500, batch=64, rate=5e-3)
    known.add_argument("--size", type=count, default=6, help="sites along each axis (default 6)")
    known.add_argument("--samples", type=count, default=8192, help="to judge (default 8192)")
    options = known.parse_args(arguments)
    if options.samples < 16:
        known.error("--samples must be at least 16, which the picture shows")
    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 5))
    shape = options.size, options.size
    network = jaxode.nn.Lattice(shape, key=next(keys))
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(shape), rtol=1e-4, atol=1e-4)

    def loss(m, step, key):
        return flow.reverse_kl_loss(m, log_density, options.batch, key=key)

    # An energy is steep where a fresh flow puts samples: begin slowly.
    warm = max(options.steps // 8, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, options.rate, warm, options.steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    m, losses = minimize(loss, network, optimizer, options.steps, next(keys), "path gradients")

    y, log_q = jax.jit(flow.sample_and_log_prob, static_argnums=2)(m, next(keys), options.samples)
    log_w = jax.vmap(log_density)(y) - log_q
    print(jaxode.importance(log_w))
    print(f"acceptance of the Metropolis test: {metropolis(next(keys), log_w).mean():.1%}")
    chain = hybrid_monte_carlo(next(keys), options.size, options.samples // 2, 200)
    for name, of in (("|m|", jnp.abs), ("V m^2", lambda m: m**2 * options.size**2)):
        m_flow, m_chain = (of(each.mean((1, 2))) for each in (y, chain))
        print(f"{name}: flow, weighted {mean(m_flow, log_w)}   chain {mean(m_chain)}")
    draw(y, log_w, np.asarray(chain), losses, options.out)
    return 0


if __name__ == "__main__":
    run(main)
