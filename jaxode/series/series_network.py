"""A state that follows a Neural ODE between observations and jumps at each of them.

All functions take one series, in standardized units. The linear part of the field is diagonal, in
pairs of decaying waves, and is solved exactly (Lawson, 1967); the network that is added to it is
solved by the midpoint rule.

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

LARGEST_SURPRISE = 3.0  # standard deviations at which surprises saturate
LINEAR_SCALE = 3.0  # of linear weights, so that they learn faster and decay less
FIELD_STEPS = 2  # steps of the midpoint rule in a solve
PUSH_OF_GAP = 0.3  # change of the state by an untrained network of the field in a typical gap
FASTEST_WAVE = 2.0  # radians that the fastest untrained wave turns in a typical gap


class Readings(NamedTuple):
    """A series as the network reads it, in JAX or NumPy."""

    dt: Any
    """`[times]`: the time since the one before, zero at the first."""
    y: Any
    """`[times, channels]`: the values, zero where one is missing."""
    is_observed: Any
    """`[times, channels]`: the mask of the values."""
    solves: Any = None
    """`[times]`: the number of equal solves that lead to each time. None stands for one: no time
    of training is longer than its longest gap."""


class SeriesState(NamedTuple):
    """What the network keeps of the past."""

    h: Float[Array, " size"]
    """The hidden state, which follows the ODE."""
    last: Float[Array, " channels"]
    """The last value of each channel, zero before the first."""
    since: Float[Array, " channels"]
    """The time since that value, or since the start."""


class Observed(NamedTuple):
    """What a jump reads of an observation, in standardized units."""

    surprise: Float[Array, " channels"]
    """`(value - mean) / sd` in the density before the jump, saturated at 3; 0 if missing."""
    sd: Float[Array, " channels"]
    """The standard deviation in the density before the jump; 0 if missing."""
    there: Float[Array, " channels"]
    """1 for a value, 0 if it is missing."""
    y: Float[Array, " channels"]
    """The values; 0 if missing."""
    gap: Float[Array, "1"]
    """The logarithm of the time since the last observation that the state read, in typical gaps."""


class Push(eqx.Module):
    """The nonlinear part of the field."""

    layers: tuple[Dense, Dense]
    log_rate: Float[Array, ""]

    def __call__(self, h: Float[Array, " size"]) -> Float[Array, " size"]:
        first, last = self.layers
        return jnp.exp(self.log_rate) * last(jnp.tanh(first(h)))


class GatedJump(eqx.Module):
    """Moves the state by the surprises, and replaces a part of it, as gates say."""

    layers: tuple[Dense, Dense, Dense]
    """A hidden layer, the gates, and the gain of surprises."""
    dropout: float = eqx.field(static=True)

    def __call__(self, h: Float[Array, " size"], observed: Observed, key: PRNGKeyArray | None):
        first, gates, gain = self.layers
        surprise, sd, there, y, gap = observed
        inputs = jnp.concatenate([h, surprise, there, y, gap])
        outputs = gates(_dropped(jax.nn.silu(first(inputs)), self.dropout, key))
        scale, forget, candidate = jnp.split(outputs, 3)
        shift = LINEAR_SCALE * gain(jnp.concatenate([surprise, surprise * sd]))
        shifted = h + 2 * jax.nn.sigmoid(scale) * shift
        return shifted + jax.nn.sigmoid(forget - 2.0) * (jnp.tanh(candidate) - h)


def _dropped(x: Array, share: float, key: PRNGKeyArray | None) -> Array:
    """Dropout of a share of the units, if there is a key."""
    if key is None or not share:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0.0)


class SeriesNetwork(eqx.Module):
    """The field, the jumps and the density of the next values."""

    start: Float[Array, " size"]
    of_context: tuple[Dense, Dense] | None
    decay: Float[Array, " pairs"]
    """Logarithms of the rates of the linear part."""
    frequency: Float[Array, " pairs"]
    push: Callable[[Array], Array]
    """The nonlinear part of the field, a function of the state."""
    jump: Callable[[Array, Observed, PRNGKeyArray | None], Array]
    density: tuple[Dense, Dense, Dense]
    """A hidden layer, its output, and a linear output of the state."""
    recall: Float[Array, " channels"]
    """How much of the last value of each channel the mean recalls at first; it decays."""
    forget: Float[Array, " channels"]
    """Logarithms of the rates at which recall decays."""
    log_gap: Float[Array, ""]
    """The logarithm of a typical gap between times."""
    dropout: float = eqx.field(static=True)

    @classmethod
    def make(
        cls, key: PRNGKeyArray, context: int, size: int, gap: float, recalled: Any, dropout: float
    ) -> "SeriesNetwork":
        """Draw a network.

        Args:
            key: draws it.
            context: columns of the context.
            size: numbers in the hidden state, an even count.
            gap: the typical gap between times, in spans.
            recalled: `recall` and `forget` at first, of each channel.
            dropout: share of hidden units that a training step leaves out.
        """
        channels, log_gap = len(recalled[0]), jnp.asarray(math.log(gap), float)
        width, pairs, outputs = 2 * size, size // 2, Mixture.size(channels)
        shapes = (
            (width, size), (size, width),
            (width, size + 3 * channels + 1), (3 * size, width), (size, 2 * channels),
            (width, size), (outputs, width), (outputs, size),
            (width, max(context, 1)), (size, width),
        )  # fmt: skip
        scales = 1.7, 0.1, 1.7, 0.5, 0.3, 1.7, 0.1, 0.1, 1.7, 0.5
        weights = zip(draws(key, shapes), scales, strict=True)
        layer = [Dense(weight, scale) for weight, scale in weights]
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

    def later(self, state: SeriesState, dt: Float[Array, ""], solves: Any = None) -> SeriesState:
        """The state `dt` later if nothing is observed, by this number of equal solves."""
        if solves is None:
            h = self.flow(state.h, dt)
        else:
            length = dt / solves.astype(dt.dtype)
            h = jax.lax.fori_loop(0, solves, lambda _, h: self.flow(h, length), state.h)
        return SeriesState(h, state.last, state.since + dt)

    def flow(self, h: Float[Array, " size"], dt: Float[Array, ""], steps: int = FIELD_STEPS):
        """The hidden state `dt` later."""
        step = dt / steps
        size = jnp.exp(-jnp.exp(self.decay) * (0.5 * step))
        angle = jnp.exp(self.frequency) * (0.5 * step)
        turn = size * jnp.cos(angle), size * jnp.sin(angle)

        def half(h):  # half a step of the linear part
            a, b = jnp.split(h, 2)
            return jnp.concatenate([turn[0] * a - turn[1] * b, turn[1] * a + turn[0] * b])

        for _ in range(steps):
            middle = half(h + 0.5 * step * self.push(h))
            h = half(half(h) + step * self.push(middle))
        return h

    def predict(self, state: SeriesState, key: PRNGKeyArray | None = None) -> Mixture:
        """The density of the next values, given the state. A key turns dropout on."""
        first, last, direct = self.density
        hidden = _dropped(jax.nn.silu(first(state.h)), self.dropout, key)
        mixture = Mixture.from_numbers(
            last(hidden) + LINEAR_SCALE * direct(state.h), len(self.recall)
        )
        recalled = self.recall * jnp.exp(-jnp.exp(self.forget) * state.since) * state.last
        return mixture._replace(mean=mixture.mean + recalled[None])

    def jumped(self, state: SeriesState, mixture: Mixture, y, is_observed, key=None) -> SeriesState:
        """The state after a time. It jumps if a channel was observed."""
        mean, variance = mixture.moments()
        surprise = (y - mean) * jax.lax.rsqrt(variance)
        surprise = surprise / jnp.sqrt(1 + (surprise / LARGEST_SURPRISE) ** 2)
        since = jnp.min(state.since)  # the time since any value, or since the start
        gap = jnp.log(since + 0.01 * jnp.exp(self.log_gap)) - self.log_gap

        def or_zero(x):
            return jnp.where(is_observed, x, 0.0)

        sd, ones = jnp.sqrt(variance), jnp.ones_like(y)
        observed = Observed(or_zero(surprise), or_zero(sd), or_zero(ones), or_zero(y), gap[None])
        h = jnp.where(is_observed.any(), self.jump(state.h, observed, key), state.h)
        last = jnp.where(is_observed, y, state.last)
        return SeriesState(h, last, jnp.where(is_observed, 0.0, state.since))

    def read(
        self,
        readings: Readings,
        context=None,
        is_read: Bool[Array, "times channels"] | None = None,
        key=None,
    ) -> tuple[SeriesState, Mixture]:
        """The last state, and the density before each time.

        Args:
            readings: the series.
            context: of the series, standardized.
            is_read: the mask of the values that the state reads. All of them by default.
            key: turns dropout on.
        """
        is_read = readings.is_observed if is_read is None else is_read

        def step(state, time):
            dt, y, is_read, solves, key = time
            state = self.later(state, dt, solves)
            mixture = self.predict(state, key)
            jump_key = None if key is None else jax.random.fold_in(key, 0)
            return self.jumped(state, mixture, y, is_read, jump_key), mixture

        keys = None if key is None else jax.random.split(key, len(readings.dt))
        times = readings.dt, readings.y, is_read, readings.solves, keys
        start, times = vary_alike((self.initial(context), times))
        return jax.lax.scan(step, start, times)

    def log_prob(
        self, readings: Readings, context=None, is_read=None, key=None
    ) -> Float[Array, ""]:
        """Nats of all observed values, by the chain rule. See `read` for the arguments."""
        _, mixtures = self.read(readings, context, is_read, key)
        return jnp.sum(jax.vmap(Mixture.log_prob)(mixtures, readings.y, readings.is_observed))
