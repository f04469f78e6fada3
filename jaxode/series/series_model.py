"""What `series.fit` returns: densities, forecasts and states of irregular series."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._checks.arguments import check_not_traced, integer, numbers
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode._jax.closure import compiled
from jaxode.series.mixture import Mixture
from jaxode.series.series_network import Readings, SeriesNetwork
from jaxode.series.units import Units, as_float, check_at, check_series, last_observed


class Past(NamedTuple):
    """Series, and the way from their last observations to the times of forecasts."""

    readings: Readings
    context: Any
    dt: Any
    """`[rows, times]`: the time since the last observation or forecast."""
    solves: Any
    """`[rows, times]`: the number of equal solves that lead to each time."""


@dataclasses.dataclass(frozen=True)
class Series:
    """The distribution of irregular series with gaps. Made by `series.fit`.

    Methods take series as `fit` does: times `ts` `[rows, times]` and values `ys`
    `[rows, times, channels]`, NaN where nothing was observed; and the `context` of training, if
    there was one. Later times `at` are `[times]`, or `[rows, times]`. They increase, none lies
    before the last observation of its row, and a shorter row repeats its last one. Wrong series and
    times raise TypeError or ValueError.
    """

    params: SeriesNetwork
    units: Units

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The channels of a time."""
        return self.units.mean.shape

    def with_params(self, params: SeriesNetwork) -> "Series":
        """The same model with another network."""
        return dataclasses.replace(self, params=params)

    @public("Series.log_prob")
    def log_prob(self, ts: Any, ys: Any, *, context: Any = None) -> Float[np.ndarray, " rows"]:
        """The log-density of all observed values, `[rows]`, in nats, in the units of the data.

        By the chain rule over times. At one time, the density of the channels that were observed is
        a marginal of the joint density, in closed form.
        """
        _, readings, context = self._read(ts, ys, context)
        nats = np.asarray(log_probs(self.params, readings, context), float)
        return nats - (readings.is_observed * np.log(self.units.sd)).sum(axis=(1, 2))

    @public("Series.forecast")
    def forecast(
        self, key: PRNGKeyArray, ts: Any, ys: Any, at: Any, n: int = 100, *, context: Any = None
    ) -> Float[np.ndarray, "n rows times channels"]:
        """Draw `n` futures of each row by the key, `[n, rows, times, channels]`: the values at each
        of the later times, context the past and the drawn ones before.

        Draws beyond the range of training by more than half of it are drawn again, and moved there
        after eight tries: the network never read such values. `mean` and `quantile` have no limits.
        """
        key, n = check_key(key), integer("n", n)
        past = self._read_to(ts, ys, at, context)
        keys = jax.random.split(key, (len(past.dt), n))
        drawn = np.asarray(_forecast(self.params, *past, keys, self.units.limits), float)
        return self._in_units(drawn.swapaxes(0, 1))

    @public("Series.mean")
    def mean(
        self, ts: Any, ys: Any, at: Any, *, context: Any = None
    ) -> Float[np.ndarray, "rows times channels"]:
        """The mean at each of the later times context the past, `[rows, times, channels]`. It needs
        no draws."""
        ahead = self._ahead(ts, ys, at, context)[1]
        return self._in_units(np.asarray(_mean(ahead), float))

    @public("Series.quantile")
    def quantile(
        self, q: Any, ts: Any, ys: Any, at: Any, *, context: Any = None
    ) -> Float[np.ndarray, "*levels rows times channels"]:
        """Quantiles of each channel at each of the later times context the past,
        `[*levels, rows, times, channels]`. `q` is a level between 0 and 1, or an array of them. It
        needs no draws."""
        levels = np.asarray(numbers("q", q), float)
        if not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"{arg('q')} must lie between 0 and 1; got {q}.")
        tails = as_float(np.stack([levels.ravel(), 1 - levels.ravel()], axis=1))
        if (tails < (least := np.finfo(tails.dtype).tiny)).any():
            raise ValueError(
                f"{arg('q')} must be at least {least:.2g}, and as far from 1, in {tails.dtype}; "
                f"got {q}. Take a level further inside."
            )
        ahead = self._ahead(ts, ys, at, context)[1]
        y = np.asarray(_quantile(ahead, tails), float)
        return self._in_units(y.reshape(*levels.shape, *y.shape[1:]))

    @public("Series.state")
    def state(
        self, ts: Any, ys: Any, at: Any, *, context: Any = None
    ) -> Float[np.ndarray, "rows times numbers"]:
        """The state at each of the later times, `[rows, times, size + 2 * channels]`.

        It joins the hidden state, the last value of each channel in standardized units, and
        `exp(-age)` of that value in median spans of a series. Both are zero for a channel that was
        never seen.
        """
        return np.asarray(self._ahead(ts, ys, at, context)[0])

    def _read(self, ts: Any, ys: Any, context: Any) -> tuple[np.ndarray, Readings, Any]:
        """The last observed time of each row, and the series and the context for the network."""
        check_not_traced("looks at the data", ts, ys, context)
        ts, ys = check_series(ts, ys)
        if ys.shape[2:] != self.event_shape:
            raise ValueError(
                f"{arg('ys')} must have {len(self.units.mean)} channels, as in training; got "
                f"{ys.shape[2]}. Fill channels that were not observed with NaN."
            )
        units = self.units
        return last_observed(ts, ys), units.readings(ts, ys), units.standardized(context, len(ts))

    def _read_to(self, ts: Any, ys: Any, at: Any, context: Any) -> Past:
        last, readings, context = self._read(ts, ys, context)
        at = check_at(at, last)
        dt = np.diff(at, axis=1, prepend=last[:, None]) / self.units.time
        return Past(readings, context, as_float(dt), self.units.solves("at", dt))

    def _ahead(self, ts: Any, ys: Any, at: Any, context: Any) -> tuple[Any, Mixture]:
        """States and densities at later times."""
        return _ahead(self.params, *self._read_to(ts, ys, at, context))

    def _in_units(self, y: np.ndarray) -> np.ndarray:
        """Standardized values in the units of the data."""
        return self.units.mean + self.units.sd * y


