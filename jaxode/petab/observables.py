"""Observables: predictions, their noise, and the likelihood of measurements."""

import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxode._checks.caller import arg
from jaxode.petab.formulas import Names, evaluate, names_in, parsed
from jaxode.petab.parameters import SCALES
from jaxode.petab.tables import Table

DISTRIBUTIONS = "normal", "laplace"
PLACEHOLDERS = ("observableParameter", "noiseParameter")


class Observable(NamedTuple):
    """A line of the table of observables."""

    name: str
    formula: Any
    noise_formula: Any
    scale: str
    distribution: str
    placeholders: tuple[str, ...]

    def at(self, names: Names, placeholders: Float[Array, "..."]) -> tuple[Array, Array]:
        """The prediction and its noise, from the values of names and of the placeholders."""
        names.update({name: placeholders[..., i] for i, name in enumerate(self.placeholders)})
        names[self.name] = predicted = evaluate(self.formula, names)
        return predicted, evaluate(self.noise_formula, names)

    def log_density(self, predicted: Array, noise: Array, measured: Array) -> Array:
        """The log-density of measurements, normal or Laplace on the scale of the observable."""
        residual = self.scaled(measured) - self.scaled(predicted)
        return log_density(self.distribution, residual, noise) - self.shift(measured)

    def scaled(self, values: Array) -> Array:
        """Take predictions or measurements to the scale of the observable."""
        return jnp.log(values) / SCALES[self.scale] if self.scale != "lin" else values

    def shift(self, measured: Array) -> Array:
        """How much larger the log-density of a measurement is on the scale of the observable."""
        if self.scale == "lin":
            return jnp.zeros_like(measured)
        return jnp.log(measured) + math.log(SCALES[self.scale])


def log_density(distribution: str, residual: Array, noise: Array) -> Array:
    """Log-density of a residual, normal or Laplace."""
    if distribution == "laplace":
        return -jnp.abs(residual / noise) - jnp.log(2 * noise)
    return -0.5 * (residual / noise) ** 2 - jnp.log(noise) - 0.5 * math.log(2 * math.pi)


def observables_of(table: Table, allowed: set[str]) -> dict[str, Observable]:
    """The observables by name. Formulas may have the `allowed` names."""
    observables = {}
    for line in table:
        name = line["observableId"]
        scale = line.get("observableTransformation") or "lin"
        distribution = line.get("noiseDistribution") or "normal"
        for column, value, choices in (
            ("observableTransformation", scale, SCALES),
            ("noiseDistribution", distribution, DISTRIBUTIONS),
        ):
            if value not in choices:
                raise ValueError(
                    f"{arg('path')} {column} must be one of {', '.join(choices)}; got {value!r} "
                    f"for {name!r}. Mend the table of observables."
                )
        formula, of_noise = (parsed(line[f"{kind}Formula"]) for kind in ("observable", "noise"))
        used = names_in(formula, {}) | (names_in(of_noise, {}) - {name})
        pattern = re.compile(rf"({'|'.join(PLACEHOLDERS)})\d+_{re.escape(name)}")
        placeholders = {word for word in used if pattern.fullmatch(word)}
        if unknown := sorted(used - placeholders - allowed):
            observed = any(unknown[0] == line["observableId"] for line in table)
            cure = "Write the formula of that observable." if observed else "Add it to one."
            raise ValueError(
                f"{arg('path')} formulas of observables must be of names in the model or the table "
                f"of parameters; got {unknown[0]!r} in {name!r}. {cure}"
            )
        observables[name] = Observable(
            name, formula, of_noise, scale, distribution, tuple(sorted(placeholders))
        )
    return observables


def placeholders_of(line: dict[str, str], observable: Observable) -> list[str]:
    """The cells of a measurement that replace the placeholders of its observable."""
    cells = {
        f"{kind}{i + 1}_{observable.name}": cell.strip()
        for kind in PLACEHOLDERS
        for i, cell in enumerate(line.get(f"{kind}s", "").split(";"))
    }
    for name in observable.placeholders:
        if not cells.get(name):
            raise ValueError(
                f"{arg('path')} measurements must give all that formulas leave open; got none for "
                f"{name!r} at time {line['time']}. Mend the table of measurements."
            )
    return [cells[name] for name in observable.placeholders]
