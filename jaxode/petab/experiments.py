"""The conditions of a problem: constants and states at the start, and when the field switches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode._checks.caller import arg
from jaxode.petab.formulas import Names, evaluate
from jaxode.petab.parameters import Entries, Parameters
from jaxode.petab.sbml_field import ModelField
from jaxode.petab.sbml_model import Model
from jaxode.petab.tables import Tables


class Experiments:
    """A row for each pair of a pre-equilibration, or none, and a simulation."""

    def __init__(self, model: Model, parameters: Parameters, tables: Tables) -> None:
        self.model, self.parameters = model, parameters
        lines = {line["conditionId"]: line for line in tables.condition}
        keys = dict.fromkeys(key for line in tables.condition for key in line)
        self.columns = [key for key in keys if key not in ("conditionId", "conditionName")]
        allowed = {*model.initial, *parameters.ids}
        for column in self.columns:
            if column not in allowed:
                raise ValueError(
                    f"{arg('path')} conditions must set what has a start value in the model or is "
                    f"in the table of parameters; got the column {column!r}. Mend it."
                )
        kinds = "preequilibrationConditionId", "simulationConditionId"
        pairs = [tuple(line.get(kind, "") for kind in kinds) for line in tables.measurement]
        rows = list(dict.fromkeys(pairs))
        for name in {*(pair[1] for pair in rows), *(pair[0] for pair in rows if pair[0])}:
            if name not in lines:
                raise ValueError(
                    f"{arg('path')} measurements must be of conditions in their table; got "
                    f"{name!r}. Add it."
                )

        def entries(names: list[str]) -> Entries:
            cells = [[lines[name].get(column, "") for column in self.columns] for name in names]
            return parameters.entries(cells, len(self.columns), "condition", model.initial)

        self.before_ids = before = list(dict.fromkeys(pair[0] for pair in rows if pair[0]))
        self.row_ids = [pair[1] for pair in rows]
        self.row_of = np.array([rows.index(pair) for pair in pairs])
        self.rows, self.before = entries([pair[1] for pair in rows]), entries(before)
        self.before_of = np.array([before.index(pair[0]) if pair[0] else -1 for pair in rows])
        empty = np.any(np.concatenate([self.rows.empty, self.before.empty]), axis=0).tolist()
        self._partial = [name for name, lacks in zip(self.columns, empty, strict=True) if lacks]
        fixed = dict.fromkeys([*model.initial, *parameters.ids])
        self.field = ModelField(model, [name for name in fixed if name not in model.states])

    def start(self, vector: Float[Array, " parameters"], entries: Entries) -> tuple[Array, Array]:
        """The constants `[..., k]` and states `[..., n]` of conditions at the start."""
        names, shape = self._names(vector, entries), entries.number.shape[:-1]
        return _stacked(names, self.field.constants, shape), _stacked(
            names, self.model.states, shape
        )

    def constants(self, vector: Array, entries: Entries, used: set[str]) -> Float[Array, " k"]:
        """The constants of one condition; zeros for those that are not used."""
        names = self._names(vector, entries)
        values = {name: names[name] if name in used else 0.0 for name in self.field.constants}
        return _stacked(values, values, ())

    def _names(self, vector: Array, entries: Entries) -> Names:
        """The values of names at the start."""
        names = Names(self.model.rules | self.model.initial, lambda _: jnp.nan, time=0.0)
        names.update({name: vector[i] for name, i in self.parameters.place.items()})
        cells = dict(zip(self.columns, jnp.moveaxis(entries.values(vector), -1, 0), strict=True))
        partial = {name: cells.pop(name) for name in self._partial}
        names.update(cells)
        for name, cell in partial.items():
            of_table = name in self.parameters.place
            default = names[name] if of_table else evaluate(self.model.initial[name], names)
            names[name] = jnp.where(jnp.isnan(cell), default, cell)
        return names

    def continued(self) -> np.ndarray:
        """Which states of each row continue those of its pre-equilibration, `[rows, n]`."""
        shape = len(self.before_of), len(self.model.states)
        continued = np.array(np.broadcast_to((self.before_of >= 0)[:, None], shape))
        for i, name in enumerate(self.model.states):
            if name in self.columns:
                continued[:, i] &= self.rows.empty[:, self.columns.index(name)]
        return continued

    def switches(self, entries: Entries) -> Float[np.ndarray, "rows points"] | None:
        """When the field switches in each row, padded with infinity; None if it never does."""
        if not self.model.switches or not len(entries.number):
            return None
        nominal = jnp.asarray(self.parameters.nominal)

        def switch_times(vector):
            return self._switch_times(vector, entries)

        times = jax.jit(switch_times)(nominal)
        moves = jax.jit(jax.jacfwd(switch_times))(nominal)
        if np.any(np.asarray(moves)[..., self.parameters.estimated] != 0):
            raise ValueError(
                f"{arg('path')} the field must switch at known times; got switches at times that "
                "are estimated. Fix these parameters, or solve the model by jaxode.solve with "
                "breakpoints."
            )
        by_row = [np.unique(row[np.isfinite(row) & (row > 0)]) for row in np.asarray(times)]
        size = max(map(len, by_row))

        def pad(row):
            return np.pad(row, (0, size - len(row)), constant_values=np.inf)

        return np.stack([pad(row) for row in by_row]) if size else None

    def _switch_times(self, vector: Array, entries: Entries) -> Float[Array, "rows switches"]:
        """The times of all switches of each row: the zeros of linear functions of time."""
        values, y = self.start(vector, entries)
        times = []
        for left, right in self.model.switches:
            differences = []
            for t in (0.0, 1.0):
                names = self.field.names(t, y, values)
                of_row = jnp.asarray(evaluate(left, names) - evaluate(right, names), float)
                differences.append(jnp.broadcast_to(of_row, values.shape[:-1]))
            slope = differences[1] - differences[0]
            never = slope == 0
            zero = -differences[0] / jnp.where(never, 1.0, slope)
            times.append(jnp.where(never, jnp.inf, zero))
        return jnp.stack(times, axis=-1)


def _stacked(
    values: Mapping[str, Any], names: Iterable[str], shape: tuple[int, ...]
) -> Float[Array, "... k"]:
    """The values of names, broadcast to a shape, along a last axis."""
    columns = [jnp.broadcast_to(jnp.asarray(values[name], float), shape) for name in names]
    return jnp.stack(columns, axis=-1)
