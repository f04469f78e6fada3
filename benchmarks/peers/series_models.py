"""Forecasters of irregular series for `series`.

A contender is a function of training series, validation series, the cut, the scale of each channel,
a seed and seconds of this process. It trains and returns a `Forecaster`. The rivals train on what
is scored: the squared errors of values after the cut, in the scale of the score, given those
before. `jaxode.series` trains on the likelihood of whole series.
"""

import functools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from benchmarks.harness.series_data import Cut, Series, cut_at, last_values

Array = Any
HIDDEN, LATENT, BATCH, RATE = 64, 24, 64, 3e-3
LOOK = 50  # steps between two looks at the validation rows
ROWS = 500  # predicted at once


class Forecaster(NamedTuple):
    mean: Callable[[Cut], Array]
    """`[rows, later times, channels]`, in the units of the data."""
    nats: Callable[[Series], Array] | None = None
    """The log-density of each row."""
    state: Callable[[Series, float], Array] | None = None
    """`[rows, numbers]` at a time, given the whole series."""


def by_jaxode(train: Series, aside: Series, cut, scale, seed: int, seconds: float) -> Forecaster:
    """Defaults, with as many numbers in the state as the rivals have where there are many
    channels."""
    data = Series(*(join(*both) for both in zip(train, aside, strict=True)))
    size = HIDDEN if data.ys.shape[2] > 8 else 32
    clock = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch("jaxode.training.budget.time", clock):
        model, _ = jaxode.series.fit(
            data.ts, data.ys, key=jax.random.key(seed), seconds=seconds, context=data.context,
            size=size, validation=len(aside.ts) / len(data.ts), progress=False,
        )  # fmt: skip
    known = lambda part: {} if part.context is None else {"context": part.context}
    return Forecaster(
        lambda part: model.mean(part.ts, part.past, part.at, **known(part)),
        lambda part: model.log_prob(part.ts, part.ys, **known(part)),
        lambda part, at: model.state(part.ts, part.ys, [at], **known(part))[:, 0],
    )


def join(a: Array, b: Array) -> Array:
    return None if a is None else np.concatenate([a, b])


def last_value(train: Series, aside: Series, cut, scale, seed, seconds) -> Forecaster:
    """And the mean of a channel where a series has none."""
    mean = np.nanmean(train.ys, axis=(0, 1))

    def of(part: Cut) -> Array:
        last = last_values(part.past)
        shape = (*part.at.shape, last.shape[1])
        return np.broadcast_to(np.where(np.isnan(last), mean, last)[:, None], shape)

    return Forecaster(of)


def mean_of_channel(train: Series, aside: Series, cut, scale, seed, seconds) -> Forecaster:
    mean = np.nanmean(train.ys, axis=(0, 1))
    return Forecaster(lambda part: np.broadcast_to(mean, (*part.at.shape, len(mean))))


class GRUD(eqx.Module):
    """A discrete recurrent network whose inputs and state decay (Che et al. 2018).

    Its forecast adds the decayed last value, without which it is far worse.
    """

    cell: eqx.nn.GRUCell
    decay: eqx.nn.Linear
    rate: Array
    start: eqx.nn.Linear
    head: eqx.nn.MLP

    def __init__(self, channels: int, context: int, key: Array):
        keys = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(2 * channels, HIDDEN, key=keys[0])
        self.decay = eqx.nn.Linear(channels, HIDDEN, key=keys[1])
        self.rate = jnp.zeros(channels)
        self.start = eqx.nn.Linear(context, HIDDEN, key=keys[2])
        self.head = eqx.nn.MLP(HIDDEN, channels, HIDDEN, 1, jnp.tanh, key=keys[3])

    def __call__(self, ts, ys, at, context):
        there = ~jnp.isnan(ys)

        def forecast(carry, dt):
            h, last, since = carry
            since = since + dt
            return jnp.exp(-jax.nn.relu(self.decay(since))) * h, last, since

        def step(carry, each):
            dt, y, there = each
            h, last, since = forecast(carry, dt)
            kept = jnp.exp(-jax.nn.softplus(self.rate) * since) * last
            x = jnp.concatenate([jnp.where(there, y, kept), there.astype(h.dtype)])
            h = jnp.where(there.any(), self.cell(x, h), h)
            return (h, jnp.where(there, y, last), jnp.where(there, 0.0, since)), None

        zeros = jnp.zeros(ys.shape[1])
        each = jnp.diff(ts, prepend=ts[:1]), jnp.where(there, ys, 0.0), there
        carry, _ = jax.lax.scan(step, (self.start(context), zeros, zeros), each)

        def of(t):
            h, last, since = forecast(carry, t - ts[-1])
            return self.head(h) + jnp.exp(-jax.nn.softplus(self.rate) * since) * last

        return jax.vmap(of)(at)


