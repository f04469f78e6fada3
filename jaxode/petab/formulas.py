"""Formulas of SBML and PEtab as trees, and their values by JAX."""

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxode._checks.caller import arg


class Formula(NamedTuple):
    """A function of SBML, such as "PLUS", and its arguments: formulas, names and numbers."""

    function: str
    arguments: tuple[Any, ...]


def _power(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, float) and exponent.is_integer():
        return x ** int(exponent)  # whose derivatives at zero and below are finite
    return jnp.power(x, exponent)


def _logarithm(*args: Any) -> Any:
    base, x = args if len(args) == 2 else (10.0, *args)
    return jnp.log10(x) if isinstance(base, float) and base == 10 else jnp.log(x) / jnp.log(base)


def _root(*args: Any) -> Any:
    degree, x = args if len(args) == 2 else (2.0, *args)
    return jnp.sqrt(x) if isinstance(degree, float) and degree == 2 else _power(x, 1 / degree)


def _piecewise(*args: Any) -> Any:
    """Values and their conditions in turn, and the value otherwise."""
    value = args[-1] if len(args) % 2 else jnp.nan
    for i in reversed(range(0, len(args) - 1, 2)):
        value = jnp.where(args[i + 1], args[i], value)
    return value


def _all(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Make a function of two arguments one of any number of them."""
    return lambda *args: functools.reduce(function, args)


def _chain(relation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Whether a relation holds between each argument and the next one."""
    return lambda *args: _all(jnp.logical_and)(
        *itertools.starmap(relation, itertools.pairwise(args))
    )


def _reciprocal(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: 1 / function(x)


def _of_reciprocal(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: function(1 / jnp.asarray(x, float))  # infinite at zero, as an array


# Functions that have the same name in JAX.
FUNCTIONS_OF_JAX = (
    "abs", "exp", "floor", "sin", "cos", "tan", "sinh", "cosh", "tanh", "arcsin", "arccos",
    "arctan", "arcsinh", "arccosh", "arctanh",
)  # fmt: skip
RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan"}
RECIPROCALS |= {f"{name}h": f"{inverse}h" for name, inverse in RECIPROCALS.items()}
COMPARED = {"GT": jnp.greater, "GEQ": jnp.greater_equal, "LT": jnp.less, "LEQ": jnp.less_equal}
RELATIONS = {f"RELATIONAL_{name}": _chain(relation) for name, relation in COMPARED.items()}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "PLUS": lambda *args: functools.reduce(operator.add, args, 0.0),
    "MINUS": lambda x, *y: x - y[0] if y else -x,
    "TIMES": lambda *args: functools.reduce(operator.mul, args, 1.0),
    "DIVIDE": operator.truediv,
    "POWER": _power,
    "FUNCTION_POWER": _power,
    "FUNCTION_ROOT": _root,
    "FUNCTION_LOG": _logarithm,
    "FUNCTION_LN": jnp.log,
    "FUNCTION_PIECEWISE": _piecewise,
    "FUNCTION_CEILING": jnp.ceil,
    "SIGN": jnp.sign,
    "FUNCTION_MIN": _all(jnp.minimum),
    "FUNCTION_MAX": _all(jnp.maximum),
    "LOGICAL_AND": _all(jnp.logical_and),
    "LOGICAL_OR": _all(jnp.logical_or),
    "LOGICAL_XOR": _all(jnp.logical_xor),
    "LOGICAL_NOT": jnp.logical_not,
    "RELATIONAL_EQ": _chain(jnp.equal),
    "RELATIONAL_NEQ": jnp.not_equal,
    **RELATIONS,
    **{f"FUNCTION_{name.upper()}": getattr(jnp, name) for name in FUNCTIONS_OF_JAX},
    **{
        f"FUNCTION_{name.upper()}": _reciprocal(getattr(jnp, inverse))
        for name, inverse in RECIPROCALS.items()
    },
    **{
        f"FUNCTION_ARC{name.upper()}": _of_reciprocal(getattr(jnp, f"arc{inverse}"))
        for name, inverse in RECIPROCALS.items()
    },
}
# The name that stands for PEtab's logarithm while libsbml parses a formula: SBML's has the base
# first.
LOG = "petab_log"
# Functions of PEtab that SBML has not, and how many arguments they may have.
FUNCTIONS_OF_PETAB = {LOG: (1, 2), "log2": (1,), "sign": (1,)}
# Functions that need at least one argument.
EXTREMES = "FUNCTION_MIN", "FUNCTION_MAX"
CONSTANTS = {
    "CONSTANT_E": math.e,
    "CONSTANT_PI": math.pi,
    "CONSTANT_TRUE": True,
    "CONSTANT_FALSE": False,
    "NAME_TIME": "time",
    "NAME_AVOGADRO": 6.02214179e23,  # as SBML defines it
}


@functools.cache
def _types() -> dict[int, str]:
    """The name of each type of node."""
    import libsbml

    names = [name for name in (*FUNCTIONS, *CONSTANTS) if name != "SIGN"]
    return {getattr(libsbml, f"AST_{name}"): name for name in names}


def read(node: Any) -> Any:
    """The formula of a node of libsbml."""
    import libsbml

    if node is None:
        raise ValueError(f"{arg('path')} formulas must not be empty; got one. Write it.")
    kind = _types().get(node.getType())
    if kind in CONSTANTS:
        return CONSTANTS[kind]
    if node.isNumber():
        return float(node.getValue())
    if node.getType() == libsbml.AST_NAME:
        return node.getName()
    arguments = tuple(read(node.getChild(i)) for i in range(node.getNumChildren()))
    if kind is None and len(arguments) in FUNCTIONS_OF_PETAB.get(node.getName(), ()):
        return _of_petab(node.getName(), *arguments)
    if kind is None or (kind in EXTREMES and not arguments):
        raise ValueError(
            f"{arg('path')} formulas must be of functions that jaxode.petab reads; got "
            f"{libsbml.formulaToL3String(node).replace(LOG, 'log')!r}. Write it by others."
        )
    return Formula(kind, arguments)


def _of_petab(name: str, x: Any, *base: Any) -> Formula:
    """A function of PEtab as one of SBML, whose logarithms have the base first."""
    if name == "sign":
        return Formula("SIGN", (x,))
    if name == "log2":
        base = (2.0,)
    return Formula("FUNCTION_LOG", (*base, x)) if base else Formula("FUNCTION_LN", (x,))


def parsed(text: str) -> Any:
    """The formula of a text in a table of PEtab."""
    import libsbml

    settings = libsbml.L3ParserSettings()
    settings.setComparisonCaseSensitivity(libsbml.L3P_COMPARE_BUILTINS_CASE_SENSITIVE)
    changed = re.sub(r"\blog(?=\s*\()", LOG, text.replace("**", "^"))
    node = libsbml.parseL3FormulaWithSettings(changed, settings)
    if node is None:
        raise ValueError(
            f"{arg('path')} formulas must be of numbers, names and functions; got {text!r}. "
            "Mend it in the table of observables."
        )
    formula = read(node)
    for part in within(formula):
        if isinstance(part, Formula) and part.function in RELATIONS and len(part.arguments) > 2:
            raise ValueError(
                f"{arg('path')} formulas must compare two numbers at a time; got {text!r}. Join "
                "comparisons by && in the table of observables."
            )
    return formula


class Names(dict[str, Any]):
    """The values of names: those of `rules` by their formulas, others by `look_up(name)`."""

    def __init__(
        self, rules: Mapping[str, Any], look_up: Callable[[str], Any], **values: Any
    ) -> None:
        super().__init__(values)
        self.rules, self.look_up = rules, look_up

    def __missing__(self, name: str) -> Any:
        rule = self.rules.get(name)
        self[name] = value = self.look_up(name) if rule is None else evaluate(rule, self)
        return value


def evaluate(formula: Any, names: Mapping[str, Any]) -> Any:
    """The value of a formula."""
    if isinstance(formula, str):
        return names[formula]
    if not isinstance(formula, Formula):
        return formula
    return FUNCTIONS[formula.function](*(evaluate(part, names) for part in formula.arguments))


def within(formula: Any) -> Iterator[Any]:
    """The formula and all formulas within it."""
    yield formula
    if isinstance(formula, Formula):
        for part in formula.arguments:
            yield from within(part)


def reached(formula: Any, rules: Mapping[str, Any]) -> Iterator[Any]:
    """The formula and all formulas within it, also within the rules of its names, each once."""
    visited, left = set(), [formula]
    while left:
        for part in within(left.pop()):
            yield part
            if isinstance(part, str) and part not in visited:
                visited.add(part)
                left.append(rules.get(part))


def names_in(formula: Any, rules: Mapping[str, Any]) -> set[str]:
    """The names in a formula, also in the rules of its names."""
    return {part for part in reached(formula, rules) if isinstance(part, str)}


def degree_in_time(formula: Any, rules: Mapping[str, Any]) -> int | None:
    """0 if the formula is constant between switches of relations in it, 1 if it is linear in time
    there, and None otherwise."""
    if isinstance(formula, str):
        return 1 if formula == "time" else degree_in_time(rules.get(formula), rules)
    if not isinstance(formula, Formula) or formula.function in RELATIONS:
        return 0
    degrees = [degree_in_time(part, rules) for part in formula.arguments]
    if all(degree == 0 for degree in degrees):
        return 0
    linear = {
        "PLUS": True,
        "MINUS": True,
        "TIMES": degrees.count(1) == 1,
        "DIVIDE": degrees[1:] == [0],
    }
    return 1 if None not in degrees and linear.get(formula.function) else None
