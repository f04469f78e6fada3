"""Formulas of SBML and PEtab as trees, and their values by JAX."""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxode._checks.caller import arg


class Formula(NamedTuple):
    """A function of SBML, such as "PLUS", and its arguments: formulas, names and numbers."""

    function: str
    parts: tuple[Any, ...]


def _power(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, float) and exponent.is_integer():
        return x ** int(exponent)  # whose derivatives at zero and below are finite
    return jnp.power(x, exponent)


def _logarithm(*parts: Any) -> Any:
    base, x = parts if len(parts) == 2 else (10.0, *parts)
    return jnp.log10(x) if isinstance(base, float) and base == 10 else jnp.log(x) / jnp.log(base)


def _root(*parts: Any) -> Any:
    degree, x = parts if len(parts) == 2 else (2.0, *parts)
    return jnp.sqrt(x) if isinstance(degree, float) and degree == 2 else _power(x, 1 / degree)


def _piecewise(*parts: Any) -> Any:
    """Values and their conditions in turn, and the value otherwise."""
    found = parts[-1] if len(parts) % 2 else jnp.nan
    for i in reversed(range(0, len(parts) - 1, 2)):
        found = jnp.where(parts[i + 1], parts[i], found)
    return found


def _all(of_two: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *parts: functools.reduce(of_two, parts)


SHARED = (  # by their names in JAX
    "abs", "exp", "floor", "sin", "cos", "tan", "sinh", "cosh", "tanh", "arcsin", "arccos",
    "arctan", "arcsinh", "arccosh", "arctanh",
)  # fmt: skip
COMPARED = {"GT": jnp.greater, "GEQ": jnp.greater_equal, "LT": jnp.less, "LEQ": jnp.less_equal}
RELATIONS = {f"RELATIONAL_{name}": each for name, each in COMPARED.items()}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "PLUS": lambda *parts: functools.reduce(operator.add, parts, 0.0),
    "MINUS": lambda x, *y: x - y[0] if y else -x,
    "TIMES": lambda *parts: functools.reduce(operator.mul, parts, 1.0),
    "DIVIDE": operator.truediv,
    "POWER": _power,
    "FUNCTION_POWER": _power,
    "FUNCTION_ROOT": _root,
    "FUNCTION_LOG": _logarithm,
    "FUNCTION_LN": jnp.log,
    "FUNCTION_PIECEWISE": _piecewise,
    "FUNCTION_CEILING": jnp.ceil,
    "FUNCTION_MIN": _all(jnp.minimum),
    "FUNCTION_MAX": _all(jnp.maximum),
    "LOGICAL_AND": _all(jnp.logical_and),
    "LOGICAL_OR": _all(jnp.logical_or),
    "LOGICAL_XOR": _all(jnp.logical_xor),
    "LOGICAL_NOT": jnp.logical_not,
    "RELATIONAL_EQ": jnp.equal,
    "RELATIONAL_NEQ": jnp.not_equal,
    **RELATIONS,
    **{f"FUNCTION_{name.upper()}": getattr(jnp, name) for name in SHARED},
}
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

    return {getattr(libsbml, f"AST_{name}"): name for name in [*FUNCTIONS, *CONSTANTS]}


def read(node: Any) -> Any:
    """The formula of a node of libsbml."""
    import libsbml

    kind = _types().get(node.getType())
    if kind in CONSTANTS:
        return CONSTANTS[kind]
    if node.isNumber():
        return float(node.getValue())
    if node.getType() == libsbml.AST_NAME:
        return node.getName()
    if kind is None:
        raise ValueError(
            f"{arg('path')} formulas must be of functions that jaxode.petab reads; got "
            f"{libsbml.formulaToL3String(node)!r}. Write it by others."
        )
    return Formula(kind, tuple(read(node.getChild(i)) for i in range(node.getNumChildren())))


def parsed(text: str) -> Any:
    """The formula of a text in a table of PEtab."""
    import libsbml

    settings = libsbml.L3ParserSettings()
    settings.setParseLog(libsbml.L3P_PARSE_LOG_AS_LN)
    settings.setComparisonCaseSensitivity(libsbml.L3P_COMPARE_BUILTINS_CASE_SENSITIVE)
    node = libsbml.parseL3FormulaWithSettings(text.replace("**", "^"), settings)
    if node is None:
        raise ValueError(
            f"{arg('path')} formulas must be of numbers, names and functions; got {text!r}. "
            "Mend it in the table of observables."
        )
    return read(node)


class Names(dict[str, Any]):
    """The values of names: those of `rules` by their formulas, others by `look_up(name)`."""

    def __init__(
        self, rules: Mapping[str, Any], look_up: Callable[[str], Any], **known: Any
    ) -> None:
        super().__init__(known)
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
    return FUNCTIONS[formula.function](*(evaluate(part, names) for part in formula.parts))


def within(formula: Any) -> Iterator[Any]:
    """The formula and all that are part of it."""
    yield formula
    if isinstance(formula, Formula):
        for part in formula.parts:
            yield from within(part)


def names_in(formula: Any, rules: Mapping[str, Any]) -> set[str]:
    """The names in a formula, also by way of rules."""
    found, left = set(), [formula]
    while left:
        for part in within(left.pop()):
            if isinstance(part, str) and part not in found:
                found.add(part)
                left.append(rules.get(part))
    return found
