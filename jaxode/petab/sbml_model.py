"""The ODE of a model in SBML."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxode._checks.caller import arg
from jaxode.petab.formulas import (
    RELATIONS,
    Formula,
    degree_in_time,
    names_in,
    reached,
    read,
    within,
)


class Model(NamedTuple):
    """The ODE of a model: `dy/dt = stoichiometry @ laws / sizes`.

    A name stands for a concentration, or for an amount if its species has only substance units.
    """

    initial: dict[str, Any]
    """The formula or the number of each name at the start, except those of rules."""
    rules: dict[str, Any]
    """The formulas of names that follow from others: assignment rules, and rates of reactions."""
    states: tuple[str, ...]
    """Species that reactions change, and names with a rate rule."""
    laws: tuple[Any, ...]
    """The rates of reactions, and the formulas of rate rules."""
    stoichiometry: Float[np.ndarray, "states laws"]
    sizes: tuple[str | None, ...]
    """The compartment of each state that is a concentration."""
    switches: tuple[tuple[Any, Any], ...]
    """Both sides of relations that depend on time, and not on the state."""


def read_model(path: Path) -> Model:
    """Read a file of SBML."""
    import libsbml

    document = libsbml.readSBML(str(path))
    wrong = [document.getError(i) for i in range(document.getNumErrors())]
    wrong = [error for error in wrong if error.getSeverity() >= libsbml.LIBSBML_SEV_ERROR]
    if wrong or document.getModel() is None:
        got = wrong[0].getMessage().strip() if wrong else "no model"
        raise ValueError(
            f"{arg('path')} {path.name} must be a model in SBML; got {got!r}. Mend the file."
        )
    for option in ("expandFunctionDefinitions", "promoteLocalParameters"):
        properties = libsbml.ConversionProperties()
        properties.addOption(option, True)
        document.convert(properties)
    model = document.getModel()
    if unread := list(_unread(model)):
        raise ValueError(
            f"{arg('path')} {path.name} must be a model without {' and '.join(unread)}, which "
            "jaxode.petab does not read. Leave them out, or solve the model by jaxode.solve."
        )
    return _model(model)


def _unread(model: Any) -> Iterator[str]:
    """Name the parts of a model that are not read."""
    if events := [event.getId() or "without a name" for event in model.getListOfEvents()]:
        yield f"events ({', '.join(events[:5])})"
    rules = list(model.getListOfRules())
    if any(rule.isAlgebraic() for rule in rules):
        yield "algebraic rules"
    assigned = {rule.getVariable() for rule in rules if not rule.isAlgebraic()}
    assignments = model.getListOfInitialAssignments()
    computed = (assigned | {assignment.getSymbol() for assignment in assignments}) - {""}
    references = [side for reaction in model.getListOfReactions() for side in _sides(reaction)]
    if any(side.isSetStoichiometryMath() or side.getId() in computed for side in references):
        yield "stoichiometries that are computed"
    species = list(model.getListOfSpecies())
    if model.isSetConversionFactor() or any(kind.isSetConversionFactor() for kind in species):
        yield "conversion factors"
    changed = _species_changed(model)
    if inside := [kind.getId() for kind in changed if kind.getCompartment() in assigned]:
        yield f"species in a compartment whose size changes ({', '.join(inside[:5])})"
    reactions = list(model.getListOfReactions())
    if missing := [reaction.getId() for reaction in reactions if not reaction.getKineticLaw()]:
        yield f"reactions without a kinetic law ({', '.join(missing[:5])})"


def _sides(reaction: Any) -> list[Any]:
    return [*reaction.getListOfReactants(), *reaction.getListOfProducts()]


def _species_changed(model: Any) -> list[Any]:
    """Species that reactions change."""
    ruled = {rule.getVariable() for rule in model.getListOfRules()}
    changed = {
        side.getSpecies() for reaction in model.getListOfReactions() for side in _sides(reaction)
    }

    def fixed(species):
        return species.getBoundaryCondition() or species.getConstant()

    return [
        species
        for species in model.getListOfSpecies()
        if species.getId() in changed - ruled and not fixed(species)
    ]


def _initial(model: Any) -> dict[str, Any]:
    """The formula or the number of each name at the start."""
    initial: dict[str, Any] = {}
    for compartment in model.getListOfCompartments():
        size = float(compartment.getSize()) if compartment.isSetSize() else 1.0
        initial[compartment.getId()] = size
    for parameter in model.getListOfParameters():
        value = float(parameter.getValue()) if parameter.isSetValue() else float("nan")
        initial[parameter.getId()] = value
    for species in model.getListOfSpecies():
        initial[species.getId()] = _initial_of_species(species)
    for assignment in model.getListOfInitialAssignments():
        initial[assignment.getSymbol()] = read(assignment.getMath())
    return initial


def _initial_of_species(species: Any) -> Any:
    """The initial amount or concentration of a species, NaN if the model has none."""
    by_amount, size = species.getHasOnlySubstanceUnits(), species.getCompartment()
    if species.isSetInitialConcentration():
        value = float(species.getInitialConcentration())
        return Formula("TIMES", (value, size)) if by_amount else value
    if species.isSetInitialAmount():
        value = float(species.getInitialAmount())
        return value if by_amount else Formula("DIVIDE", (value, size))
    return float("nan")


def _model(model: Any) -> Model:
    species, reactions = _species_changed(model), list(model.getListOfReactions())
    rules, rates = {}, {}
    for rule in model.getListOfRules():
        formulas = rules if rule.isAssignment() else rates
        formulas[rule.getVariable()] = read(rule.getMath())
    kinetic = {reaction.getId(): read(reaction.getKineticLaw().getMath()) for reaction in reactions}
    states = (*(kind.getId() for kind in species), *rates)
    if not states:
        raise ValueError(
            f"{arg('path')} the model must have a species that a reaction changes, or a rate rule; "
            "got none. Add it."
        )
    stoichiometry = np.zeros((len(states), len(reactions) + len(rates)))
    stoichiometry[len(species) :, len(reactions) :] = np.eye(len(rates))
    place = {name: i for i, name in enumerate(states[: len(species)])}
    for j, reaction in enumerate(reactions):
        for sign, side in ((-1, reaction.getListOfReactants()), (1, reaction.getListOfProducts())):
            for reference in side:
                if (name := reference.getSpecies()) in place:
                    stoichiometry[place[name], j] += sign * reference.getStoichiometry()
    sizes = [None if kind.getHasOnlySubstanceUnits() else kind.getCompartment() for kind in species]
    laws = (*kinetic.values(), *rates.values())
    initial = {name: value for name, value in _initial(model).items() if name not in rules}
    return Model(
        initial, {**rules, **kinetic}, states, laws, stoichiometry, (*sizes, *[None] * len(rates)),
        tuple(_switches([*rules.values(), *laws], rules, states)),
    )  # fmt: skip


def _switches(formulas: list[Any], rules: dict[str, Any], states: tuple[str, ...]):
    """Both sides of relations that depend on time, and not on the state."""
    switches = {}
    for part in (part for formula in formulas for part in within(formula)):
        if isinstance(part, Formula) and part.function in RELATIONS:
            for sides in itertools.pairwise(part.arguments):
                names = names_in(Formula("MINUS", sides), rules)
                if "time" in names and not names & set(states):
                    _check_switch(Formula("MINUS", sides), rules)
                    switches[sides] = None
    return switches


def _check_switch(difference: Formula, rules: dict[str, Any]) -> None:
    """Raise unless the difference of both sides is linear in time, or is constant between other
    switches."""
    degree = degree_in_time(difference, rules)
    steps = (
        isinstance(part, Formula) and part.function in RELATIONS and "time" in names_in(part, rules)
        for part in reached(difference, rules)
    )  # fmt: skip
    if degree is None or (degree == 1 and any(steps)):
        raise ValueError(
            f"{arg('path')} the field must switch where a linear function of time has a value; "
            "got a relation of another function of time, such as a sine or a power. Solve the "
            "model by jaxode.solve with breakpoints."
        )
