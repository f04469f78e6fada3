"""The parameters of a problem: their scales, bounds, priors and values."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxode._checks.caller import arg, caller
from jaxode._checks.errors import first_row
from jaxode.petab.tables import Table, number

# A parameter `p` on a scale stands for the number `exp(rate * p)`, or for itself if the rate is 0.
SCALES = {"lin": 0.0, "log": 1.0, "log10": math.log(10)}
# The names of normal priors in tables.
NORMAL_PRIORS = "parameterScaleNormal", "normal"
# The names of uniform priors, which are the default.
UNIFORM_PRIORS = "parameterScaleUniform", "uniform", ""
# Priors of the numbers themselves. The others are of parameters on their scales.
PRIORS_OF_NUMBERS = "normal", "uniform"


class Entries(NamedTuple):
    """Cells of a table. Each holds a number or, where `index` is not negative, a parameter."""

    number: Float[np.ndarray, "..."]
    index: Int[np.ndarray, "..."]

    def values(self, vector: Float[Array, " parameters"]) -> Float[Array, "..."]:
        """The values of the cells for parameters on a linear scale. NaN where one is empty."""
        return jnp.where(self.index >= 0, vector[self.index], self.number)

    @property
    def empty(self) -> Bool[np.ndarray, "..."]:
        """Where a cell is empty."""
        return (self.index < 0) & np.isnan(self.number)


class Parameters:
    """The table of parameters."""

    def __init__(self, table: Table) -> None:
        self.ids = [line["parameterId"] for line in table]
        self.place = {name: i for i, name in enumerate(self.ids)}
        self.estimated = np.array([_is_estimated(line) for line in table], bool)
        if not self.estimated.any():
            raise ValueError(
                f"{arg('path')} estimate must be 1 for at least one parameter; got none. Mend the "
                "table of parameters."
            )
        self.names = [name for name, chosen in zip(self.ids, self.estimated, strict=True) if chosen]
        self.lines = {line["parameterId"]: line for line in table}
        self.rates = np.array([self._rate(line) for line in table])
        self.nominal = np.array([_number(line, "nominalValue") for line in table])
        first_row(
            ~self.estimated & np.isnan(self.nominal),
            lambda i: (
                f"{arg('path')} nominalValue must be a number for a parameter that is not "
                f"estimated; got none for {self.ids[i]!r}. Mend the table of parameters."
            ),
        )
        self.limits = np.array(
            [[_number(line, key) for line in table] for key in ("lowerBound", "upperBound")]
        )
        """The bounds of all parameters on a linear scale, `[2, parameters]`."""
        low, high = map(self.scaled, self.limits)
        lost = (self.rates > 0) & (self.limits[0] <= 0)
        first_row(
            self.estimated & (lost | ~(low <= high)),
            lambda i: (
                f"{arg('path')} lowerBound and upperBound must be in order, and positive for "
                f"logarithms; got {table[i]['lowerBound']!r} and {table[i]['upperBound']!r} for "
                f"{self.ids[i]!r}. Mend the table of parameters."
            ),
        )
        self.bounds = self.by_name(low), self.by_name(high)

    def _rate(self, line: dict[str, str]) -> float:
        scale = line["parameterScale"] or "lin"
        if scale not in SCALES:
            raise ValueError(
                f"{arg('path')} parameterScale must be one of {', '.join(SCALES)}; got {scale!r} "
                f"for {line['parameterId']!r}. Mend the table of parameters."
            )
        return SCALES[scale]

    def by_name(self, values: Any) -> dict[str, Float[Array, ""]]:
        """The values of the estimated parameters, as a dictionary."""
        return dict(zip(self.names, jnp.asarray(values[self.estimated]), strict=True))

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Take values from a linear scale to the scales of the table."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(
                self.rates > 0, np.log(values) / np.where(self.rates, self.rates, 1), values
            )

    def check(self, params: Any) -> None:
        """Raise unless `params` is a dictionary of the estimated parameters."""
        if not isinstance(params, dict):
            raise TypeError(
                f"{arg('params')} must be a dictionary of the parameters in problem.names; got "
                f"{type(params).__name__}. Take problem.nominal as a pattern."
            )
        if set(params) != set(self.names):
            odd = sorted(set(params) ^ set(self.names))
            raise ValueError(
                f"{arg('params')} must have the names of problem.names; got {odd} too many or too "
                "few. Take problem.nominal as a pattern."
            )

    def vector(self, params: dict[str, Array]) -> Float[Array, " parameters"]:
        """All parameters on a linear scale, from the estimated ones on their scales."""
        self.check(params)
        flat = jnp.stack([jnp.asarray(params[name], float) for name in self.names])
        rates = jnp.asarray(self.rates[self.estimated])
        numbers = jnp.where(rates > 0, jnp.exp(rates * flat), flat)
        return jnp.asarray(self.nominal).at[np.flatnonzero(self.estimated)].set(numbers)

    def entries(
        self, cells: list[list[str]], columns: int, table: str, numbers: dict[str, Any]
    ) -> Entries:
        """Read cells of numbers, parameters, or names that the model gives `numbers`."""
        read = [[self._entry(cell, table, numbers) for cell in line] for line in cells]
        shape = len(cells), columns
        return Entries(
            np.array([[number for number, _ in line] for line in read], float).reshape(shape),
            np.array([[index for _, index in line] for line in read], int).reshape(shape),
        )

    def _entry(self, cell: str, table: str, numbers: dict[str, Any]) -> tuple[float, int]:
        if cell in self.place:
            return math.nan, self.place[cell]
        try:
            return float(cell or "nan"), -1
        except ValueError:
            if isinstance(numbers.get(cell), float):
                return numbers[cell], -1
            raise ValueError(
                f"{arg('path')} the table of {table}s must hold numbers and parameters; got "
                f"{cell!r}. Add it to the table of parameters."
            ) from None

    def starts(self, key: PRNGKeyArray, n: int) -> dict[str, Float[Array, " n"]]:
        """Draw first guesses between the bounds, by the priors of the initialization."""
        starts, (low, high) = {}, self.bounds
        for name, subkey in zip(self.names, jax.random.split(key, len(self.names)), strict=True):
            kind, (first, second) = self._prior(name, "initialization")
            linear, place = kind in PRIORS_OF_NUMBERS, self.place[name]
            edges = self.limits[:, place] if linear else np.array([low[name], high[name]])
            if kind in NORMAL_PRIORS:
                left, right = (edges - first) / second
                drawn = first + second * jax.random.truncated_normal(subkey, left, right, (n,))
            else:
                first, second = np.clip((first, second), *edges)
                if not np.isfinite(second - first):
                    raise ValueError(
                        f"{caller()}: bounds must be finite to draw between them; got {first:g} "
                        f"and {second:g} for {name!r}. Mend the table of parameters."
                    )
                drawn = jax.random.uniform(subkey, (n,), minval=first, maxval=second)
            if linear and (rate := self.rates[place]):
                drawn = jnp.log(drawn) / rate
            starts[name] = jnp.clip(drawn, low[name], high[name])  # rounding may leave them
        return starts

    def prior(self, params: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Residuals of the parameters that have a normal objective prior."""
        residuals = {}
        for name in self.names:
            kind, (mean, deviation) = self._prior(name, "objective")
            if kind in NORMAL_PRIORS:
                rate = self.rates[self.place[name]] if kind == "normal" else 0.0
                value = jnp.exp(rate * params[name]) if rate else params[name]
                residuals[name] = (value - mean) / deviation
        return residuals

    def _prior(self, name: str, purpose: str) -> tuple[str, tuple[Any, Any]]:
        """The kind of a prior and its two parameters, by default the bounds if it is uniform.

        The purpose is "initialization" or "objective".
        """
        line, (low, high) = self.lines[name], self.bounds
        kind = line.get(f"{purpose}PriorType", "")
        if kind not in NORMAL_PRIORS + UNIFORM_PRIORS:
            raise ValueError(
                f"{caller()}: {purpose}PriorType must be uniform or normal; got {kind!r} for "
                f"{name!r}. Leave it out, and pass a prior of your own to jaxode.estimate."
            )
        cell = line.get(f"{purpose}PriorParameters", "")
        if not cell and kind in UNIFORM_PRIORS:
            edges = (
                self.limits[:, self.place[name]]
                if kind in PRIORS_OF_NUMBERS
                else (low[name], high[name])
            )
            return kind, tuple(map(float, edges))
        try:
            first, second = map(float, cell.split(";"))
        except ValueError:
            first = second = math.nan
        if not (second > 0 if kind in NORMAL_PRIORS else first <= second) or not math.isfinite(
            first
        ):
            words = (
                "a mean and a deviation above 0" if kind in NORMAL_PRIORS else "two ends in order"
            )
            raise ValueError(
                f"{caller()}: {purpose}PriorParameters must be {words}, as '1;2'; got {cell!r} for "
                f"{name!r}. Mend the table of parameters."
            )
        return kind, (first, second)


def _is_estimated(line: dict[str, str]) -> bool:
    value = _number(line, "estimate")
    if value not in (0, 1):
        raise ValueError(
            f"{arg('path')} estimate must be 0 or 1; got {line['estimate']!r} for "
            f"{line['parameterId']!r}. Mend the table of parameters."
        )
    return value == 1


def _number(line: dict[str, str], column: str) -> float:
    return number(line, column, "parameter")
