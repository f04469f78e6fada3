"""Sample four particles in the plane, whose pairs are double wells (DW4).

    python examples/particles.py

A field with the symmetries of particles first learns by matching, from samples of a Markov chain,
and then from the energy alone, by path gradients. Its weights say how well. Writes a picture of
pair distances, energies, configurations and training. About four minutes on two cores.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common.arguments import announce, count, parser, run
from common.descent import minimize
from common.pictures import save

import jaxode

N, DIM = 4, 2
PAIRS = np.array(list(itertools.combinations(range(N), 2)))
ORDERS = np.array(list(itertools.permutations(range(N))))
BASE = jaxode.centered_normal(N, DIM)


def distances(x):
    difference = x[..., PAIRS[:, 0], :] - x[..., PAIRS[:, 1], :]
    return jnp.sqrt(jnp.sum(difference**2, axis=-1))


def log_density(x):
    """Minus the energy at temperature one, as in Köhler et al. (2020), arXiv:2006.02425."""
    r = distances(x) - 4
    return -jnp.sum(0.9 * r**4 - 4 * r**2)


@partial(jax.jit, static_argnums=(1, 2))
def markov_chain(key, walkers: int, sweeps: int):
    """The last configurations of independent walkers of Metropolis, `[walkers, 4, 2]`."""

    def sweep(state, key):
        x, log_p = state
        which_key, move_key, accept_key = jax.random.split(key, 3)
        # One particle, and all so that the mean stays zero.
        which = jax.nn.one_hot(jax.random.randint(which_key, (walkers,), 0, N), N) - 1 / N
        moved = x + which[:, :, None] * jax.random.normal(move_key, (walkers, 1, DIM))
        log_moved = jax.vmap(log_density)(moved)
        accept = jnp.log(jax.random.uniform(accept_key, (walkers,))) < log_moved - log_p
        x = jnp.where(accept[:, None, None], moved, x)
        return (x, jnp.where(accept, log_moved, log_p)), None

    first_key, key = jax.random.split(key)
    x = 2 * BASE.sample(first_key, (walkers,))
    state = x, jax.vmap(log_density)(x)
    return jax.lax.scan(sweep, state, jax.random.split(key, sweeps))[0][0]


def aligned(z, x):
    """The order, rotation and reflection of `z` that is nearest to `x`: straighter paths."""
    z = z[ORDERS]
    (a, b), (c, d) = jnp.einsum("oni,nj->ijo", z, x)
    det = a * d - b * c
    best = jnp.argmax(a**2 + b**2 + c**2 + d**2 + 2 * jnp.abs(det))
    a, b, c, d, det = (each[best] for each in (a, b, c, d, det))
    # The orthogonal factor of a matrix of two rows: the matrix and its cofactors, up to a scale.
    sign = jnp.where(det < 0, -1.0, 1.0)
    p, q = a + sign * d, b - sign * c
    rotation = jnp.array([[p, q], [-sign * q, sign * p]]) / jnp.sqrt(p**2 + q**2)
    return z[best] @ rotation


def draw(x, log_w, chain, losses, path):
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    style = {"density": True, "histtype": "step", "lw": 1.5}
    w = np.asarray(jax.nn.softmax(log_w))
    both = (
        ("distance of a pair", np.linspace(1, 8, 71), distances),
        ("energy", np.linspace(-26, -5, 71), lambda x: -jax.vmap(log_density)(x)[:, None]),
    )
    for axis, (name, bins, of) in zip(axes[0], both, strict=True):
        flow = np.asarray(of(x))
        axis.hist(np.ravel(of(chain)), bins, label="chain", color="black", **style)
        axis.hist(flow.ravel(), bins, label="flow", color="tab:orange", **style)
        weights = np.repeat(w, flow.shape[1])
        weighted = {"weights": weights, "label": "flow, weighted", "color": "tab:blue"}
        axis.hist(flow.ravel(), bins, **weighted, **style)
        axis.set(xlabel=name)
    axes[0, 0].legend()
    for i, one in enumerate(np.asarray(x[:12])):
        shift = np.array([9 * (i % 4), -9 * (i // 4)])
        axes[1, 0].plot(*(one + shift).T, "o", ms=5)
    axes[1, 0].set(title="12 configurations of the flow", aspect="equal", xticks=[], yticks=[])
    axes[1, 1].plot(losses, lw=0.6)
    low = np.min(losses)
    title = "loss of the energy: divergence - log Z"
    axes[1, 1].set(ylim=(low - 0.2, low + 4), xlabel="step", title=title)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    known = parser(__file__, __doc__, steps=600, batch=256, width=64, rate=2e-3)
    known.add_argument(
        "--matching", type=count, default=6000, help="steps of matching (default 6000)"
    )
    samples = "of the chain, to train on, and of the flow, to judge (default 10000)"
    known.add_argument("--samples", type=count, default=10_000, help=samples)
    options = known.parse_args(arguments)
    if options.samples < 2:
        known.error("--samples must be at least 2")
    announce(__doc__)
    keys = iter(jax.random.split(jax.random.key(options.seed), 5))
    chain = markov_chain(next(keys), options.samples, 3000)
    m = jaxode.nn.Particles(N, DIM, width=options.width, key=next(keys))
    # Path gradients do not fit the error of a loose tolerance; weights need a tight one.
    flow = jaxode.cnf(jaxode.nn.field, BASE, rtol=1e-3, atol=1e-3)
    tight = jaxode.cnf(jaxode.nn.field, BASE, rtol=1e-5, atol=1e-5)

    def matching(m, step, key):
        row_key, base_key, key = jax.random.split(key, 3)
        x = jax.random.choice(row_key, chain, (options.batch,))
        z = BASE.sample(base_key, (options.batch,))
        return flow.matching_loss(m, x, key=key, x0=jax.vmap(aligned)(z, x))

    def energy(m, step, key):
        return flow.reverse_kl_loss(m, log_density, options.batch, key=key)

    sampled = jax.jit(tight.sample_and_log_prob, static_argnums=2)

    def judge(m, key, samples):
        x, log_q = sampled(m, key, samples)
        log_w = jax.vmap(log_density)(x) - log_q
        print(jaxode.importance(log_w))
        return x, log_w

    def adam(rate, steps):
        rate = optax.cosine_decay_schedule(rate, steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    steps, judge_key = options.matching, next(keys)
    m, _ = minimize(matching, m, adam(5e-3, steps), steps, next(keys), "matching")
    judge(m, judge_key, min(options.samples, 2000))
    steps = options.steps
    m, losses = minimize(energy, m, adam(options.rate, steps), steps, next(keys), "energy")
    x, log_w = judge(m, judge_key, options.samples)
    value = lambda x: -jax.vmap(log_density)(x)
    weighted = jnp.sum(jax.nn.softmax(log_w) * value(x))
    print(f"mean energy: flow {value(x).mean():.3f}, weighted {weighted:.3f}, "
          f"chain {value(chain).mean():.3f}")  # fmt: skip
    draw(x, log_w, chain, losses, options.out)
    return 0


if __name__ == "__main__":
    run(main)
