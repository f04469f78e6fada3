"""Flows of other JAX libraries that train on an energy, by the reverse divergence of each.

Settings are those of their own examples: `CNF_vs_OTFlow` of jflows, and of bijx the tutorial on
scalar theory, with the optimizer of the notebook of continuous-flow-lft, which it came from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

CHUNK = 1000  # samples at a time, to bound the memory of exact traces


class Contender(NamedTuple):
    start: Any
    """The parameters."""
    loss: Callable[[Any, jax.Array], jax.Array]
    """Of the parameters and a key."""
    draw: Callable[[Any, jax.Array, int], tuple[jax.Array, jax.Array]]
    """So many samples, and their log-densities."""
    optimizer: optax.GradientTransformation


def _in_chunks(draw, params, key, n: int):
    chunk = min(n, CHUNK)
    keys = jax.random.split(key, n // chunk)
    x, log_q = jax.lax.map(lambda key: draw(params, key, chunk), keys)
    return x.reshape(-1, *x.shape[2:]), log_q.reshape(-1)


def by_jflows(kind: str, log_density, dim: int, batch: int, width: int, optimizer) -> Contender:
    """`kind` is "CNF" or "OTFlow": networks of the same width, 12 steps of RK4."""
    import equinox as eqx
    from jflows.flow import CNF, OTFlow
    from jflows.loss import reverse_KL_F

    key, steps = jax.random.key(0), 12
    if kind == "CNF":
        hidden = (width, width)
        flow = CNF(key, dimension=dim, frequency=4, nt=steps, hidden_features=hidden).zeros()
    else:
        flow = OTFlow(
            key, dimension=dim, hidden=width, layer=3, rank=min(10, dim + 1), nt=steps
        ).near_identity()
    start, static = eqx.partition(flow, eqx.is_inexact_array)
    target = lambda x: -jax.vmap(log_density)(x)

    def loss(params, key):
        z = jax.random.normal(key, (batch, dim))
        return jnp.mean(reverse_KL_F(z, target, eqx.combine(params, static)))

    def draw(params, key, n):
        z = jax.random.normal(key, (n, dim))
        x, log_det = eqx.combine(params, static).call_and_ladj(z)
        return x, jax.scipy.stats.norm.logpdf(z).sum(axis=1) - log_det

    return Contender(start, loss, jax.jit(partial(_in_chunks, draw), static_argnums=2), optimizer)


def by_bijx(log_density, shape: tuple[int, ...], batch: int) -> Contender:
    """`ConvVF`, whose divergence is in closed form, by ten steps of Tsit5."""
    import bijx
    from flax import nnx

    rngs = nnx.Rngs(params=0, sample=0)
    flow = bijx.ContFlowDiffrax(
        bijx.ConvVF.build(shape, (), rngs=rngs), config=bijx.DiffraxConfig(dt=1 / 10)
    )
    model = bijx.Transformed(bijx.IndependentNormal(shape, rngs=rngs), flow)
    graph, start, rest = nnx.split(model, nnx.Param, ...)

    def draw(params, key, n):
        return nnx.merge(graph, params, rest).sample((n,), rng=key)

    def loss(params, key):
        x, log_q = draw(params, key, batch)
        return jnp.mean(log_q - jax.vmap(log_density)(x))

    rate = optax.exponential_decay(5e-3, 8000, 0.1)
    return Contender(start, loss, jax.jit(draw, static_argnums=2), optax.adam(rate, 0.8, 0.9))
