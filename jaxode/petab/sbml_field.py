"""The vector field of a model. Laws of one form are computed together, so that it compiles fast."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxode.petab.formulas import Formula, Names, evaluate, names_in
from jaxode.petab.sbml_model import Model


class Form(NamedTuple):
    """Laws that are equal but for their names."""

    pattern: Any
    """The formula, with "0", "1" and so on in place of names."""
    place: Int[np.ndarray, "names laws"]
    """The index of each name of each law among all numbers."""


class ModelField:
    """The vector field of a model with constants `[k]`, by name."""

    def __init__(self, model: Model, constants: Sequence[str]) -> None:
        self.model = model
        self.constants = {name: i for i, name in enumerate(constants)}
        used = set().union(*(names_in(law, model.rules) for law in model.laws), model.sizes)
        self.used = {name for name in constants if name in used}
        """The constants on which the field depends."""
        of_laws = set().union(*(names_in(law, {}) for law in model.laws))
        self._follow = ["time", *sorted(of_laws & set(model.rules))]
        place = {name: i for i, name in enumerate((*model.states, *constants, *self._follow, None))}
        forms: dict[Any, list[tuple[int, list[str]]]] = {}
        for i, law in enumerate(model.laws):
            names: list[str] = []
            forms.setdefault(_pattern(law, names), []).append((i, names))
        self._forms = [
            Form(pattern, np.array([[place[name] for name in names] for _, names in laws]).T)
            for pattern, laws in forms.items()
        ]
        order = [i for laws in forms.values() for i, _ in laws]
        self._stoichiometry = model.stoichiometry[:, order]
        self._sizes = np.array([place[size] for size in model.sizes])

    def names(self, t: Any, y: Float[Array, "... n"], values: Float[Array, "... k"]) -> Names:
        """The values of names at a time, of a state and constants."""
        names = Names(self.model.rules, lambda name: values[..., self.constants[name]], time=t)
        names.update({name: y[..., i] for i, name in enumerate(self.model.states)})
        return names

    def __call__(
        self, t: Float[Array, ""], y: Float[Array, " n"], values: Float[Array, " k"]
    ) -> Float[Array, " n"]:
        """The time derivative of a state."""
        names = self.names(t, y, values)
        follow = [jnp.asarray(names[name], y.dtype) for name in self._follow]
        numbers = jnp.concatenate([y, values, jnp.stack([*follow, jnp.ones((), y.dtype)])])
        rates = []
        for form in self._forms:
            values_of_names = {str(i): numbers[place] for i, place in enumerate(form.place)}
            shape = form.place.shape[1:] or (1,)
            rate = jnp.asarray(evaluate(form.pattern, values_of_names), y.dtype)
            rates.append(jnp.broadcast_to(rate, shape))
        return jnp.asarray(self._stoichiometry) @ jnp.concatenate(rates) / numbers[self._sizes]


def _pattern(formula: Any, names: list[str]) -> Any:
    """The formula with its names replaced by their numbers. Appends them to `names`."""
    if isinstance(formula, str):
        names.append(formula)
        return str(len(names) - 1)
    if not isinstance(formula, Formula):
        return formula
    return Formula(formula.function, tuple(_pattern(part, names) for part in formula.arguments))
