"""The measurements of a problem, and their likelihood."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxode._checks.caller import arg
from jaxode.petab.experiments import Experiments
from jaxode.petab.observables import Observable, observables_of, placeholders_of
from jaxode.petab.parameters import Entries
from jaxode.petab.tables import Table, Tables, number

# A state should be steady at this time. It stands for "inf", and ends pre-equilibrations.
SETTLED_TIME = 1e8


class MeasuredSeries(NamedTuple):
    """The measurements of one observable."""

    observable: Observable
    rows: Int[np.ndarray, " m"]
    times: Int[np.ndarray, " m"]
    """The index of the time among those of its row."""
    measured: Float[np.ndarray, " m"]
    placeholders: Entries


class Measurements:
    """The times of each row, and a series for each observable."""

    def __init__(self, experiments: Experiments, tables: Tables) -> None:
        self.experiments, lines = experiments, tables.measurement
        model, parameters, row_of = experiments.model, experiments.parameters, experiments.row_of
        allowed = {*experiments.field.constants, *model.states, *model.rules, "time"}
        observables = observables_of(tables.observable, allowed)
        for line in lines:
            if line["observableId"] not in observables:
                raise ValueError(
                    f"{arg('path')} measurements must be of observables in their table; got "
                    f"{line['observableId']!r}. Add it."
                )
        at = np.array([number(line, "time", "measurement") for line in lines])
        last = 10 * np.max(at, initial=SETTLED_TIME / 10, where=np.isfinite(at))
        self.rests = np.isin(np.arange(max(row_of) + 1), row_of[at == np.inf])
        """Whether the last time of each row stands for infinity."""
        at = np.where(at == np.inf, last, at)
        measured = np.array([number(line, "measurement", "measurement") for line in lines])
        logarithmic = np.array([observables[line["observableId"]].scale != "lin" for line in lines])
        _check(at >= 0, "time must not be negative, nor empty", "time", lines)
        words = "measurement must be finite, and not empty"
        _check(np.isfinite(measured), words, "measurement", lines)
        words = "measurement must be positive for a logarithmic observable"
        _check((measured > 0) | ~logarithmic, words, "measurement", lines)
        times = [np.unique(at[row_of == row]) for row in range(max(row_of) + 1)]
        place = np.array(
            [np.searchsorted(times[row], t) for row, t in zip(row_of, at, strict=True)]
        )
        size = max(map(len, times))
        self.ts = np.stack([np.pad(t, (0, size - len(t)), "edge") for t in times])
        self.series = []
        for name, observable in observables.items():
            which = np.array(
                [i for i, line in enumerate(lines) if line["observableId"] == name], int
            )
            if not len(which):
                continue
            cells = [placeholders_of(lines[i], observable) for i in which]
            width = len(observable.placeholders)
            entries = parameters.entries(cells, width, "measurement", model.initial)
            self.series.append(
                MeasuredSeries(observable, row_of[which], place[which], measured[which], entries)
            )

    def nll(
        self, vector: Float[Array, " parameters"], values: Float[Array, "rows k"],
        ys: Float[Array, "rows times n"],
    ) -> Float[Array, ""]:  # fmt: skip
        """Minus the log-likelihood of solutions at the times of each row."""
        total = jnp.zeros((), ys.dtype)
        for observable, rows, times, measured, placeholders in self.series:
            t = jnp.asarray(self.ts[rows, times])
            names = self.experiments.field.names(t, ys[rows, times], values[rows])
            predicted, noise = observable.at(names, placeholders.values(vector))
            densities = observable.log_density(predicted, noise, jnp.asarray(measured))
            total = total - jnp.sum(densities)
        return total


def _check(holds: Bool[np.ndarray, " m"], rule: str, column: str, lines: Table) -> None:
    """Raise for the first line for which a rule does not hold."""
    if not holds.all():
        line = lines[int(np.argmin(holds))]
        raise ValueError(
            f"{arg('path')} {rule}; got {line[column]!r} for {line['observableId']!r}. Mend the "
            "table of measurements."
        )