@compiled
def log_probs(network: SeriesNetwork, readings: Readings, context: Any) -> Float[Array, " rows"]:
    """Nats of each row, in standardized units."""
    return jax.vmap(network.log_prob)(readings, context)


@compiled
def _ahead(network: SeriesNetwork, readings: Readings, context: Any, dt: Any, solves: Any):
    """States and densities at later times, without jumps."""

    def row(readings, context, *times):
        ever = jnp.any(readings.is_observed, axis=0)

        def step(state, time):
            state = network.later(state, *time)
            recency = jnp.where(ever, jnp.exp(-state.since), 0.0)
            features = jnp.concatenate([state.h, state.last, recency])
            return state, (features, network.predict(state))

        return jax.lax.scan(step, network.read(readings, context)[0], times)[1]

    return jax.vmap(row)(readings, context, dt, solves)


@compiled
def _forecast(
    network: SeriesNetwork,
    readings: Readings,
    context: Any,
    dt: Any,
    solves: Any,
    keys: Any,
    limits: Any,
):
    """Draws `[rows, n, times, channels]`. The state jumps at each as at an observation."""

    def draw(state, dt, solves, key):
        def step(state, time):
            dt, solves, key = time
            state = network.later(state, dt, solves)
            mixture = network.predict(state)
            y = mixture.sample_within(key, *limits)
            return network.jumped(state, mixture, y, jnp.ones(y.shape, bool)), y

        return jax.lax.scan(step, state, (dt, solves, jax.random.split(key, len(dt))))[1]

    def row(readings, context, dt, solves, keys):
        state, _ = network.read(readings, context)
        return jax.vmap(draw, (None, None, None, 0))(state, dt, solves, keys)

    return jax.vmap(row)(readings, context, dt, solves, keys)


@compiled
def _mean(ahead: Mixture):
    return jax.vmap(jax.vmap(lambda mixture: mixture.moments()[0]))(ahead)


@compiled
def _quantile(ahead: Mixture, tails: Any):
    """Quantiles `[levels, rows, times, channels]` at pairs `(q, 1 - q)`."""

    def level(tail):
        return jax.vmap(jax.vmap(lambda mixture: mixture.quantile(*tail)))(ahead)

    return jax.lax.map(level, tails)
