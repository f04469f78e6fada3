"""The measurements as `jaxode.estimate` takes them: a channel for each series of a row."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.petab.formulas import names_in
from jaxode.petab.measurements import MeasuredSeries, Measurements
from jaxode.petab.observables import log_density
from jaxode.petab.parameters import Entries

Params = dict[str, Array]


class Channels:
    """The channels: measurements, predictions and noise on the scale of each observable."""

    def __init__(self, measurements: Measurements) -> None:
        experiments = measurements.experiments
        self._experiments, self._parameters = experiments, experiments.parameters
        self._observables = [series.observable for series in measurements.series]
        spread = [_spread(series, measurements.ts.shape) for series in measurements.series]
        self.ys = np.concatenate([ys for ys, _ in spread], axis=-1)
        self.row_args = {
            "condition": tuple(map(jnp.asarray, experiments.rows)),
            "placeholders": [tuple(map(jnp.asarray, entries)) for _, entries in spread],
        }
        self._counts = [ys.shape[-1] for ys, _ in spread]
        shifts = [
            np.sum(np.asarray(series.observable.shift(jnp.asarray(series.measured))))
            for series in measurements.series
        ]
        self.shift = float(np.sum(shifts))
        """How much larger the log-likelihood is on the scales of the observables."""
        rules, observables = experiments.model.rules, self._observables
        in_formulas = [names_in(observable.formula, rules) for observable in observables]
        in_noise = [names_in(observable.noise_formula, rules) for observable in observables]
        self._used = set().union(*in_formulas, *in_noise)
        moving = {
            *experiments.model.states,
            "time",
            *(observable.name for observable in observables),
        }
        self.kinds = {observable.distribution for observable in observables}
        self.is_simple = len(self.kinds) == 1 and not any(names & moving for names in in_noise)
        """Whether all noise is of one kind, and does not depend on what is predicted."""

    def _at(self, t: Any, y: Array, params: Params, row: Any) -> tuple[Array, Array]:
        """The predictions and the noise of all channels of a row."""
        vector = self._parameters.vector(params)
        entries = Entries(*row["condition"])
        values = self._experiments.constants(vector, entries, self._used)
        names = self._experiments.field.names(t, y, values)
        predictions, noises = [], []
        cells = zip(self._observables, self._counts, row["placeholders"], strict=True)
        for observable, count, placeholders in cells:
            predicted, noise = observable.at(names, Entries(*placeholders).values(vector))
            predicted = jnp.asarray(observable.scaled(predicted), y.dtype)
            predictions.append(jnp.broadcast_to(predicted, (count,)))
            noises.append(jnp.broadcast_to(jnp.asarray(noise, y.dtype), (count,)))
        return jnp.concatenate(predictions), jnp.concatenate(noises)

    def observe(self, t: Array, y: Array, args: Any) -> Float[Array, " channels"]:
        """The predictions, without noise."""
        return self._at(t, y, *args)[0]

    def noise(self, params: Params, row: Any) -> Float[Array, " channels"]:
        """The noise, if it does not depend on predictions."""
        nowhere = jnp.ones(len(self._experiments.model.states))
        return self._at(jnp.zeros(()), nowhere, params, row)[1]

    def observe_with_noise(self, t: Array, y: Array, args: Any) -> Float[Array, "channels 2"]:
        """The predictions, and the logarithm of their noise."""
        predicted, noise = self._at(t, y, *args)
        return jnp.stack([predicted, jnp.log(noise)], axis=-1)

    def log_density(self, predicted: Array, observed: Array, params: Params) -> Array:
        """The log-density of measurements, and zeros for their noise, which is not measured."""
        del params
        residual, noise = observed[..., 0] - predicted[..., 0], jnp.exp(predicted[..., 1])
        kinds = [observable.distribution for observable in self._observables]
        laplace = np.repeat([kind == "laplace" for kind in kinds], self._counts)
        densities = jnp.where(
            laplace, log_density("laplace", residual, noise), log_density("normal", residual, noise)
        )
        return jnp.stack([densities, jnp.zeros_like(densities)], axis=-1)


def _spread(series: MeasuredSeries, shape: tuple[int, int]) -> tuple[np.ndarray, Entries]:
    """Spread a series over channels, each with one set of placeholders and one measurement at a
    time.

    Returns measurements `[rows, times, channels]`, NaN where there is none, and the placeholders of
    the channels of each row.
    """
    keys = [
        (number.tobytes(), index.tobytes())
        for number, index in zip(*series.placeholders, strict=True)
    ]
    repeats: dict[Any, int] = {}
    channels: dict[Any, int] = {}
    counts = [0] * shape[0]  # channels of each row
    place = []
    for row, time, key in zip(series.rows, series.times, keys, strict=True):
        repeat = repeats[row, time, key] = repeats.get((row, time, key), -1) + 1
        if (row, key, repeat) not in channels:
            channels[row, key, repeat] = counts[row]
            counts[row] += 1
        place.append(channels[row, key, repeat])
    at, count = (series.rows, series.times, np.array(place)), max(counts)
    ys = np.full((*shape, count), np.nan)
    ys[at] = series.observable.scaled(jnp.asarray(series.measured))
    width = series.placeholders.number.shape[1]
    entries = Entries(np.ones((shape[0], count, width)), np.full((shape[0], count, width), -1))
    entries.number[at[0], at[2]], entries.index[at[0], at[2]] = series.placeholders
    return ys, entries
