"""A state that follows a Neural ODE between observations and jumps at each of them.

Of one series, in standardized units. The linear part of the field is diagonal, in pairs of decaying
waves, and is solved exactly (Lawson, 1967); the network beside it by the midpoint rule.

References: De Brouwer et al. (2019), arXiv:1905.12374; Herrera et al. (2021), arXiv:2006.04727.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._jax.sharding import vary_alike
from jaxode.nn.base import Dense, draws
from jaxode.series.mixture import Mixture

LARGEST_SURPRISE = 3.0  # standard deviations, to which surprises saturate
LINEAR_SCALE = 3.0  # of linear weights, so that they learn faster and decay less
FIELD_STEPS = 2  # of the midpoint rule, in each part of the time to the next observation
PUSH_OF_GAP = 0.3  # change of the state by the network of the field in a typical gap, at first
FASTEST_WAVE = 2.0  # radians in a typical gap, at first


class Seen(NamedTuple):
    """A series as the network sees it, in JAX or NumPy."""

    dt: Any
    """`[times]`: since the time before, and zero at the first one."""
    y: Any
    """`[times, channels]`, zero where there is no value."""
    there: Any
    """`[times, channels]`: which values there are."""
    parts: Any = None
    """`[times]`: in how many parts to go to each time. None stands for one: a training step goes
    no further at once than the longest gap."""


class SeriesState(NamedTuple):
    """All that the past leaves behind."""

    h: Float[Array, " size"]
    """The hidden state, which follows the ODE."""
    last: Float[Array, " channels"]
    """The last value of each channel, zero before the first."""
    since: Float[Array, " channels"]
    """The time since then, or since the start."""


class Observed(NamedTuple):
    """What a jump sees of an observation, in standardized units."""

    surprise: Float[Array, " channels"]
    """`(value - mean) / sd` by the density before, within three, and zero in a gap."""
    sd: Float[Array, " channels"]
    """By the density before, and zero in a gap."""
    there: Float[Array, " channels"]
    """One for a value, and zero for a gap."""
    y: Float[Array, " channels"]
    """The values, and zero in a gap."""
    gap: Float[Array, "1"]
    """The logarithm of the time since the last one that the state read, in typical gaps."""


class Push(eqx.Module):
    """The field beside its linear part."""

    layers: tuple[Dense, Dense]
    log_rate: Float[Array, ""]

    def __call__(self, h: Float[Array, " size"]) -> Float[Array, " size"]:
        first, last = self.layers
        return jnp.exp(self.log_rate) * last(jnp.tanh(first(h)))


class GatedJump(eqx.Module):
    """Adds what surprises tell to a part of the state, and renews a part."""

    layers: tuple[Dense, Dense, Dense]
    """A hidden layer, gates, and what surprises add."""
    dropout: float = eqx.field(static=True)

    def __call__(self, h: Float[Array, " size"], seen: Observed, key: PRNGKeyArray | None):
        first, gates, gain = self.layers
        known = jnp.concatenate([h, seen.surprise, seen.there, seen.y, seen.gap])
        out = gates(_dropped(jax.nn.silu(first(known)), self.dropout, key))
        scale, forget, new = jnp.split(out, 3)
        added = LINEAR_SCALE * gain(jnp.concatenate([seen.surprise, seen.surprise * seen.sd]))
        moved = h + 2 * jax.nn.sigmoid(scale) * added
        return moved + jax.nn.sigmoid(forget - 2.0) * (jnp.tanh(new) - h)


def _dropped(x: Array, part: float, key: PRNGKeyArray | None) -> Array:
    if key is None or not part:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - part, x.shape), x / (1 - part), 0.0)


class SeriesNetwork(eqx.Module):
    """The field, the jumps and the conditional density."""

    start: Float[Array, " size"]
    of_context: tuple[Dense, Dense] | None
    decay: Float[Array, " pairs"]
    """Logarithms of the rates of the linear part."""
    frequency: Float[Array, " pairs"]
    push: Callable[[Array], Array]
    """The field beside its linear part, a function of the state."""
    jump: Callable[[Array, Observed, PRNGKeyArray | None], Array]
    density: tuple[Dense, Dense, Dense]
    """A hidden layer, what comes from it, and what comes from the state itself."""
    recall: Float[Array, " channels"]
    """The part of the last value of each channel in the mean, which decays."""
    forget: Float[Array, " channels"]
    """Logarithms of these rates."""
    log_gap: Float[Array, ""]
    """The logarithm of a typical gap between times."""
    dropout: float = eqx.field(static=True)

    @classmethod
    def make(
        cls, key: PRNGKeyArray, context: int, size: int, gap: float, recalled: Any, dropout: float
    ) -> "SeriesNetwork":
        """A network for times whose typical gap is `gap` of the span, and for channels with this
        recall and forget at first."""
        channels, log_gap = len(recalled[0]), jnp.asarray(math.log(gap), float)
        width, pairs, out = 2 * size, size // 2, Mixture.size(channels)
        shapes = (
            (width, size), (size, width),
            (width, size + 3 * channels + 1), (3 * size, width), (size, 2 * channels),
            (width, size), (out, width), (out, size),
            (width, max(context, 1)), (size, width),
        )  # fmt: skip
        scales = 1.7, 0.1, 1.7, 0.5, 0.3, 1.7, 0.1, 0.1, 1.7, 0.5
        layer = [Dense(one, by) for one, by in zip(draws(key, shapes), scales, strict=True)]
        rates = jnp.linspace(math.log(0.3), math.log(FASTEST_WAVE / gap), pairs, dtype=float)
        return cls(
            start=jnp.zeros(size),
            of_context=(layer[8], layer[9]) if context else None,
            decay=jnp.roll(rates, pairs // 2) - 1.0,
            frequency=rates,
            push=Push((layer[0], layer[1]), jnp.asarray(math.log(PUSH_OF_GAP)) - log_gap),
            jump=GatedJump((layer[2], layer[3], layer[4]), dropout),
            density=(layer[5], layer[6], layer[7]),
            recall=jnp.asarray(recalled[0]),
            forget=jnp.asarray(recalled[1]),
            log_gap=log_gap,
            dropout=dropout,
        )

    def initial(self, context: Any) -> SeriesState:
        """The state before the first observation."""
        h, nothing = self.start, jnp.zeros_like(self.recall)
        if self.of_context is not None:
            first, last = self.of_context
            h = h + last(jax.nn.silu(first(context)))
        return SeriesState(h, nothing, nothing)

    def later(self, state: SeriesState, dt: Float[Array, ""], parts: Any = None) -> SeriesState:
        """The state `dt` later if nothing is observed, reached in `parts` equal parts."""
        if parts is None:
            h = self.flow(state.h, dt)
        else:
            part = dt / parts.astype(dt.dtype)
            h = jax.lax.fori_loop(0, parts, lambda _, h: self.flow(h, part), state.h)
        return SeriesState(h, state.last, state.since + dt)

    def flow(self, h: Float[Array, " size"], dt: Float[Array, ""], steps: int = FIELD_STEPS):
        """The hidden state `dt` later."""
        step = dt / steps
        size = jnp.exp(-jnp.exp(self.decay) * (0.5 * step))
        angle = jnp.exp(self.frequency) * (0.5 * step)
        turn = size * jnp.cos(angle), size * jnp.sin(angle)

        def half(h):  # of a step of the linear part
            a, b = jnp.split(h, 2)
            return jnp.concatenate([turn[0] * a - turn[1] * b, turn[1] * a + turn[0] * b])

        for _ in range(steps):
            middle = half(h + 0.5 * step * self.push(h))
            h = half(half(h) + step * self.push(middle))
        return h

    def predict(self, state: SeriesState, key: PRNGKeyArray | None = None) -> Mixture:
        """The density of the values, given the state. A key drops units."""
        first, last, direct = self.density
        hidden = _dropped(jax.nn.silu(first(state.h)), self.dropout, key)
        mixture = Mixture.of(last(hidden) + LINEAR_SCALE * direct(state.h), len(self.recall))
        known = self.recall * jnp.exp(-jnp.exp(self.forget) * state.since) * state.last
        return mixture._replace(mean=mixture.mean + known[None])

    def jumped(self, state: SeriesState, mixture: Mixture, y, there, key=None) -> SeriesState:
        """The state after an observation, which stays as it is if there is none."""
        mean, variance = mixture.moments()
        surprise = (y - mean) * jax.lax.rsqrt(variance)
        surprise = surprise / jnp.sqrt(1 + (surprise / LARGEST_SURPRISE) ** 2)
        since = jnp.min(state.since)  # any value, or since the start
        gap = jnp.log(since + 0.01 * jnp.exp(self.log_gap)) - self.log_gap

        def here(x):
            return jnp.where(there, x, 0.0)

        sd, ones = jnp.sqrt(variance), jnp.ones_like(y)
        seen = Observed(here(surprise), here(sd), here(ones), here(y), gap[None])
        moved = self.jump(state.h, seen, key)
        last, since = jnp.where(there, y, state.last), jnp.where(there, 0.0, state.since)
        return SeriesState(jnp.where(there.any(), moved, state.h), last, since)

    def read(
        self, seen: Seen, context=None, fed: Bool[Array, "times channels"] | None = None, key=None
    ) -> tuple[SeriesState, Mixture]:
        """The last state, and the density before each time, given the values that were `fed`."""
        fed = seen.there if fed is None else fed

        def step(state, each):
            dt, y, there, parts, key = each
            state = self.later(state, dt, parts)
            mixture = self.predict(state, key)
            drop = None if key is None else jax.random.fold_in(key, 0)
            return self.jumped(state, mixture, y, there, drop), mixture

        keys = None if key is None else jax.random.split(key, len(seen.dt))
        each = seen.dt, seen.y, fed, seen.parts, keys
        start, each = vary_alike((self.initial(context), each))
        return jax.lax.scan(step, start, each)

    def log_prob(self, seen: Seen, context=None, fed=None, key=None) -> Float[Array, ""]:
        """Nats of all values that are there, by the chain rule."""
        _, mixtures = self.read(seen, context, fed, key)
        return jnp.sum(jax.vmap(Mixture.log_prob)(mixtures, seen.y, seen.there))
