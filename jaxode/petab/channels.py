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
    """What is observed, on the scale of each observable, and how far it scatters."""

    def __init__(self, measurements: Measurements) -> None:
        experiments = measurements.experiments
        self._experiments, self._parameters = experiments, experiments.parameters
        self._observables = [series.observable for series in measurements.series]
        found = [_spread(series, measurements.ts.shape) for series in measurements.series]
        self.ys = np.concatenate([ys for ys, _ in found], axis=-1)
        self.row_args = {
            "condition": tuple(map(jnp.asarray, experiments.rows)),
            "placeholders": [tuple(map(jnp.asarray, entries)) for _, entries in found],
        }
        self._counts = [ys.shape[-1] for ys, _ in found]
        shifts = [
            np.sum(np.asarray(series.observable.shift(jnp.asarray(series.measured))))
            for series in measurements.series
        ]
        self.shift = float(np.sum(shifts))
        """How much larger the log-likelihood is on the scales of the observables."""
        formulas = [(each.formula, each.noise_formula) for each in self._observables]
        rules = experiments.model.rules
        used = [names_in(formula, rules) for both in formulas for formula in both]
        self._used = set().union(*used)
        moving = {*experiments.model.states, "time", *(each.name for each in self._observables)}
        self.kinds = {each.distribution for each in self._observables}
        self.is_simple = len(self.kinds) == 1 and not any(names & moving for names in used[1::2])
        """Whether all noise is of one kind, and does not depend on what is predicted."""

    def _at(self, t: Any, y: Array, params: Params, row: Any) -> tuple[Array, Array]:
        """The predictions and the noise of all channels of a row."""
        vector = self._parameters.vector(params)
        entries = Entries(*row["condition"])
        values = self._experiments.constants(vector, entries, self._used)
        names, found = self._experiments.field.names(t, y, values), []
        cells = zip(self._observables, self._counts, row["placeholders"], strict=True)
        for observable, count, placeholders in cells:
            predicted, noise = observable.at(names, Entries(*placeholders).of(vector))
            both = observable.scaled(predicted), noise
            found.append([jnp.broadcast_to(jnp.asarray(each, y.dtype), (count,)) for each in both])
        predicted, noise = (jnp.concatenate(each) for each in zip(*found, strict=True))
        return predicted, noise

    def observe(self, t: Array, y: Array, args: Any) -> Float[Array, " channels"]:
        """What is observed, without noise."""
        return self._at(t, y, *args)[0]

    def noise(self, params: Params, row: Any) -> Float[Array, " channels"]:
        """The noise, where it is simple."""
        nowhere = jnp.ones(len(self._experiments.model.states))
        return self._at(jnp.zeros(()), nowhere, params, row)[1]

    def observe_with_noise(self, t: Array, y: Array, args: Any) -> Float[Array, "channels 2"]:
        """What is observed, and the logarithm of its noise."""
        predicted, noise = self._at(t, y, *args)
        return jnp.stack([predicted, jnp.log(noise)], axis=-1)

    def log_density(self, predicted: Array, observed: Array, params: Params) -> Array:
        """The log-density of measurements, beside zeros for the noise."""
        del params
        apart, noise = observed[..., 0] - predicted[..., 0], jnp.exp(predicted[..., 1])
        kinds = [each.distribution for each in self._observables]
        laplace = np.repeat([kind == "laplace" for kind in kinds], self._counts)
        of_each = jnp.where(
            laplace, log_density("laplace", apart, noise), log_density("normal", apart, noise)
        )
        return jnp.stack([of_each, jnp.zeros_like(of_each)], axis=-1)


def _spread(series: MeasuredSeries, shape: tuple[int, int]) -> tuple[np.ndarray, Entries]:
    """Measurements `[rows, times, channels]` with NaN where there is none, and the placeholders of
    the channels of each row. A channel has one set of them, and one measurement at a time."""
    keys = [
        (number.tobytes(), index.tobytes())
        for number, index in zip(*series.placeholders, strict=True)
    ]
    seen: dict[Any, int] = {}
    channels: dict[Any, int] = {}
    of_row = [0] * shape[0]
    place = []
    for row, time, key in zip(series.rows, series.times, keys, strict=True):
        again = seen[row, time, key] = seen.get((row, time, key), -1) + 1
        if (row, key, again) not in channels:
            channels[row, key, again] = of_row[row]
            of_row[row] += 1
        place.append(channels[row, key, again])
    at, count = (series.rows, series.times, np.array(place)), max(of_row)
    ys = np.full((*shape, count), np.nan)
    ys[at] = series.observable.scaled(jnp.asarray(series.measured))
    width = series.placeholders.number.shape[1]
    entries = Entries(np.ones((shape[0], count, width)), np.full((shape[0], count, width), -1))
    entries.number[at[0], at[2]], entries.index[at[0], at[2]] = series.placeholders
    return ys, entries
