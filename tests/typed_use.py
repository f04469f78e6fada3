"""Ordinary use, for type checkers only: pyright and mypy must find no error. Never run."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxode


def field(t: Array, y: Array, args: Array) -> Array:
    return args * y * t


def of_flow(z: Float[Array, "batch 2"], scale: Array) -> Array:
    ends = jaxode.flow(field, z, 0.0, 1.0, scale, rtol=1e-3)
    solution = jaxode.solve(field, z, 0.0, 1.0, scale, batch="joint")
    assert ends.shape == z.shape
    return jnp.sum(ends**2) + ends[0, 0] + solution.y1.sum() + solution.stats.num_evals


def of_pairs(z: Array) -> Array:
    position, velocity = jaxode.flow(lambda t, y, args: (y[1], -y[0]), (z, z), 0.0, 1.0)
    return position + velocity


def of_solve(y0: Array) -> tuple[np.ndarray, bool]:
    solution = jaxode.solve(field, y0, 0.0, 1.0, jnp.ones(()), ts=jnp.linspace(0.0, 1.0, 3))
    return np.asarray(solution.ys[-1]), bool(solution.ok)


def of_density(params: jaxode.nn.ConcatSquash, x: Array) -> Array:
    key = jax.random.key(0)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-4)
    loss, aux = flow.nll_and_stats(params, x, key=key)
    sample, log_prob = flow.sample_and_log_prob(params, key, 8)
    steps = aux.stats.num_steps + 1
    fitted, history = jaxode.fit(jaxode.bind(flow, params), x, key=key, seconds=10.0)
    loss += fitted.log_prob(x).mean() + history[-1].nats
    return loss + flow.nll(params, x) + jnp.mean(flow.log_prob(params, sample) - log_prob) + steps
