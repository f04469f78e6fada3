"""The problems that are posed to all libraries: trained networks, data and noise.

A network is one of `jaxode.nn`, or one as users write it: `Plain`. All are trained from a seed for
some seconds, so that solves need error control.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode

ROWS, RATE = 256, 3e-3  # of a training
OWN = {True: "a network of the user", False: "jaxode.nn"}
"""How a case is called whose network is a user's own, or is not."""


class Plain(eqx.Module):
    """A multilayer perceptron, the time beside the state, and so a context."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __init__(
        self, dim: int, widths: tuple[int, ...], key, activation=jax.nn.softplus,
        context_size: int = 0,
    ):  # fmt: skip
        self.activation = activation
        sizes = [
            (dim + context_size + 1, widths[0]),
            *itertools.pairwise(widths),
            (widths[-1], dim),
        ]
        keys = jax.random.split(key, len(sizes))
        pairs = zip(sizes, keys, strict=True)
        self.layers = [eqx.nn.Linear(*size, key=key) for size, key in pairs]

    def __call__(self, t, y, context=None):
        x = jnp.append(y if context is None else jnp.concatenate([y, context]), t)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def stepper(loss, optimizer):
    """`step(params, state, *args)`: an update by the gradient of `loss(params, *args)`."""

    def step(params, state, *args):
        updates, state = optimizer.update(jax.grad(loss)(params, *args), state, params)
        return optax.apply_updates(params, updates), state

    return step


def trainer(loss, steps: int, rate: Any = None):
    """`train(params, key) -> params`, by Adam on `loss(params, key)`, at a rate that falls."""
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps) if rate is None else rate)
    step = stepper(loss, optimizer)

    def train(params, key):
        one = lambda carry, key: (step(*carry, key), None)
        start = params, optimizer.init(params)
        return jax.lax.scan(one, start, jax.random.split(key, steps))[0][0]

    return jax.jit(train)


class Workload(NamedTuple):
    """A flow trained by matching on eight Gaussians, and a batch of their samples."""

    dim: int
    batch: int
    widths: tuple[int, ...]
    own: bool = False
    """A network as a user writes it, not one of `jaxode.nn`."""
    steps: int = 3000
    """Of matching; some seconds."""


class FlowProblem(NamedTuple):
    params: Any
    x: Any
    probe: Any
    """One random sign for each entry of `x`: the one that jaxode draws from `key`."""
    key: Any


def eight_gaussians(rng: np.random.Generator, n: int, dim: int = 2) -> np.ndarray:
    """On a ring in two dimensions; in more, around points that are drawn at random."""
    angle = 2 * np.pi * np.arange(8) / 8
    centers = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1)
    if dim > 2:
        centers = 2 * np.random.default_rng(0).standard_normal((8, dim))
    chosen = centers[rng.integers(0, 8, n)]
    return (chosen + 0.3 * rng.standard_normal((n, dim))).astype(np.float32)


def network(workload: Workload) -> Any:
    """Before its training."""
    key = jax.random.key(0)
    if workload.own:
        return Plain(workload.dim, workload.widths, key)
    return squash(workload.dim, workload.widths, key)


def squash(dim: int, widths: tuple[int, ...], key) -> jaxode.nn.ConcatSquash:
    return jaxode.nn.ConcatSquash(dim, widths, key=key, activation=jaxode.nn.softplus)


def untrained(workload: Workload) -> FlowProblem:
    """For what does not depend on the numbers."""
    blank = jnp.zeros((workload.batch, workload.dim))
    return FlowProblem(network(workload), blank, blank, jax.random.key(0))


@functools.cache
def flow(workload: Workload) -> FlowProblem:
    return matched(network(workload), workload.dim, workload.batch, workload.steps, 50_000)


def matched(params, dim: int, batch: int, steps: int, rows: int) -> FlowProblem:
    """Train a network by matching on so many rows, and draw a batch."""
    cnf = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))
    data = jnp.asarray(eight_gaussians(np.random.default_rng(0), rows, dim))

    def matching(params, key):
        rows = data[jax.random.randint(key, (ROWS,), 0, len(data))]
        return cnf.matching_loss(params, rows, key=key)

    params = trainer(matching, steps)(params, jax.random.key(1))
    rng, key = np.random.default_rng(1), jax.random.key(2)
    x = jnp.asarray(eight_gaussians(rng, batch, dim))
    return FlowProblem(params, x, probe_of_jaxode(x, key), key)


class Images(NamedTuple):
    """Flattened images of one channel, and their network: by default those of MNIST's size.

    They stand for real ones in times alone: eight random images with noise.
    """

    batch: int
    width: int
    blocks: int
    shape: tuple[int, int] = (28, 28)
    patch: int = 4
    steps: int = 60
    """Of matching."""

    @property
    def dim(self) -> int:
        return math.prod(self.shape)


def mixer(size: Images) -> jaxode.nn.Mixer:
    """Before its training."""
    return jaxode.nn.Mixer(size.shape, size.patch, size.width, size.blocks, key=jax.random.key(0))


@functools.cache
def images(size: Images) -> FlowProblem:
    return matched(mixer(size), size.dim, size.batch, size.steps, 2000)


def untrained_images(size: Images) -> FlowProblem:
    """For what does not depend on the numbers."""
    x = jnp.asarray(eight_gaussians(np.random.default_rng(0), size.batch, size.dim))
    return FlowProblem(mixer(size), x, jnp.ones_like(x), jax.random.key(0))


def probe_of_jaxode(x: jax.Array, key: jax.Array) -> jax.Array:
    """The signs with which `flow.nll(..., key=key)` estimates the divergence, `[batch, dim]`.

    Read off its results: for the field `f(z) = e_0 z_k` the estimate is `v_0 v_k`, and the
    log-determinant is minus that. The sign of the whole probe does not matter to an estimate.
    """
    dim = x.shape[1]
    field = lambda t, z, a: jnp.zeros_like(z).at[0].set(a @ z)
    estimate = jaxode.divergence.hutchinson()
    flow = jaxode.cnf(field, jaxode.standard_normal(dim), divergence=estimate, steps=1)
    products = lambda a: -flow.nll_and_stats(a, x, key=key)[1].log_det
    probe = jnp.sign(jax.lax.map(jax.jit(products), jnp.eye(dim, dtype=x.dtype))).T
    return probe.at[:, 0].set(1)


class Posterior(NamedTuple):
    """The size of a flow of parameters given data, trained by matching."""

    rows: int
    own: bool
    """A network as a user writes it, not one of `jaxode.nn`."""
    width: int = 64
    simulations: int = 30_000


class Conditional(NamedTuple):
    """A trained conditional flow, and rows to evaluate."""

    params: Any
    x: Any
    context: Any
    train: tuple[Any, Any]
    """What it was trained on: samples and contexts."""


@functools.cache
def conditional(size: Posterior, simulate: Callable[..., Any]) -> Conditional:
    """`simulate(key, n)` draws samples and contexts, which are standardized."""
    network_key, data_key, key = jax.random.split(jax.random.key(0), 3)
    drawn = simulate(data_key, size.simulations + size.rows)
    x, context = ((leaf - leaf.mean(0)) / leaf.std(0) for leaf in drawn)
    (dim, seen), train = (x.shape[1], context.shape[1]), size.simulations
    if size.own:
        params: Any = Plain(dim, (size.width,) * 3, network_key, context_size=seen)
    else:
        params = jaxode.nn.Residual(dim, size.width, 2, key=network_key, context_size=seen)
    cnf = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(dim))

    def matching(params, key):
        rows = jax.random.randint(key, (ROWS,), 0, train)
        return cnf.matching_loss(params, x[rows], key=key, context=context[rows], time_power=2.0)

    params = trainer(matching, 6000)(params, key)
    return Conditional(params, x[train:], context[train:], (x[:train], context[:train]))


class OdeProblem(NamedTuple):
    """A Neural ODE, seen at the same times by all rows."""

    params: Any
    y0: Any
    ts: Any


class Series(NamedTuple):
    """A Neural ODE on series, each with its own times."""

    params: Any
    y0: Any
    ts: Any
    """`[rows, times]`; each series starts at its first time and ends at its last."""
    real: Any
    """Which of them are no padding."""


def oscillators(y):
    """Pairs of coordinates that turn on a limit cycle, each at a frequency of 2 to 8."""
    u, v = jnp.split(y, 2, axis=-1)
    frequency, grow = jnp.linspace(2.0, 8.0, u.shape[-1]), 1 - u**2 - v**2
    return jnp.concatenate([grow * u - frequency * v, grow * v + frequency * u], axis=-1)


def batched(t, y, params):
    return jax.vmap(lambda y: params(t, y))(y)


@functools.cache
def neural_ode(state: int, width: int, batch: int, times: int, own: bool = True) -> OdeProblem:
    """A network that was fitted to the slopes of oscillators."""
    network_key, key = jax.random.split(jax.random.key(0))
    if own:
        params: Any = Plain(state, (width, width), network_key, jnp.tanh)
    else:
        params = jaxode.nn.MLP(state, (width, width), key=network_key)

    def slopes(params, key):
        y = jax.random.normal(key, (ROWS, state))
        t = jax.random.uniform(key)
        return jnp.mean((batched(t, y, params) - oscillators(y)) ** 2)

    params = trainer(slopes, 800)(params, jax.random.key(1))
    return OdeProblem(params, jax.random.normal(key, (batch, state)), jnp.linspace(0, 1, times + 1))


@functools.cache
def ragged(rows: int, most: int, state: int, width: int) -> Series:
    """Series that start and end at their own times, padded by repeating the last."""
    p, rng = neural_ode(state, width, rows, 1), np.random.default_rng(0)
    counts = rng.integers(2, most + 1, rows)
    starts, spans = rng.uniform(0, 1, rows), rng.uniform(0.2, 2, rows)
    real = np.arange(most) < counts[:, None]
    times = np.sort(np.where(real, rng.uniform(0, 1, (rows, most)), np.inf), axis=1)
    times = np.where(real, times, times[np.arange(rows), counts - 1][:, None])
    ts = (starts[:, None] + spans[:, None] * times).astype(np.float32)
    return Series(p.params, p.y0, jnp.asarray(ts), jnp.asarray(real))