class LatentODE(eqx.Module):
    """A recurrent encoder, read backwards, and an ODE from the first time on."""

    cell: eqx.nn.GRUCell
    start: eqx.nn.MLP
    field: jaxode.nn.MLP
    head: eqx.nn.MLP

    def __init__(self, channels: int, context: int, key: Array):
        keys = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(2 * channels + 1, HIDDEN, key=keys[0])
        self.start = eqx.nn.MLP(HIDDEN + context, LATENT, HIDDEN, 1, jnp.tanh, key=keys[1])
        self.field = jaxode.nn.MLP(LATENT, (HIDDEN, HIDDEN), key=keys[2])
        self.head = eqx.nn.MLP(LATENT, channels, HIDDEN, 1, jnp.tanh, key=keys[3])

    def encode(self, ts, ys, context):
        there = ~jnp.isnan(ys)
        gaps = jnp.diff(ts, prepend=ts[:1])[:, None]
        x = jnp.concatenate([jnp.where(there, ys, 0.0), there.astype(ts.dtype), gaps], axis=1)
        step = lambda h, each: (jnp.where(each[1], self.cell(each[0], h), h), None)
        h, _ = jax.lax.scan(step, jnp.zeros(HIDDEN), (x, there.any(axis=1)), reverse=True)
        return self.start(jnp.concatenate([h, context]))

    def rows(self, ts, ys, at, context):
        """Of all rows, since one solve takes them together."""
        z = jax.vmap(self.encode)(ts, ys, context)
        at = at - ts[:, :1]
        field = lambda t, z, network: network(jnp.zeros_like(t), z)  # does not see the time
        options = {"batch": "per_sample", "ts": at, "rtol": 1e-3, "atol": 1e-3, "throw": False}
        z = jaxode.solve(field, z, 0.0, at[:, -1], self.field, **options).ys
        return jax.vmap(jax.vmap(self.head))(z)


def rival(kind: type, train: Series, aside: Series, cut, scale, seed: int, seconds: float):
    """Adam by the clock, cosine decay, and the best on the validation rows."""
    units = Units(train)
    data, held_out = (units.of(cut_at(part, cut)) for part in (train, aside))
    key, first = jax.random.split(jax.random.key(seed))
    network = kind(train.ys.shape[2], data[3].shape[1], first)
    weight = jnp.asarray((units.sd * scale) ** 2 / np.mean((units.sd * scale) ** 2), float)
    predict = lambda network, part: (
        network.rows(*part[:4]) if kind is LatentODE else jax.vmap(network)(*part[:4])
    )

    def loss(network, part):
        there = ~jnp.isnan(part[4])
        apart = jnp.where(there, predict(network, part) - jnp.where(there, part[4], 0.0), 0.0)
        return jnp.sum(apart**2 * weight) / jnp.sum(there)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    @eqx.filter_jit
    def steps(network, state, key, rate):
        arrays, static = eqx.partition(network, eqx.is_inexact_array)

        def step(i, carry):
            arrays, state = carry
            rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(data[0]))
            part = jax.tree.map(lambda x: x[rows], data)
            of = lambda arrays: loss(eqx.combine(arrays, static), part)
            updates, state = optimizer.update(jax.grad(of)(arrays), state)
            return jax.tree.map(lambda a, u: a - rate * u, arrays, updates), state

        arrays, state = jax.lax.fori_loop(0, LOOK, step, (arrays, state))
        return eqx.combine(arrays, static), state

    look = eqx.filter_jit(lambda network: loss(network, held_out))
    state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    jax.block_until_ready(steps(network, state, key, jnp.zeros(())))  # compiles
    best, before, count, begin = network, float(look(network)), 0, time.process_time()
    least = now = before
    while (left := 1 - (time.process_time() - begin) / seconds) > 0:
        rate = jnp.asarray(RATE * np.sin(0.5 * np.pi * left) ** 2, float)
        network, state = steps(network, state, jax.random.fold_in(key, count), rate)
        count += 1
        if (now := float(look(network))) < least:
            best, least = network, now
    print(
        f"{kind.__name__}: {count * LOOK} steps, validation {before:.4f}, {least:.4f}", flush=True
    )
    if not np.isfinite(now):
        raise FloatingPointError(f"{kind.__name__}: the loss is not finite")
    forecast = eqx.filter_jit(predict)

    def mean(part: Cut) -> Array:
        parts = units.of(part)
        cuts = range(0, len(part.ts), ROWS)
        found = [forecast(best, jax.tree.map(lambda x, i=i: x[i : i + ROWS], parts)) for i in cuts]
        return np.concatenate(found) * units.sd + units.mean

    return Forecaster(mean)


class Units:
    """Standardized values, times in median spans, and contexts."""

    def __init__(self, train: Series):
        self.mean, self.sd = np.nanmean(train.ys, (0, 1)), np.nanstd(train.ys, (0, 1))
        self.time = float(np.median(np.ptp(train.ts, axis=1)))
        if train.context is not None:
            self.of_context = train.context.mean(0), np.maximum(train.context.std(0), 1e-6)

    def of(self, part: Cut) -> tuple[Array, ...]:
        """Times, past, later times, contexts, later values."""
        known = np.zeros((len(part.ts), 1))
        if part.context is not None:
            known = (part.context - self.of_context[0]) / self.of_context[1]
        scaled = lambda y: (y - self.mean) / self.sd
        count = max(int((~np.isnan(part.past)).any(axis=2).sum(axis=1).max()), 1)
        ts = np.minimum(part.ts, part.at[:, :1])[:, :count]
        leaves = ts / self.time, scaled(part.past[:, :count]), part.at / self.time, known
        return tuple(jnp.asarray(leaf, float) for leaf in (*leaves, scaled(part.later)))


CONTENDERS: dict[str, Callable[..., Forecaster]] = {
    "jaxode": by_jaxode,
    "GRU-D": functools.partial(rival, GRUD),
    "latent ODE": functools.partial(rival, LatentODE),
    "last value": last_value,
    "mean of channel": mean_of_channel,
}
