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
    wrong = [each for each in wrong if each.getSeverity() >= libsbml.LIBSBML_SEV_ERROR]
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
    if parts := list(_unread(model)):
        raise ValueError(
            f"{arg('path')} {path.name} must be a model without {' and '.join(parts)}, which "
            "jaxode.petab does not read. Leave them out, or solve the model by jaxode.solve."
        )
    return _model(model)


def _unread(model: Any) -> Iterator[str]:
    """Name what is in a model and cannot be solved."""
    if events := [event.getId() or "without a name" for event in model.getListOfEvents()]:
        yield f"events ({', '.join(events[:5])})"
    rules = list(model.getListOfRules())
    if any(rule.isAlgebraic() for rule in rules):
        yield "algebraic rules"
    assigned = {rule.getVariable() for rule in rules if not rule.isAlgebraic()}
    computed = assigned | {each.getSymbol() for each in model.getListOfInitialAssignments()}
    references = [each for reaction in model.getListOfReactions() for each in _sides(reaction)]
    if any(each.isSetStoichiometryMath() or each.getId() in computed - {""} for each in references):
        yield "stoichiometries that are computed"
    species = list(model.getListOfSpecies())
    if model.isSetConversionFactor() or any(each.isSetConversionFactor() for each in species):
        yield "conversion factors"
    if inside := [each.getId() for each in _moved(model) if each.getCompartment() in assigned]:
        yield f"species in a compartment whose size changes ({', '.join(inside[:5])})"
    if missing := [each.getId() for each in model.getListOfReactions() if not each.getKineticLaw()]:
        yield f"reactions without a kinetic law ({', '.join(missing[:5])})"


def _sides(reaction: Any) -> list[Any]:
    return [*reaction.getListOfReactants(), *reaction.getListOfProducts()]


def _moved(model: Any) -> list[Any]:
    """Species that reactions change."""
    ruled = {rule.getVariable() for rule in model.getListOfRules()}
    changed = {
        each.getSpecies() for reaction in model.getListOfReactions() for each in _sides(reaction)
    }

    def fixed(species):
        return species.getBoundaryCondition() or species.getConstant()

    return [
        each
        for each in model.getListOfSpecies()
        if each.getId() in changed - ruled and not fixed(each)
    ]


def _initial(model: Any) -> dict[str, Any]:
    """The formula or the number of each name at the start."""
    found: dict[str, Any] = {}
    for each in model.getListOfCompartments():
        found[each.getId()] = float(each.getSize()) if each.isSetSize() else 1.0
    for each in model.getListOfParameters():
        found[each.getId()] = float(each.getValue()) if each.isSetValue() else float("nan")
    for each in model.getListOfSpecies():
        by_amount, size = each.getHasOnlySubstanceUnits(), each.getCompartment()
        value: Any = float("nan")
        if each.isSetInitialConcentration():
            value = float(each.getInitialConcentration())
            value = Formula("TIMES", (value, size)) if by_amount else value
        elif each.isSetInitialAmount():
            value = float(each.getInitialAmount())
            value = value if by_amount else Formula("DIVIDE", (value, size))
        found[each.getId()] = value
    for each in model.getListOfInitialAssignments():
        found[each.getSymbol()] = read(each.getMath())
    return found


def _model(model: Any) -> Model:
    species, reactions = _moved(model), list(model.getListOfReactions())
    rules = {
        each.getVariable(): read(each.getMath())
        for each in model.getListOfRules()
        if each.isAssignment()
    }
    rates = {
        each.getVariable(): read(each.getMath()) for each in model.getListOfRules() if each.isRate()
    }
    kinetic = {each.getId(): read(each.getKineticLaw().getMath()) for each in reactions}
    states = (*(each.getId() for each in species), *rates)
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
            for each in side:
                if each.getSpecies() in place:
                    stoichiometry[place[each.getSpecies()], j] += sign * each.getStoichiometry()
    sizes = [None if each.getHasOnlySubstanceUnits() else each.getCompartment() for each in species]
    laws = (*kinetic.values(), *rates.values())
    initial = {name: each for name, each in _initial(model).items() if name not in rules}
    return Model(
        initial, {**rules, **kinetic}, states, laws, stoichiometry, (*sizes, *[None] * len(rates)),
        tuple(_switches([*rules.values(), *laws], rules, states)),
    )  # fmt: skip


def _switches(formulas: list[Any], rules: dict[str, Any], states: tuple[str, ...]):
    """Both sides of relations that depend on time, and not on the state."""
    found = {}
    for part in (part for formula in formulas for part in within(formula)):
        if isinstance(part, Formula) and part.function in RELATIONS:
            for sides in itertools.pairwise(part.parts):
                names = names_in(Formula("MINUS", sides), rules)
                if "time" in names and not names & set(states):
                    _check_switch(Formula("MINUS", sides), rules)
                    found[sides] = None
    return found


def _check_switch(apart: Formula, rules: dict[str, Any]) -> None:
    """Raise unless the difference of both sides is linear in time, or steps where others switch."""
    degree = degree_in_time(apart, rules)
    steps = (
        isinstance(part, Formula) and part.function in RELATIONS and "time" in names_in(part, rules)
        for part in reached(apart, rules)
    )  # fmt: skip
    if degree is None or (degree == 1 and any(steps)):
        raise ValueError(
            f"{arg('path')} the field must switch where a linear function of time has a value; "
            "got a relation of another function of time, such as a sine or a power. Solve the "
            "model by jaxode.solve with breakpoints."
        )
